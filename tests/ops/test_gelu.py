"""Bias and GELU as one operator, against float64 and torch, and in every derivative."""

import math

import pytest
import torch
from torch.nn import functional as F

from fastgan.ops.gelu import bias_gelu, gelu_backward, gelu_backward_reference, gelu_reference
from tests.derivatives import check_derivatives


def spread(count=200_001):
    return torch.linspace(-14.6, 10, count)


def test_the_error_that_is_promised(capability):
    x = spread()
    exact = gelu_reference(x.double(), None, False)
    error = (bias_gelu(x, None, False).double() - exact).abs()
    bound = torch.where(x > -2, 5e-7, 1e-6 + 2e-7 * x.square()) * exact.abs()
    assert (error <= bound + 1e-37).all(), float((error / (bound + 1e-37)).max())
    slope = gelu_backward(torch.ones_like(x), x, None, False, False)[0].double()
    leaf = x.double().requires_grad_()
    (exact_slope,) = torch.autograd.grad(F.gelu(leaf).sum(), leaf)
    assert (slope - exact_slope).abs().max() < 5e-7


def test_by_tanh(capability):
    x = spread()
    exact = F.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(bias_gelu(x, None, True).double(), exact, rtol=2e-6, atol=1e-7)
    leaf = x.double().requires_grad_()
    (slope,) = torch.autograd.grad(F.gelu(leaf, approximate="tanh").sum(), leaf)
    torch.testing.assert_close(
        gelu_backward(torch.ones_like(x), x, None, True, False)[0].double(), slope, rtol=2e-6, atol=1e-6
    )


@pytest.mark.parametrize("by_tanh", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 32), (2, 3, 33), (70, 1027), (40,)])
def test_with_a_bias(capability, shape, dtype, by_tanh):
    torch.manual_seed(0)
    x, grad = (3 * torch.randn(shape).to(dtype) for _ in range(2))
    bias = torch.randn(shape[-1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    exact = gelu_reference(x.double(), bias.double(), by_tanh)
    torch.testing.assert_close(bias_gelu(x, bias, by_tanh).double(), exact, rtol=tolerance, atol=tolerance)
    got = gelu_backward(grad, x, bias, by_tanh, True)
    want = gelu_backward_reference(grad.double(), x.double(), bias.double(), by_tanh, True)
    assert (got[0].dtype, got[1].dtype) == (dtype, bias.dtype)
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=3 * tolerance * max(1, len(x) / 8))


def test_far_below_zero_it_keeps_its_digits(capability):
    x = torch.full((64,), -6.0)
    exact = -6 * 0.5 * math.erfc(6 / math.sqrt(2))
    assert abs(bias_gelu(x, None, False)[0].item() / exact - 1) < 1e-5


def test_what_is_not_finite(capability):
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e30, -1e30, 90.0, -90.0])
    y = bias_gelu(x, None, False)
    expected = F.gelu(x)
    expected[1] = float("inf")  # torch's vectors make NaN of it
    torch.testing.assert_close(y, expected, equal_nan=True)
    slope = gelu_backward(torch.ones_like(x), x, None, False, False)[0]
    torch.testing.assert_close(slope[3:], torch.tensor([0.5, 0.5, 1.0, 0.0, 1.0, 0.0]))
    assert slope[0].isnan()


def test_the_same_bits_for_every_number_of_threads_and_every_stride():
    torch.manual_seed(0)
    x, grad, bias = torch.randn(333, 260), torch.randn(333, 260), torch.randn(260)
    threads = torch.get_num_threads()

    def everything():
        return [bias_gelu(x, bias, False), bias_gelu(x, None, False), *gelu_backward(grad, x, bias, False, True)]

    whole = everything()
    try:
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(everything(), whole, strict=True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(bias_gelu(x.t().contiguous().t(), bias.repeat_interleave(2)[::2], False), whole[0])
    spaced = grad.repeat(1, 2)[:, :260]
    assert torch.equal(gelu_backward(spaced, x.t().contiguous().t(), bias, False, True)[0], whole[2])


def test_empty():
    for shape in ((0,), (0, 8), (3, 0)):
        x = torch.empty(shape)
        assert bias_gelu(x, None, False).shape == shape
        bias = torch.zeros(shape[-1])
        got = gelu_backward(x, x, bias, False, True)
        assert got[0].shape == shape
        assert torch.equal(got[1], torch.zeros(shape[-1]))


@pytest.mark.parametrize("by_tanh", [False, True])
def test_derivatives(by_tanh):
    torch.manual_seed(0)
    x, bias = torch.randn(3, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    for own in (None, bias):
        leaves = [each.clone().requires_grad_() for each in (x, own) if each is not None]
        torch.library.opcheck(bias_gelu, (leaves[0], leaves[1] if own is not None else None, by_tanh))
        torch.library.opcheck(gelu_backward, (x, x, own, by_tanh, own is not None))

        def call(t, b=None):
            return bias_gelu(t, b, by_tanh)

        assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(call, leaves)
    check_derivatives(lambda z: bias_gelu(z.sin(), bias, by_tanh), lambda z: gelu_reference(z.sin(), bias, by_tanh), x)


def test_refused():
    x = torch.randn(4, 8)
    with pytest.raises(RuntimeError, match="bias must have as many elements as input's last dimension"):
        bias_gelu(x, torch.randn(4), False)
    with pytest.raises(RuntimeError, match="float32, float64, bfloat16 or float16"):
        bias_gelu(x.long(), None, False)
    with pytest.raises(RuntimeError, match="grad_output must have input's shape"):
        gelu_backward(x[:2], x, None, False, False)
