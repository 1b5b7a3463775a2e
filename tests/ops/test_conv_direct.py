"""Convolutions from and to the few channels of a picture, and whole images at once, against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgan
from fastgan.nn.functional import conv2d, conv_transpose2d
from fastgan.ops import conv as ops
from tests.convolutions import (
    LAYOUTS,
    Names,
    check_bounds,
    check_half,
    check_magnitudes,
    check_nonfinite,
    check_penalty,
    check_threads,
    draw_padding_and_size,
    draw_strides,
    exact,
    operands,
    three,
)
from tests.derivatives import check_derivatives

pytestmark = pytest.mark.kernel

#: name -> kernel, stride, channels, outputs. The last is computed as the transpose of one from few to many.
KINDS = {"strided": (4, 2, 3, 40), "grey": (4, 2, 1, 64), "plain": (3, 1, 3, 32), "to few": (3, 1, 24, 3)}


def _operands(kind, batch=3, size=(14, 11), **options):
    kernel, stride, channels, outputs = KINDS[kind]
    return operands(kernel, stride, batch, channels, outputs, size, **options)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_those_of_direct_sums(kind, layout, capability):
    check_bounds(_operands(kind, 9, (40, 64), layout=layout), ops.ERRORS["direct"], layout)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_any_size_padding_and_stride_of_memory(data, kind):
    padding, size = draw_padding_and_size(data, KINDS[kind][0], 23)
    *tensors, s, p = _operands(kind, data.draw(st.integers(1, 5)), size, padding=padding)
    arguments = (*draw_strides(data, *tensors), s, p)
    for got, right in zip(three(*arguments), exact(*arguments), strict=True):
        torch.testing.assert_close(got.double(), right, rtol=0, atol=2e-6 * max(1.0, right.abs().max().item()))


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_every_number_of_threads(kind):
    check_threads(_operands(kind, 37, (30, 33)))


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_and_mixed_magnitudes(kind):
    check_magnitudes(_operands(kind, 4, (32, 32)), 3, 3e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nonfinite_stays_where_it_belongs(kind, value):
    check_nonfinite(lambda: _operands(kind, 2, (13, 10)), value, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_float32_inside(kind, dtype):
    check_half(_operands(kind, 5), dtype)


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
    check_penalty(ours, theirs, tensors, stride, padding)


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
        with Names() as names:
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
