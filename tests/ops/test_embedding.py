"""The table's gradient against torch's: values, every derivative, strides, empties, and where its memory comes from."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fastgan
from fastgan.nn import functional
from fastgan.ops import embedding as ops
from fastgan.ops._output import new_output
from tests.derivatives import check_derivatives

V, D = 13, 5
LARGE = (2**10, 2**8)  # 1 MB of float32


def tokens(*shape, rows=V):
    indices = torch.randint(0, rows, shape or (2, 6))
    indices.view(-1)[:2] = 3  # twice at least
    return indices


@pytest.mark.parametrize("padding", [ops.NO_PADDING, 3, 0])
def test_both_operators_equal_torch_in_float64(padding):
    weight, indices = torch.randn(V, D, dtype=torch.float64, requires_grad=True), tokens()
    grad = torch.randn(2, 6, D, dtype=torch.float64)
    output = ops.embedding(weight, indices, padding)
    expected = F.embedding(indices, weight, None if padding < 0 else padding)
    assert torch.equal(output, expected)
    (wanted,) = torch.autograd.grad(expected, weight, grad)
    (got,) = torch.autograd.grad(output, weight, grad)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(ops.embedding_backward(grad, indices, V, padding), wanted)
    torch.testing.assert_close(ops.embedding_backward_reference(grad, indices, V, padding), wanted)
    if padding >= 0:
        assert not got[padding].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_of_other_types_is_torchs(dtype):
    """A word that comes a hundred times: both are judged from float64."""
    indices = torch.randint(0, 2, (200,))
    grad = torch.randn(200, D, dtype=torch.float64)
    exact = ops.embedding_backward_reference(grad, indices, V, -1)
    got = ops.embedding_backward(grad.to(dtype), indices, V, -1)
    theirs = torch.ops.aten.embedding_dense_backward(grad.to(dtype), indices, V, -1, False)
    assert got.dtype == dtype
    error, bound = (got.double() - exact).abs().max(), (theirs.double() - exact).abs().max()
    assert error <= 1.5 * bound + torch.finfo(dtype).eps


@pytest.mark.parametrize("padding", [-1, 3])
def test_opcheck(padding):
    weight = torch.randn(V, D, requires_grad=True)
    torch.library.opcheck(ops.embedding, (weight, tokens(), padding))
    grad = torch.randn(2, 6, D, requires_grad=True)
    torch.library.opcheck(ops.embedding_backward, (grad, tokens(), V, padding))


@pytest.mark.parametrize("padding", [-1, 3])
def test_gradcheck_and_gradgradcheck(padding):
    indices = tokens()
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    options = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    grad = torch.randn(2, 6, D, dtype=torch.float64, requires_grad=True)

    def backward(grad):
        return ops.embedding_backward(grad, indices, V, padding)

    assert torch.autograd.gradcheck(backward, grad, **options)
    assert torch.autograd.gradgradcheck(backward, grad)
    if padding < 0:  # torch's own forward mode knows nothing of padding, which numbers see
        assert torch.autograd.gradcheck(lambda w: ops.embedding(w, indices, padding), weight, **options)
        assert torch.autograd.gradgradcheck(lambda w: ops.embedding(w, indices, padding).square(), weight)


@pytest.mark.parametrize("padding", [-1, 3])
def test_every_kind_of_derivative(padding):
    indices, weight = tokens(), torch.randn(V, D, dtype=torch.float64)
    check_derivatives(
        lambda w: ops.embedding(w, indices, padding).sin(),
        lambda w: F.embedding(indices, w, None if padding < 0 else padding).sin(),
        weight,
    )
    check_derivatives(
        lambda g: ops.embedding_backward(g, indices, V, padding).sin(),
        lambda g: ops.embedding_backward_reference(g, indices, V, padding).sin(),
        torch.randn(2, 6, D, dtype=torch.float64),
    )


def test_R07_any_strides_give_the_contiguous_result():
    weight, indices, grad = torch.randn(V, D), tokens(2, 6), torch.randn(2, 6, D)
    expected = ops.embedding_backward(grad, indices, V, -1)
    views = [
        (grad.transpose(0, 1).contiguous().transpose(0, 1), indices),
        (torch.stack([grad, grad], -1)[..., 1], indices.t().contiguous().t()),
        (grad, indices.int()),
    ]
    for changed, numbers in views:
        assert torch.equal(ops.embedding_backward(changed, numbers, V, -1), expected)
        assert torch.equal(ops.embedding(weight.t().contiguous().t(), numbers, -1), weight[indices])
    one = torch.randn(D).expand(2, 6, D)  # what .sum().backward() hands over is of stride 0
    torch.testing.assert_close(
        ops.embedding_backward(one, indices, V, -1), ops.embedding_backward(one.contiguous(), indices, V, -1)
    )


@pytest.mark.parametrize(
    ("rows", "width", "shape"), [(V, D, (0,)), (V, D, (2, 0)), (0, D, (0,)), (V, 0, (2, 3)), (V, D, ())]
)
def test_R16_empty_in_every_dimension_and_a_single_number(rows, width, shape):
    weight, indices = torch.randn(rows, width, requires_grad=True), torch.zeros(shape, dtype=torch.long)
    output = ops.embedding(weight, indices, -1)
    assert output.shape == (*shape, width)
    output.sum().backward()
    expected = torch.zeros(rows, width)
    if rows:
        expected[0] = indices.numel()
    assert torch.equal(weight.grad, expected)


def test_a_number_outside_of_the_table_is_an_index_error():
    for number in (V, -1):
        with pytest.raises(IndexError, match="out of range"):
            ops.embedding(torch.randn(V, D), torch.tensor([0, number]), -1)


def test_a_nan_stays_in_its_row():
    grad = torch.randn(3, D)
    grad[1, 2] = float("nan")
    got = ops.embedding_backward(grad, torch.tensor([4, 5, 3]), V, 4)
    assert got.isnan().nonzero().tolist() == [[5, 2]]
    grad[0] = float("nan")  # of the padding: it has no gradient, and none that is no number either
    assert not ops.embedding_backward(grad, torch.tensor([4, 5, 3]), V, 4)[4].any()


# ---- the public function ----


def large(dtype=torch.float32):
    weight = torch.randn(*LARGE).to(dtype).requires_grad_()
    return weight, tokens(4, 16, rows=LARGE[0])


def counted(monkeypatch):
    calls, real = [], ops.embedding
    monkeypatch.setattr(ops, "embedding", lambda *args: calls.append(args) or real(*args))
    return calls


@pytest.mark.parametrize("padding", [None, 3, -1])
def test_a_large_table_takes_it_and_equals_torch(monkeypatch, padding):
    calls = counted(monkeypatch)
    weight, indices = large()
    grad = torch.randn(4, 16, LARGE[1])
    (got,) = torch.autograd.grad(functional.embedding(indices, weight, padding), weight, grad)
    (expected,) = torch.autograd.grad(F.embedding(indices, weight, padding), weight, grad)
    assert len(calls) == (not fastgan._impl.reference_selected())
    torch.testing.assert_close(got, expected)
    monkeypatch.undo()
    compiled = torch.compile(lambda w: functional.embedding(indices, w, padding), backend="aot_eager", fullgraph=True)
    (got,) = torch.autograd.grad(compiled(weight), weight, grad)
    torch.testing.assert_close(got, expected)


def test_where_it_does_not_pay_it_is_torchs(monkeypatch):
    calls = counted(monkeypatch)
    weight, indices = large()
    functional.embedding(indices, weight.detach())
    with torch.no_grad():
        functional.embedding(indices, weight)
    functional.embedding(tokens(), torch.randn(V, D, requires_grad=True))
    for options in ({"sparse": True}, {"scale_grad_by_freq": True}):
        got, expected = (
            torch.autograd.grad(f(indices, weight, **options).sum(), weight)[0]
            for f in (functional.embedding, F.embedding)
        )
        assert got.is_sparse == expected.is_sparse
        torch.testing.assert_close(got.to_dense(), expected.to_dense())
    twin = weight.detach().clone()
    got = functional.embedding(indices, weight.detach(), None, 0.5)
    torch.testing.assert_close(got, F.embedding(indices, twin, None, 0.5))
    with fastgan.use("reference"):
        functional.embedding(indices, weight)
    assert not calls


@pytest.mark.kernel
def test_the_gradient_lies_in_kept_memory_and_goes_back_to_it():
    from fastgan import _C

    fastgan.empty_cache()
    if new_output(torch.empty(0), (2**20,)) is None or _C.pool_state()[1] == 0:
        pytest.skip("this torch is older than the pool")
    weight, indices = large()
    before = _C.pool_state()[0]
    functional.embedding(indices, weight).sum().backward()
    assert _C.pool_state()[0] >= before + 2**20
    pointer = weight.grad.data_ptr()
    weight.grad = None
    assert _C.pool_state()[0] == before
    functional.embedding(indices, weight).sum().backward()
    assert weight.grad.data_ptr() == pointer


def test_R45_nothing_is_alive_after_a_second_backward():
    import gc
    import weakref

    weight, indices = large(torch.float64)
    gc.collect()
    gc.disable()
    try:
        output = functional.embedding(indices, weight).square().sum()
        (gradient,) = torch.autograd.grad(output, weight, create_graph=True)
        gradient.square().sum().backward()
        alive = weakref.ref(gradient)
        del output, gradient
        assert alive() is None
    finally:
        gc.enable()


def test_what_cannot_be_is_refused():
    weight, indices = large()
    with pytest.raises(TypeError, match="input must be a Tensor, got list"):
        functional.embedding([1], weight)
    with pytest.raises(TypeError, match="weight must be a Tensor, got NoneType"):
        functional.embedding(indices, None)
    with pytest.raises(IndexError):
        functional.embedding(indices + LARGE[0], weight)
    with pytest.raises(RuntimeError):
        functional.embedding(indices.float(), weight)
    for padding in (LARGE[0], -LARGE[0] - 1):
        with pytest.raises(AssertionError):
            functional.embedding(indices, weight, padding)
