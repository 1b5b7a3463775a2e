"""Convolutions from and to the few channels of a picture, and whole images at once, against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fastgan
from fastgan.nn.functional import conv2d, conv_transpose2d
from fastgan.ops import conv as ops
from tests.derivatives import check_derivatives

pytestmark = pytest.mark.kernel

LAYOUTS = [torch.contiguous_format, torch.channels_last]
#: name -> kernel, stride, channels, outputs. The last is computed as the transpose of one from few to many.
KINDS = {"strided": (4, 2, 3, 40), "grey": (4, 2, 1, 64), "plain": (3, 1, 3, 32), "to few": (3, 1, 24, 3)}


def _operands(kind, batch=3, size=(14, 11), padding=(1, 1), layout=torch.contiguous_format):
    kernel, stride, channels, outputs = KINDS[kind]
    small = ops.output_size(size, (kernel, kernel), (stride, stride), padding, (1, 1))
    shapes = ((batch, channels, *size), (outputs, channels, kernel, kernel), (batch, outputs, *small))
    x, w, y = (torch.randn(shape).contiguous(memory_format=layout) for shape in shapes)
    return x, w, y, [stride, stride], list(padding)


def _three(x, w, y, stride, padding, channels_last=False):
    return (
        ops.conv(x, w, None, stride, padding, channels_last),
        ops.conv_input_gradient(y, w, None, list(x.shape[2:]), stride, padding, channels_last),
        ops.conv_weight_gradient(y, x, list(w.shape[2:]), stride, padding, channels_last),
    )


def _by_torch(x, w, y, stride, padding):
    backward = torch.ops.aten.convolution_backward(
        y, x, w, None, stride, padding, [1, 1], False, [0, 0], 1, [True, True, False]
    )
    return F.conv2d(x, w, None, stride, padding), backward[0], backward[1]


def _exact(x, w, y, stride, padding):
    return _by_torch(x.double(), w.double(), y.double(), stride, padding)


def _rms(got, exact):
    return ((got.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


class _Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_those_of_direct_sums(kind, layout, capability):
    operands = _operands(kind, 9, (40, 64), layout=layout)
    last = layout == torch.channels_last
    three = zip(_three(*operands, channels_last=last), _exact(*operands), ops.ERRORS["direct"], strict=True)
    for got, exact, bound in three:
        assert _rms(got, exact) < bound
        assert got.is_contiguous(memory_format=layout)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_any_size_padding_and_stride_of_memory(data, kind):
    kernel = KINDS[kind][0]
    padding = data.draw(st.tuples(st.integers(0, 5), st.integers(0, 5)))
    size = [data.draw(st.integers(max(1, kernel - 2 * p), 23)) for p in padding]
    x, w, y, s, p = _operands(kind, data.draw(st.integers(1, 5)), size, padding)
    if data.draw(st.booleans()):  # gaps between all elements
        x, w, y = (F.pad(t, (0, 1, 0, 1))[..., :-1, :-1] for t in (x, w, y))
    if data.draw(st.booleans()):
        x, w, y = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in (x, w, y))
    for got, exact in zip(_three(x, w, y, s, p), _exact(x, w, y, s, p), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-6 * max(1.0, exact.abs().max().item()))


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_every_number_of_threads(kind):
    operands = _operands(kind, 37, (30, 33))
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(_three(*operands))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_and_mixed_magnitudes(kind):
    x, w, y, stride, padding = _operands(kind, 4, (32, 32))
    for case in (
        x + 1000.0,
        x * 10.0 ** torch.randint(-6, 7, (1, x.shape[1], 1, 1)),
        x * 10.0 ** torch.randint(-6, 7, (4, 1, 1, 1)),
    ):
        operands = case, w, y, stride, padding
        for got, exact, direct in zip(_three(*operands), _exact(*operands), _by_torch(*operands), strict=True):
            for g, e, d in zip(got, exact, direct, strict=True):
                assert (g - e).abs().max() <= 3 * (d - e).abs().max() + 3e-7 * e.abs().max()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nonfinite_stays_where_it_belongs(kind, value):
    for operand in range(3):
        tensors = _operands(kind, 2, (13, 10))
        where = -tensors[operand].numel() // 3
        exact = _exact(*tensors)
        tensors[operand].view(-1)[where] = value
        # what depends on it: a sum of ones, where that is not zero
        ones = [torch.ones_like(t) if isinstance(t, torch.Tensor) else t for t in tensors]
        ones[operand].zero_().view(-1)[where] = 1
        blind = {0: 1, 1: 2, 2: 0}[operand]  # the pass that does not read it
        for p, (got, right, depends) in enumerate(zip(_three(*tensors), exact, _exact(*ones), strict=True)):
            if p == blind:
                assert got.isfinite().all()
                continue
            assert torch.equal(~got.isfinite(), depends > 0.5)
            kept = got.isfinite()
            torch.testing.assert_close(got[kept].double(), right[kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_float32_inside(kind, dtype):
    operands = [t.to(dtype) if isinstance(t, torch.Tensor) else t for t in _operands(kind, 5)]
    for got, exact in zip(_three(*operands), _exact(*operands), strict=True):
        assert got.dtype == dtype
        assert _rms(got, exact) < 0.4 * torch.finfo(dtype).eps


def _layers(kind, layout):
    """Our function, torch's and their arguments: a layer that the direct kernels take."""
    transposed = kind in ("strided", "grey")
    x, w, y, stride, padding = _operands(kind, 48, (32, 32), layout=layout)
    if transposed:
        return conv_transpose2d, F.conv_transpose2d, (y, w, torch.randn(w.shape[1]), stride, padding)
    return conv2d, F.conv2d, (x, w, torch.randn(w.shape[0]), stride, padding)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("kind", KINDS)
def test_R36_penalty_runs_on_the_kernels_and_equals_float64(kind, layout):
    ours, theirs, (*tensors, stride, padding) = _layers(kind, layout)

    def penalty(function, *tensors):
        x, w, b = (t.detach().clone().requires_grad_() for t in tensors)
        out = F.leaky_relu(function(x, w, b, stride, padding), 0.2).square()
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().mean() + out.mean(), (x, w, b))

    with _Names() as names:
        got = penalty(ours, *tensors)
    assert {"fastgan.conv", "fastgan.conv_input_gradient", "fastgan.conv_weight_gradient"} <= set(names.seen)
    assert not any(name.startswith("aten.convolution") for name in names.seen)
    for a, exact in zip(got, penalty(theirs, *(t.double() for t in tensors)), strict=True):
        assert _rms(a, exact) < 3e-6


@pytest.mark.parametrize("kind", KINDS)
def test_exact_and_small_are_torchs(kind):
    ours, theirs, (x, w, b, stride, padding) = _layers(kind, torch.contiguous_format)
    small = x[:1, :, :6, :6]
    assert torch.equal(ours(small, w, b, stride, padding), theirs(small, w, b, stride, padding))
    try:
        fastgan.set_conv_algorithm("exact")
        assert torch.equal(ours(x, w, b, stride, padding), theirs(x, w, b, stride, padding))
    finally:
        fastgan.set_conv_algorithm("auto")


# ---- a kernel that covers the image ----

WHOLE = {
    "conv2d": (conv2d, F.conv2d, (5, 6, 4, 3), (7, 6, 4, 3), 7),
    "conv_transpose2d": (conv_transpose2d, F.conv_transpose2d, (5, 6, 1, 1), (6, 7, 4, 3), 7),
}


@pytest.mark.parametrize("weight_layout", LAYOUTS, ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_images_are_one_product(name, layout, weight_layout):
    ours, theirs, size, weight_size, outputs = WHOLE[name]
    x = torch.randn(size).contiguous(memory_format=layout).requires_grad_()
    w = torch.randn(weight_size).contiguous(memory_format=weight_layout).requires_grad_()
    for b in (None, torch.randn(outputs, requires_grad=True)):
        leaves = [t for t in (x, w, b) if t is not None]
        with _Names() as names:
            out = ours(x, w, b, stride=2)
            grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        assert not any("conv" in n for n in names.seen)
        exact = theirs(*(None if t is None else t.double() for t in (x, w, b)), stride=2)
        assert out.shape == exact.shape
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
        for a, e in zip(grads, torch.autograd.grad(exact.square().sum(), leaves), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
        if layout == weight_layout:
            assert grads[1].stride() == w.stride()
    if weight_layout == torch.channels_last and name == "conv_transpose2d":
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", WHOLE)
def test_every_kind_of_derivative_of_whole_images(name):
    ours, theirs, size, weight_size, _ = WHOLE[name]
    x, w = torch.randn(2, *size[1:]), torch.randn(weight_size)
    check_derivatives(lambda z: ours(z, w * z.sum()), lambda z: theirs(z, w * z.sum()), x, rtol=1e-3, atol=1e-3)


def test_whole_images_empty_unbatched_and_padded_go_to_torch():
    w = torch.randn(7, 6, 4, 3)
    assert conv2d(torch.randn(0, 6, 4, 3), w).shape == (0, 7, 1, 1)
    assert conv2d(torch.randn(6, 4, 3), w).shape == (7, 1, 1)
    assert conv2d(torch.randn(2, 6, 4, 3), w, padding=1).shape == (2, 7, 3, 3)
    assert conv_transpose2d(torch.randn(2, 7, 1, 1), w, stride=2, output_padding=1).shape == (2, 6, 5, 4)
