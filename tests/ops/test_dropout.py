"""Dropout against its reference, bit for bit, in its statistics and in every derivative."""

import weakref

import pytest
import torch

from fastgan.ops.dropout import dropout, dropout_reference
from tests.derivatives import check_derivatives

PHILOX = torch.tensor([1234567890123456789, -77])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_references_bits(capability, dtype):
    for count in (0, 1, 3, 4, 1023, 1025, 40_001):
        x = torch.randn(count).to(dtype)
        for p in (0.0, 0.1, 0.75, 0.999):
            assert torch.equal(dropout(x, PHILOX, p), dropout_reference(x, PHILOX, p)), (count, p)


def test_the_same_bits_for_every_number_of_threads_and_every_stride():
    x = torch.randn(130, 517)
    threads, whole = torch.get_num_threads(), dropout(x, PHILOX, 0.3)
    try:
        torch.set_num_threads(1)
        assert torch.equal(dropout(x, PHILOX, 0.3), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(dropout(x.t().contiguous().t(), PHILOX, 0.3), whole)
    assert torch.equal(dropout(x.reshape(-1), PHILOX.repeat(2)[:2], 0.3), whole.reshape(-1))


def test_statistics():
    count, p = 1 << 20, 0.1
    kept = dropout(torch.ones(count), PHILOX, p) != 0
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
    other = dropout(torch.ones(count), torch.tensor([1234567890123456790, -77]), p) != 0
    for a, b in ((kept[1:], kept[:-1]), (kept[4:], kept[:-4]), (kept[1024:], kept[:-1024]), (kept, other)):
        both = (a & b).double().mean().item()
        assert abs(both - (1 - p) ** 2) < 5 * 0.4 / len(a) ** 0.5  # independent of each other


def test_what_is_not_finite_is_dropped_too():
    x = torch.full((4096,), float("nan"))
    y = dropout(x, PHILOX, 0.5)
    assert torch.equal(y.isnan(), dropout(torch.ones(4096), PHILOX, 0.5) != 0)
    assert (y[~y.isnan()] == 0).all()


def test_derivatives():
    x = torch.randn(3, 7, dtype=torch.float64)
    torch.library.opcheck(dropout, (x.clone().requires_grad_(), PHILOX, 0.4))
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: dropout(t, PHILOX, 0.4), leaf, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda t: dropout(t, PHILOX, 0.4), leaf)
    check_derivatives(lambda z: dropout(z.sin(), PHILOX, 0.4), lambda z: dropout_reference(z.sin(), PHILOX, 0.4), x)


def test_the_backward_keeps_no_input():
    x = torch.randn(64, requires_grad=True)
    product = x * 2
    gone = weakref.ref(product)
    y = dropout(product, PHILOX, 0.4)
    del product
    assert gone() is None
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * dropout(torch.ones(64), PHILOX, 0.4))


def test_refused():
    x = torch.randn(8)
    with pytest.raises(RuntimeError, match="p must be at least 0 and less than 1, got 1"):
        dropout(x, PHILOX, 1.0)
    with pytest.raises(RuntimeError, match="philox must be int64"):
        dropout(x, PHILOX[:1], 0.1)
    with pytest.raises(RuntimeError, match="float32, float64, bfloat16 or float16"):
        dropout(x.long(), PHILOX, 0.1)
