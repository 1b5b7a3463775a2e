"""What the tests of the convolution kernels share: operands, the three passes, and checks that every kernel has."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan.ops import conv as ops

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def operands(kernel, stride, batch, channels, outputs, size, padding=(1, 1), layout=torch.contiguous_format):
    """x, w, y of a convolution, and the lists that the operators take."""
    small = ops.output_size(size, (kernel, kernel), (stride, stride), padding, (1, 1))
    shapes = ((batch, channels, *size), (outputs, channels, kernel, kernel), (batch, outputs, *small))
    x, w, y = (torch.randn(shape).contiguous(memory_format=layout) for shape in shapes)
    return x, w, y, [stride, stride], list(padding)


def three(x, w, y, stride, padding, channels_last=False):
    """The three passes by the operators."""
    return (
        ops.conv(x, w, None, stride, padding, channels_last),
        ops.conv_input_gradient(y, w, None, list(x.shape[2:]), stride, padding, channels_last),
        ops.conv_weight_gradient(y, x, list(w.shape[2:]), stride, padding, channels_last),
    )


def by_torch(x, w, y, stride, padding):
    backward = torch.ops.aten.convolution_backward(
        y, x, w, None, stride, padding, [1, 1], False, [0, 0], 1, [True, True, False]
    )
    return F.conv2d(x, w, None, stride, padding), backward[0], backward[1]


def exact(x, w, y, stride, padding):
    """The same by torch in float64."""
    return by_torch(x.double(), w.double(), y.double(), stride, padding)


def rms(got, right):
    return ((got.double() - right).square().mean() / right.square().mean()).sqrt().item()


class Names(TorchDispatchMode):
    """Collects the names of operators."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def draw_padding_and_size(data, kernel, most):
    padding = data.draw(st.tuples(st.integers(0, 5), st.integers(0, 5)))
    return padding, [data.draw(st.integers(max(1, kernel - 2 * p), most)) for p in padding]


def draw_strides(data, *tensors):
    """The same tensors with gaps between all elements, or with rows and columns exchanged in memory, or neither."""
    if data.draw(st.booleans()):
        tensors = [F.pad(t, (0, 1, 0, 1))[..., :-1, :-1] for t in tensors]
    if data.draw(st.booleans()):
        tensors = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in tensors]
    return tensors


def check_bounds(arguments, bounds, layout):
    """The relative errors of the three passes, and that they keep the layout."""
    last = layout == torch.channels_last
    for got, right, bound in zip(three(*arguments, channels_last=last), exact(*arguments), bounds, strict=True):
        assert rms(got, right) < bound
        assert got.is_contiguous(memory_format=layout)


def check_threads(arguments):
    """The same bits for every number of threads."""
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(three(*arguments))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def check_magnitudes(arguments, times, share):
    """Offsets and mixed magnitudes: image by image at most ``times`` a direct sum's own error and ``share``."""
    x, *rest = arguments
    for case in (
        x + 1000.0,
        x * 10.0 ** torch.randint(-6, 7, (1, x.shape[1], 1, 1)),
        x * 10.0 ** torch.randint(-6, 7, (x.shape[0], 1, 1, 1)),
    ):
        passes = zip(three(case, *rest), exact(case, *rest), by_torch(case, *rest), strict=True)
        for got, right, direct in passes:
            for g, e, d in zip(got, right, direct, strict=True):
                assert (g - e).abs().max() <= times * (d - e).abs().max() + share * e.abs().max()


def check_nonfinite(arguments_of, value, atol):
    """A value that is not finite, in each operand: what does not depend on it stays as it is."""
    for operand in range(3):
        tensors = arguments_of()
        where = -tensors[operand].numel() // 3
        before = exact(*tensors)
        tensors[operand].view(-1)[where] = value
        # what depends on it: a sum of ones, where that is not zero
        ones = [torch.ones_like(t) if isinstance(t, torch.Tensor) else t for t in tensors]
        ones[operand].zero_().view(-1)[where] = 1
        blind = {0: 1, 1: 2, 2: 0}[operand]  # the pass that does not read it
        for p, (got, right, depends) in enumerate(zip(three(*tensors), before, exact(*ones), strict=True)):
            if p == blind:
                assert got.isfinite().all()
                continue
            assert torch.equal(~got.isfinite(), depends > 0.5)
            kept = got.isfinite()
            torch.testing.assert_close(got[kept].double(), right[kept], rtol=1e-4, atol=atol)


def check_half(arguments, dtype):
    """Half precision is float32 inside: only the results are rounded."""
    arguments = [t.to(dtype) if isinstance(t, torch.Tensor) else t for t in arguments]
    for got, right in zip(three(*arguments), exact(*arguments), strict=True):
        assert got.dtype == dtype
        assert rms(got, right) < 0.4 * torch.finfo(dtype).eps


def check_penalty(ours, theirs, tensors, stride, padding):
    """A gradient penalty runs on the kernels in all passes, and equals float64."""

    def penalty(function, *tensors):
        x, w, b = (t.detach().clone().requires_grad_() for t in tensors)
        out = F.leaky_relu(function(x, w, b, stride, padding), 0.2).square()
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().mean() + out.mean(), (x, w, b))

    with Names() as names:
        got = penalty(ours, *tensors)
    assert {"fastgan.conv", "fastgan.conv_input_gradient", "fastgan.conv_weight_gradient"} <= set(names.seen)
    assert not any(name.startswith("aten.convolution") for name in names.seen)
    for a, right in zip(got, penalty(theirs, *(t.double() for t in tensors)), strict=True):
        assert rms(a, right) < 3e-6
