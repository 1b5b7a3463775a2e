"""A convolution with the (leaky) ReLU after it: the same numbers as one after the other, and the same derivatives."""

import pytest
import torch
import torch.nn.functional as F

from fastgan.nn._functional.convolution import _conv2d, _conv_transpose2d
from fastgan.ops import conv as ops
from fastgan.ops.leaky_relu import activated, leaky_relu_backward, leaky_relu_backward_reference
from tests.convolutions import LAYOUTS, Names, rms
from tests.derivatives import check_derivatives

# kernel, stride, channels, outputs
LAYERS = {
    "first layer": (4, 2, 3, 40),
    "winograd F(4,2)": (4, 2, 48, 64),
    "winograd F(4,3)": (3, 1, 32, 48),
    "plain first": (3, 1, 3, 40),
    "plain last": (3, 1, 40, 3),
}
GRADIENTS = ("fastgan.conv_input_gradient", "fastgan.conv_weight_gradient", "fastgan.leaky_relu_backward")


def _layer(name, layout=torch.contiguous_format, size=(50, 46), bias=False):
    kernel, stride, channels, outputs = LAYERS[name]
    x = torch.randn(8, channels, *size).contiguous(memory_format=layout).requires_grad_()
    w = (torch.randn(outputs, channels, kernel, kernel) * 0.1).contiguous(memory_format=layout).requires_grad_()
    return x, w, torch.randn(outputs).requires_grad_() if bias else None, stride


def _ours(x, w, b, stride, slope):
    return _conv2d(x, w, b, stride, 1, 1, 1, slope)


def _theirs(x, w, b, stride, slope):
    return activated(F.conv2d(x, w, b, stride, 1), slope)


@pytest.mark.kernel
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_read_through_the_activation(name, slope, layout, bias, capability):
    x, w, b, stride = _layer(name, layout, bias=bias)
    out = _ours(x, w, b, stride, slope)
    gradient = torch.randn_like(out)
    leaves = [t for t in (x, w, b) if t is not None]
    with Names() as names:
        got = torch.autograd.grad(out, leaves, gradient)
    # Neither a masked gradient nor an operator's call, but where the kernels change places or a bias wants the sum.
    assert ("fastgan.conv_pass" in names.seen) == (name != "plain last" and not bias)
    assert ("fastgan.leaky_relu_backward" in names.seen) == (name == "plain last" or bias)
    masked = leaky_relu_backward_reference(gradient, out.detach(), slope)
    plain = _ours(x, w, b, stride, 1.0)
    for a, expected in zip(got, torch.autograd.grad(plain, leaves, masked), strict=True):
        assert torch.equal(a, expected)
        assert a.stride() == expected.stride()


@pytest.mark.kernel
@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_another_layout_and_of_strides_of_zero(name, slope):
    x, w, _, stride = _layer(name)
    out = _ours(x, w, None, stride, slope)
    for gradient in (
        torch.randn_like(out).contiguous(memory_format=torch.channels_last),
        torch.ones(()).expand(out.shape),
        torch.randn(*out.shape[:3], 2 * out.shape[3])[..., ::2],
    ):
        got = torch.autograd.grad(out, (x, w), gradient, retain_graph=True)
        masked = leaky_relu_backward_reference(gradient, out.detach(), slope)
        plain = torch.autograd.grad(_ours(x, w, None, stride, 1.0), (x, w), masked)
        for a, expected in zip(got, plain, strict=True):
            torch.testing.assert_close(a, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.kernel
@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize("where", ["gradient", "activation"])
@pytest.mark.parametrize("name", LAYERS)
def test_nonfinite_is_torchs(name, where, slope):
    x, w, _, stride = _layer(name)
    for value in (torch.inf, -torch.inf, torch.nan):
        data = x.detach().clone()
        if where == "activation":
            data[2, 1, 9, 9] = value
        found = []
        for function in (_ours, _theirs):
            leaf, weight = data.clone().requires_grad_(), w.detach().clone().requires_grad_()
            out = function(leaf, weight, None, stride, slope)
            torch.manual_seed(1)
            gradient = torch.randn_like(out)
            if where == "gradient":
                gradient[1, 2, 5, 5:8] = value
            found.append(torch.autograd.grad(out, (leaf, weight), gradient))
        for a, expected in zip(*found, strict=True):
            assert torch.equal(a.isnan(), expected.isnan())
            torch.testing.assert_close(a, expected, rtol=1e-4, atol=1e-3, equal_nan=True)


@pytest.mark.kernel
@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize("name", LAYERS)
def test_penalty_equals_float64(name, slope):
    def penalty(function, x, w, b, stride):
        out = function(x, w, b, stride, slope).square()
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().mean() + out.mean(), (x, w, b))

    x, w, b, stride = _layer(name, bias=True)
    got = penalty(_ours, x, w, b, stride)
    right = penalty(_theirs, *(t.detach().double().requires_grad_() for t in (x, w, b)), stride)
    for a, expected in zip(got, right, strict=True):
        # where a result is so small that rounding decides about its sign, a derivative of it is another's
        assert rms(a, expected) < 1e-3
        assert (a - expected).abs().median() < 1e-5 * expected.abs().max()


@pytest.mark.kernel
def test_only_the_gradients_asked_for():
    x, w, _, stride = _layer("first layer")
    to_input, to_weight, masked = GRADIENTS
    for wanted, operators in (((x,), [to_input]), ((w,), [to_weight]), ((x, w), [to_input, to_weight])):
        out = _ours(x, w, None, stride, 0.2)
        with Names() as names:  # through the mask
            torch.autograd.grad(out, wanted, torch.ones_like(out), retain_graph=True)
        assert names.seen.count("fastgan.conv_pass") == len(operators)
        with Names() as names:  # a sum's gradient has strides of its own: masked first, once
            torch.autograd.grad(out.sum(), wanted)
        assert [name for name in names.seen if name in GRADIENTS] == [masked, *operators]


@pytest.mark.kernel
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_a_gradient_of_many_outputs_at_once_and_every_graph(transposed, slope):
    x, w, b = torch.randn(24, 32, 16, 16), torch.randn(48, 32, 4, 4) * 0.1, torch.randn(48)
    ours, theirs = _ours, _theirs
    if transposed:
        x, b = torch.randn(24, 48, 8, 8), torch.randn(32)
        ours = lambda x, w, b, stride, slope: _conv_transpose2d(x, w, b, stride, 1, 0, 1, 1, slope)
        theirs = lambda x, w, b, stride, slope: activated(F.conv_transpose2d(x, w, b, stride, 1), slope)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    found = []
    for function in (ours, theirs):
        out = function(*leaves, 2, slope)
        torch.manual_seed(1)
        many = torch.randn(3, *out.shape)
        found.append([
            *torch.autograd.grad(out, leaves, many, is_grads_batched=True, retain_graph=True),
            *torch.autograd.grad(out, leaves, many[0], retain_graph=True),
            *torch.autograd.grad(out, leaves, many[0], create_graph=True),
            *torch.func.vjp(lambda *t: function(*t, 2, slope), *leaves)[1](many[0]),  # noqa: B023
            torch.func.jvp(lambda *t: function(*t, 2, slope), tuple(leaves), tuple(leaves))[1],  # noqa: B023
        ])  # fmt: skip
    for a, expected in zip(*found, strict=True):
        torch.testing.assert_close(a, expected, rtol=1e-4, atol=1e-3)


OPERATORS = {
    "conv_act": lambda x, w, y, slope: (x, w, torch.randn(w.shape[0]).to(x), [2, 2], [1, 1], False, slope),
    "conv_input_gradient_act": lambda x, w, y, slope: (
        y, w, torch.randn(w.shape[1]).to(x), list(x.shape[2:]), [2, 2], [1, 1], False, slope,
    ),
    "leaky_relu_backward": lambda x, w, y, slope: (x, torch.randn_like(x), slope),
}  # fmt: skip


@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_contract(name, channels, slope):
    operator = getattr(torch.ops.fastgan, name).default
    x, w, y = (
        torch.randn(2, channels, 6, 5),
        torch.randn(channels + 1, channels, 4, 4),
        torch.randn(2, channels + 1, 3, 2),
    )
    arguments = OPERATORS[name](x, w, y, slope)
    float32 = tuple(a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments)
    torch.library.opcheck(operator, float32)
    exact = tuple(a.double().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments)
    tensors = [a for a in exact if isinstance(a, torch.Tensor)]
    if name == "leaky_relu_backward":
        tensors, exact = tensors[:1], (exact[0], exact[1].detach(), slope)
    rest = exact[len(tensors) :]

    def call(*tensors):
        return operator(*tensors, *rest)

    assert torch.autograd.gradcheck(call, tensors, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", ["conv_act", "conv_input_gradient_act"])
def test_every_kind_of_derivative(name):
    slope = 0.3
    x, w = torch.randn(2, 2, 4, 4, dtype=torch.float64), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    y = torch.randn(2, 2, 2, 2, dtype=torch.float64)
    plain = getattr(ops, f"{name.removesuffix('_act')}_reference")
    functions = {
        "conv_act": lambda f: lambda z: f(z, w * z.sum(), z.mean((0, 2, 3)), [2, 2], [1, 1], False, slope),
        "conv_input_gradient_act": lambda f: (
            lambda z: f(y * z.mean(), z, z.mean((0, 2, 3)), [4, 4], [2, 2], [1, 1], False, slope)
        ),
    }
    reference = lambda *args: activated(plain(*args[:-1]), args[-1])
    check_derivatives(functions[name](getattr(ops, name)), functions[name](reference), x)


@pytest.mark.kernel
@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "channels_last"])
def test_compiles_whole_and_keeps_the_layout(layout):
    x, w, b, stride = _layer("first layer", layout, bias=True)

    def step(x, w, b):
        out = _ours(x, w, b, stride, 0.2)
        return out.detach(), *torch.autograd.grad(out.square().sum(), (x, w))

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, w, b)
    for a, expected in zip(got, step(x, w, b), strict=True):
        torch.testing.assert_close(a, expected, rtol=1e-6, atol=1e-5)
        assert a.stride() == expected.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("shape", [(8, 16, 64, 64), (2, 3, 5, 7), (0, 3, 5, 7), (2, 3)])
def test_leaky_relu_backward_is_torchs(shape, slope, dtype):
    x = torch.randn(shape).to(dtype)
    x.view(-1)[:3] = torch.tensor([0.0, torch.nan, -0.0])[: x.numel()]
    leaf = x.clone().requires_grad_()
    gradient = torch.randn(shape).to(dtype)
    out = activated(leaf, slope)
    assert torch.equal(leaky_relu_backward(gradient, out.detach(), slope), torch.autograd.grad(out, leaf, gradient)[0])
