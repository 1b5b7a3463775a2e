"""The linear layer on few rows, against float64 and torch's own, and in every derivative."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastgan.ops.linear import MOST_ROWS, few_rows, linear, linear_reference
from tests.derivatives import check_derivatives

SIZES = [(1, 768, 96), (2, 5, 7), (3, 1, 1), (5, 801, 67), (8, 64, 300), (9, 17, 130), (17, 1600, 129), (32, 63, 515)]


def tensors(rows, depth, outputs, by_depth, dtype=torch.float32, bias=True):
    torch.manual_seed(rows * depth + outputs)
    shape = (depth, outputs) if by_depth else (outputs, depth)
    return (
        torch.randn(rows, depth, dtype=dtype),
        torch.randn(shape, dtype=dtype),
        torch.randn(outputs, dtype=dtype) if bias else None,
        by_depth,
    )


def in_double(arguments):
    return linear_reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in arguments))


@pytest.mark.parametrize("by_depth", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_linear_is_as_right_as_torch(capability, size, by_depth):
    arguments = tensors(*size, by_depth, bias=size[0] != 3)
    exact, scale = in_double(arguments), size[1] ** 0.5
    torch_error = (linear_reference(*arguments).double() - exact).abs().max().item()
    error = (linear(*arguments).double() - exact).abs().max().item()
    assert error <= 2 * torch_error + scale * 4e-7


@pytest.mark.parametrize("by_depth", [False, True])
def test_linear_in_float64(capability, by_depth):
    arguments = tensors(7, 83, 29, by_depth, torch.float64)
    np.testing.assert_allclose(linear(*arguments), linear_reference(*arguments), rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("by_depth", [False, True])
def test_a_rows_result_does_not_depend_on_the_others_or_on_threads(capability, by_depth):
    x, weight, bias, _ = tensors(MOST_ROWS, 1001, 777, by_depth)
    whole = linear(x, weight, bias, by_depth)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for rows in range(1, MOST_ROWS):
            assert torch.equal(linear(x[-rows:], weight, bias, by_depth), whole[-rows:]), rows
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("by_depth", [False, True])
def test_strides_empties_and_infinities(by_depth):
    x, weight, bias, _ = tensors(4, 96, 65, by_depth)
    strided = torch.empty(4, 192)[:, ::2].copy_(x)
    wide = torch.empty(weight.shape[0], weight.shape[1] + 9)[:, : weight.shape[1]].copy_(weight)
    whole = linear(x, weight, bias, by_depth)
    assert torch.equal(linear(strided, wide, bias.repeat(2)[::2].copy_(bias), by_depth), whole)
    assert torch.equal(linear(x, weight.t().contiguous().t(), bias, by_depth), whole)
    assert torch.equal(linear(x.reshape(2, 2, 96), weight, bias, by_depth), whole.reshape(2, 2, -1))
    assert torch.equal(linear(x[0], weight, bias, by_depth), whole[0])
    assert linear(x[:0], weight, bias, by_depth).shape == (0, 65)
    no_depth = weight[:0] if by_depth else weight[:, :0]
    assert torch.equal(linear(x[:, :0], no_depth, bias, by_depth), bias.expand(4, -1))
    for value in (float("inf"), float("nan")):
        for place in (0, 95):
            odd = x.clone()
            odd[1, place] = value
            got, expected = linear(odd, weight, bias, by_depth), linear_reference(odd, weight, bias, by_depth)
            torch.testing.assert_close(got, expected, equal_nan=True, atol=1e-4, rtol=1e-4)
    big = weight.clone()
    big[0, 0] = float("inf")
    got = linear(x[:, :90], big[:90] if by_depth else big[:, :90], bias, by_depth)
    expected = linear_reference(x[:, :90], big[:90] if by_depth else big[:, :90], bias, by_depth)
    torch.testing.assert_close(got, expected, equal_nan=True, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("by_depth", [False, True])
def test_derivatives(by_depth):
    x, weight, bias, _ = tensors(3, 5, 4, by_depth, torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(linear, (x, weight, bias, by_depth))
    torch.library.opcheck(linear, (x.detach(), weight.detach(), None, by_depth))
    assert torch.autograd.gradcheck(lambda *t: linear(*t, by_depth), leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *t: linear(*t, by_depth), leaves)
    weight = weight.detach()

    def function(z):
        return linear(z, weight, None, by_depth)

    check_derivatives(function, lambda z: linear_reference(z, weight, None, by_depth), x.detach())


def test_refused():
    x, weight, bias, _ = tensors(4, 96, 65, False)
    with pytest.raises(RuntimeError, match="at most 32 rows, got 36"):
        linear(x.repeat(9, 1), weight, bias, False)
    with pytest.raises(RuntimeError, match="must fit input's last size 96"):
        linear(x, weight, bias, True)
    with pytest.raises(RuntimeError, match="both be float32 or both float64"):
        linear(x.half(), weight.half(), None, False)
    with pytest.raises(RuntimeError, match="bias must have"):
        linear(x, weight, bias[:-1], False)


@pytest.mark.kernel
def test_few_rows_is_for_large_weights_without_gradients():
    x, weight = torch.randn(4, 512), torch.randn(256, 512)
    assert few_rows(x, weight, None, False) is not None
    assert few_rows(x, weight.clone().requires_grad_(), None, False) is None
    with torch.no_grad():
        assert few_rows(x, weight.clone().requires_grad_(), None, False) is not None
    for others in (
        (x.double(), weight.double()),
        (x.repeat(9, 1), weight),
        (x[:, :8], weight[:, :8]),
        (x[:0], weight),
        (x[:, :100], weight),
        (x.to("meta"), weight.to("meta")),
        (x, weight.to_sparse()),
    ):
        assert few_rows(*others, None, False) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert few_rows(x, weight, None, False) is None
    seen = []
    torch.func.vmap(lambda row: seen.append(few_rows(row, weight, None, False)) or F.linear(row, weight))(x)
    assert seen == [None]
