"""Dropout, residual and layer norm as one operator, against float64, its reference, and the operations one by one."""

import pytest
import torch

from fastgan.ops.dropout import dropout_reference
from fastgan.ops.layer_norm import (
    dropout_add_layer_norm,
    layer_norm_backward,
    layer_norm_backward_reference,
    layer_norm_reference,
)
from tests.derivatives import check_derivatives

PHILOX = torch.tensor([1234567890123456789, -77])
EPS = 1e-5


def inputs(shape, dtype=torch.float32, mean=0.0, seed=0):
    draws = torch.Generator().manual_seed(seed)
    x, r = (torch.randn(*shape, generator=draws, dtype=torch.float64) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=draws, dtype=torch.float64) for _ in range(2))
    parameters = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    return x.to(dtype), (r + mean).to(dtype), weight.to(parameters), bias.to(parameters)


def wide(tensors):
    return [each.double() for each in tensors]


SHAPES = [(1, 1), (3, 2), (5, 7), (4, 16), (2, 3, 33), (130, 768), (33, 1025), (2, 3000), (40,)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("drops", [False, True])
def test_float32_against_float64(capability, shape, drops):
    given = inputs(shape)
    philox, p = (PHILOX, 0.3) if drops else (None, 0.0)
    found = dropout_add_layer_norm(*given, philox, p, EPS)
    exact = layer_norm_reference(*wide(given), philox, p, EPS)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=3e-7, atol=3e-7)
    scale = exact[0].abs().max()
    if shape[-1] > 2:  # of one or two numbers the variance may be of the size of eps, or of a rounding
        assert (found[0].double() - exact[0]).abs().max() < 2e-6 * scale
        torch.testing.assert_close(found[3], exact[3], rtol=2e-6, atol=0)
    torch.testing.assert_close(found[2], exact[2], rtol=0, atol=3e-7)
    grads = [torch.randn_like(given[0]) for _ in range(2)]
    sums = found[1:]
    for more in (None, grads[1]):
        got = layer_norm_backward(grads[0], more, *sums, given[2], philox, p, EPS, True)
        want = layer_norm_backward_reference(
            grads[0].double(), None if more is None else more.double(), *wide(sums), given[2].double(), philox, p, EPS,
            True,
        )  # fmt: skip
        for one, other, name in zip(got, want, ("residual", "input", "weight", "bias"), strict=True):
            assert one.shape == other.shape, name
            if one.numel() and shape[-1] > 2:
                assert (one.double() - other).abs().max() < 1e-5 * other.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_other_types(capability, dtype):
    given = inputs((37, 200), dtype)
    found = dropout_add_layer_norm(*given, PHILOX, 0.25, EPS)
    expected = layer_norm_reference(*given, PHILOX, 0.25, EPS)
    assert torch.equal(found[1], expected[1])
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    grads = torch.randn(37, 200).to(dtype)
    got = layer_norm_backward(grads, grads, *found[1:], given[2], PHILOX, 0.25, EPS, True)
    want = layer_norm_backward_reference(grads, grads, *found[1:], given[2], PHILOX, 0.25, EPS, True)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=20 * tolerance)


def test_what_is_dropped_is_what_dropout_drops(capability):
    for shape in ((7, 1023), (3, 5), (9, 2050)):  # rows that begin within a counter's four words, and long ones
        x, _, weight, bias = inputs(shape)
        _, sum, _, _ = dropout_add_layer_norm(x, torch.zeros(shape), weight, bias, PHILOX, 0.4, EPS)
        assert torch.equal(sum, dropout_reference(x, PHILOX, 0.4))
        grad = torch.randn(shape)
        statistics = sum.double().mean(-1), torch.ones(shape[:-1], dtype=torch.float64)
        residual, input, _, _ = layer_norm_backward(grad, None, sum, *statistics, weight, PHILOX, 0.4, EPS, False)
        assert torch.equal(input, dropout_reference(residual, PHILOX, 0.4))


def test_a_large_mean_costs_nothing(capability):
    given = inputs((50, 768), mean=1e4)
    found = dropout_add_layer_norm(*given, None, 0.0, EPS)
    exact = layer_norm_reference(*wide(given)[:1], *wide(given)[1:], None, 0.0, EPS)
    stored = layer_norm_reference(found[1].double() * 0, found[1].double(), *wide(given)[2:], None, 0.0, EPS)
    # The sum itself is rounded at 1e4; the norm of what is stored is as exact as without a mean.
    assert (found[0].double() - stored[0]).abs().max() < 3e-6
    assert (found[0].double() - exact[0]).abs().max() < 1e-2
    torchs = torch.nn.functional.layer_norm(found[1], (768,), *given[2:], EPS)
    ours, theirs = ((each.double() - stored[0]).abs().max() for each in (found[0], torchs))
    assert ours <= theirs
    grad = torch.randn(50, 768)
    got = layer_norm_backward(grad, None, *found[1:], given[2], None, 0.0, EPS, True)
    want = layer_norm_backward_reference(grad.double(), None, *wide(found[1:]), given[2].double(), None, 0.0, EPS, True)
    for one, other in zip(got, want, strict=True):
        if one.numel():
            assert (one.double() - other).abs().max() < 1e-5 * other.abs().max()


def test_rows_without_variance_and_what_is_not_finite(capability):
    _, _, weight, bias = inputs((1, 64))
    x = torch.zeros(4, 64)
    x[1] = 7.0
    x[2, 5] = float("nan")
    x[3, 9] = float("inf")
    output = dropout_add_layer_norm(x, torch.zeros_like(x), weight, bias, None, 0.0, EPS)[0]
    assert torch.equal(output[:2], bias.expand(2, 64))
    assert output[2].isnan().all()
    assert output[3].isnan().all()


def test_the_same_bits_for_every_number_of_threads_and_every_stride():
    given = inputs((333, 260))
    threads = torch.get_num_threads()

    def everything():
        found = dropout_add_layer_norm(*given, PHILOX, 0.1, EPS)
        return [*found, *layer_norm_backward(found[0], found[1], *found[1:], given[2], PHILOX, 0.1, EPS, True)]

    whole = everything()
    try:
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(everything(), whole, strict=True))
    finally:
        torch.set_num_threads(threads)
    x, r, weight, bias = given
    spread = x.t().contiguous().t(), r.repeat(1, 2)[:, :260], weight.repeat_interleave(2)[::2], bias
    found = dropout_add_layer_norm(*spread, PHILOX, 0.1, EPS)
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=False))


def test_empty():
    x, r, weight, bias = inputs((0, 8))
    found = dropout_add_layer_norm(x, r, weight, bias, None, 0.0, EPS)
    assert [each.shape for each in found] == [(0, 8), (0, 8), (0,), (0,)]
    got = layer_norm_backward(x, None, *found[1:], weight, None, 0.0, EPS, True)
    assert torch.equal(got[2], torch.zeros(8))
    assert torch.equal(got[3], torch.zeros(8))


@pytest.mark.parametrize("philox", [None, PHILOX])
def test_derivatives(philox):
    p = 0.0 if philox is None else 0.4
    given = inputs((2, 3, 5), torch.float64)
    leaves = [each.clone().requires_grad_() for each in given]
    torch.library.opcheck(dropout_add_layer_norm, (*leaves, philox, p, EPS))
    sums = [each.detach() for each in dropout_add_layer_norm(*leaves, philox, p, EPS)[1:]]
    grad = torch.randn(2, 3, 5, dtype=torch.float64)
    torch.library.opcheck(layer_norm_backward, (grad, grad, *sums, given[2], philox, p, EPS, True))

    def both(*tensors):
        return dropout_add_layer_norm(*tensors, philox, p, EPS)[:2]

    assert torch.autograd.gradcheck(both, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(both, leaves)
    one = [leaf if number == 1 else leaf.detach() for number, leaf in enumerate(leaves)]
    assert torch.autograd.gradcheck(lambda *tensors: both(*tensors)[1], one)  # sum's gradient alone
    x = given[0]
    check_derivatives(
        lambda z: dropout_add_layer_norm(z.sin(), z, given[2], given[3], philox, p, EPS)[0],
        lambda z: layer_norm_reference(z.sin(), z, given[2], given[3], philox, p, EPS)[0],
        x,
    )


def test_refused():
    x, r, weight, bias = inputs((4, 8))
    for args, words in (
        ((x, r[:2], weight, bias, None, 0.0, EPS), "residual must have input's shape, dtype and device"),
        ((x, r, weight[:4], bias, None, 0.0, EPS), "weight must have 8 elements"),
        ((x, r, weight, bias, PHILOX, 1.0, EPS), "p must be at least 0 and less than 1, got 1"),
        ((x, r, weight, bias, PHILOX[:1], 0.1, EPS), "philox must be int64"),
        ((x.long(), r.long(), weight, bias, None, 0.0, EPS), "float32, float64, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=words):
            dropout_add_layer_norm(*args)
