"""conv2d and conv_transpose2d: the arithmetic is torch's, so what can go wrong is the arguments and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from fastgan.nn.functional import conv2d, conv_transpose2d

PAIRS = {"conv2d": (conv2d, F.conv2d), "conv_transpose2d": (conv_transpose2d, F.conv_transpose2d)}


@pytest.mark.parametrize("name", PAIRS)
def test_torchs_own_samples(name):
    from torch.testing._internal.common_methods_invocations import op_db

    ours, theirs = PAIRS[name]
    info = next(op for op in op_db if op.name == f"nn.functional.{name}")
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True):
        arguments = (sample.input, *sample.args)
        torch.testing.assert_close(ours(*arguments, **sample.kwargs), theirs(*arguments, **sample.kwargs))
    # torch has none for the transposed one
    for sample in info.error_inputs("cpu") if info.error_inputs_func is not None else ():
        arguments = (sample.sample_input.input, *sample.sample_input.args)
        with pytest.raises(sample.error_type):
            ours(*arguments, **sample.sample_input.kwargs)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "output_padding", "dilation"),
    [(1, 2, 0, 0, 1), (1, 2, 0, 1, 1), (5, 3, 0, 0, 1), (5, 3, 2, 2, 1), (4, 2, 1, 0, 1), (3, 1, 1, 1, 2)],
)
def test_R34_transposed_convolution_is_the_adjoint(kernel, stride, padding, output_padding, dilation):
    # <conv_transpose(x), y> = <x, conv(y)> defines it, gradients included
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, kernel, kernel, dtype=torch.float64, requires_grad=True)
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    out = conv_transpose2d(x, weight, output_padding=output_padding, **options)
    y = torch.randn_like(out)
    back = conv2d(y, weight, **options)
    assert back.shape[2] >= x.shape[2]
    back = back[:, :, :4, :4]
    torch.testing.assert_close((out * y).sum(), (x * back).sum())
    torch.testing.assert_close(torch.autograd.grad((out * y).sum(), x, retain_graph=True)[0], back)
    torch.autograd.gradcheck(lambda x, w: conv_transpose2d(x, w, output_padding=output_padding, **options), (x, weight))


def test_R36_linear_network_twice_differentiable():
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    first = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    second = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)

    def network(x, first, second):
        return conv_transpose2d(conv2d(x, first, stride=2, padding=1), second, stride=2, padding=1)

    (grad,) = torch.autograd.grad(network(x, first, second).sum(), x, create_graph=True)
    assert grad.grad_fn is not None
    grad.square().sum().backward()
    assert first.grad.abs().sum() > 0
    torch.autograd.gradgradcheck(network, (x, first, second))


def test_autocast_vmap_and_channels_last():
    x, weight = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv2d(x, weight.bfloat16()).dtype == torch.bfloat16
        assert conv_transpose2d(x, weight.transpose(0, 1)).dtype == torch.bfloat16
    each = torch.vmap(lambda image: conv2d(image, weight))(x)
    torch.testing.assert_close(each, conv2d(x, weight))
    assert conv2d(x.to(memory_format=torch.channels_last), weight).is_contiguous(memory_format=torch.channels_last)
    assert conv2d(x[:0], weight).shape == (0, 4, 4, 4)


W = torch.randn(2, 2, 3, 3)
REFUSED = [
    ("output_padding .* output_padding=2", lambda x: conv_transpose2d(x, W, stride=2, output_padding=2)),
    ("output_padding", lambda x: conv_transpose2d(x, W, output_padding=-1)),
    ("padding=3 leaves no output", lambda x: conv_transpose2d(x, W, padding=3)),
    ("leaves an output of 0 x 0", lambda x: conv2d(x[..., :2, :2], W)),
    ("stride must be positive, got 0", lambda x: conv2d(x, W, stride=0)),
    ("dilation must be positive", lambda x: conv_transpose2d(x, W, dilation=0)),
    ("padding must not be negative, got -1", lambda x: conv2d(x, W, padding=-1)),
    ("padding must not be negative", lambda x: conv_transpose2d(x, W, padding=-1)),
    ("input must have 2 channels", lambda x: conv2d(x[:, :1], W)),
    ("input must have 4 dimensions", lambda x: conv2d(x[0, 0], W)),
    ("bias must have shape", lambda x: conv2d(x, W, W.new_zeros(3))),
    ("weight must have input's dtype", lambda x: conv2d(x, W.double())),
    ("weight must be on input's device", lambda x: conv2d(x, W.to("meta"))),
    ("groups", lambda x: conv2d(x, W[:, :1].repeat(2, 1, 1, 1)[:3], groups=2)),
    ("groups must be positive", lambda x: conv2d(x, W, groups=0)),
    ("stride must be one integer or two", lambda x: conv2d(x, W, stride=(1, 2, 3))),
]


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=[message for message, _ in REFUSED])
def test_refused(message, call):
    with pytest.raises(RuntimeError, match=message):
        call(torch.randn(1, 2, 4, 4))


def test_R13_an_ensemble_of_weights_by_vmap():
    """The second layer's input has the layout that vmap gave it, which can be asked for by strides alone."""
    x, first, second = torch.randn(4, 3, 8, 8), torch.randn(3, 8, 3, 4, 4) / 10, torch.randn(3, 1, 8, 4, 4) / 10

    def outputs(function):
        return torch.vmap(lambda v, w: function(function(x, v, stride=2, padding=1), w))(first, second)

    torch.testing.assert_close(outputs(conv2d), outputs(F.conv2d), rtol=1e-4, atol=1e-5)
