"""What people met with other attentions (reports R01 to R19): each symptom, and its kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

from fastgan.nn import functional as F
from tests.ops.test_attention import SDPA, close_to_float64, tensors


def _exact(query, key, value, mask=None, is_causal=False):
    """softmax in plain operations; a dead row is zero."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    dead = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0) @ value


@pytest.mark.parametrize("kind", ["bool", "bias"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_R01_dead_rows_are_zero_and_so_are_their_gradients(kind, dropout_p):
    inputs = tensors((2, 2), 5, 6, 4, dtype=torch.float32, requires_grad=True)
    query, key, value, ones = inputs
    alive = torch.rand(2, 1, 5, 6) > 0.3
    alive[..., 0] = True
    alive[0, 0, 1] = alive[1, 0, 4] = False
    mask = alive if kind == "bool" else torch.zeros(2, 1, 5, 6).masked_fill(~alive, float("-inf")).requires_grad_()
    output = F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout_p)
    dead = ~alive.any(-1).expand(2, 2, 5)
    wanted = (query, key, value) if kind == "bool" else (query, key, value, mask)
    grads = torch.autograd.grad(output, wanted, ones.detach(), create_graph=True)
    assert not output[dead].any()
    assert not grads[0][dead].any()
    assert all(g.isfinite().all() for g in grads)
    if kind == "bias":
        assert not grads[3][~alive.any(-1)].any()
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), (query, key, value))
    assert all(g.isfinite().all() for g in second)
    if dropout_p == 0:
        torch.testing.assert_close(output, _exact(query, key, value, alive))


def test_R03_nan_in_a_query_row_stays_in_that_row(capability):
    query, key, value, _ = tensors((1, 2), 70, 300, 8, dtype=torch.float32)
    query[0, 1, 3, 2] = float("nan")
    for kwargs in ({}, {"is_causal": True}, {"attn_mask": torch.rand(70, 300) > 0.5}):
        output = F.scaled_dot_product_attention(query, key, value, **kwargs)
        bad = torch.zeros(1, 2, 70, dtype=torch.bool)
        bad[0, 1, 3] = True
        assert output[bad].isnan().all()
        assert output[~bad].isfinite().all()
    # and a NaN mask: an all-NaN row has no maximum either
    bias = torch.zeros(70, 300)
    bias[5] = float("nan")
    output = F.scaled_dot_product_attention(query.nan_to_num(), key, value, bias)
    assert output[:, :, 5].isnan().all()
    assert output[:, :, 6:].isfinite().all()


@pytest.mark.parametrize(("rows", "columns"), [(3, 7), (7, 3), (150, 300), (300, 150)])
@pytest.mark.parametrize("mask", [None, "bool", "bias"])
def test_R05_causal_is_anchored_in_the_upper_left_corner(rows, columns, mask):
    query, key, value, grad_output = tensors((1, 2), rows, columns, 8)
    if mask is not None:
        mask = torch.rand(rows, columns) > 0.3 if mask == "bool" else torch.randn(rows, columns, dtype=torch.float64)
    call = lambda f: lambda *args: f(*args, is_causal=True)
    close_to_float64(call(F.scaled_dot_product_attention), call(_exact), [query, key, value, mask], grad_output)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_R06_every_mask_that_broadcasts(lead, kind):
    query, key, value, grad_output = tensors(lead, 4, 5, 3)
    full = (*lead, 4, 5)
    for rank in sorted({2, len(full)}):
        for ones in range(2**rank):
            shape = [1 if ones >> i & 1 else n for i, n in enumerate(full[-rank:])]
            mask = torch.rand(shape) > 0.4 if kind == "bool" else torch.randn(shape, dtype=torch.float64)
            close_to_float64(F.scaled_dot_product_attention, _exact, [query, key, value, mask], grad_output)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    order=st.permutations([0, 1, 2, 3]),
    pad=st.integers(0, 2),
    step=st.integers(1, 2),
    expand=st.booleans(),
    which=st.integers(0, 15),
    kind=st.sampled_from(["bool", "bias"]),
)
def test_R07_any_strides_give_the_contiguous_result(order, pad, step, expand, which, kind):
    torch.manual_seed(0)
    query, key, value, grad_output = tensors((2, 3), 5, 6, 9, dtype=torch.float32)
    mask = torch.rand(2, 3, 5, 6) > 0.3 if kind == "bool" else torch.randn(2, 3, 5, 6)

    def strided(x):
        memory = x.permute(order)
        inverse = sorted(range(4), key=lambda i: order[i])
        space = torch.zeros([*memory.shape[:-1], (memory.shape[-1] + pad) * step], dtype=x.dtype)
        view = space[..., : memory.shape[-1] * step : step]
        view.copy_(memory)
        return view.permute(inverse)

    chosen = [strided(x) if which >> i & 1 else x for i, x in enumerate((query, key, value, mask))]
    if expand:  # every row the same, without memory of its own
        chosen[3] = chosen[3][:, :1, :1].expand(2, 3, 5, 6)
    results = []
    for args in (chosen, [x.contiguous() for x in chosen]):
        args = [x.detach().requires_grad_() if x.is_floating_point() else x for x in args]
        output = F.scaled_dot_product_attention(*args)
        wanted = [x for x in args if x.requires_grad]
        results.append([output, *torch.autograd.grad(output, wanted, strided(grad_output))])
    torch.testing.assert_close(*results)


def test_R09_only_the_bias_needs_a_gradient():
    query, key, value, grad_output = tensors((2, 2), 150, 140, 4, dtype=torch.float32)
    for shape in ((150, 140), (2, 1, 150, 140), (1, 2, 1, 140), (2, 2, 150, 1), (1, 1, 1, 1)):
        bias = torch.randn(shape, requires_grad=True)
        (ours,) = torch.autograd.grad(F.scaled_dot_product_attention(query, key, value, bias), bias, grad_output)
        exact = bias.detach().double().requires_grad_()
        output = _exact(query.double(), key.double(), value.double(), exact)
        (wanted,) = torch.autograd.grad(output, exact, grad_output.double())
        assert ours.shape == bias.shape
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_causal", [False, True])
def test_R10_gradient_penalty(is_causal):
    query, key, value, _ = tensors((2, 2), 6, 6, 8)
    weight = torch.randn(8, 8, dtype=torch.float64)
    mask = torch.rand(2, 1, 6, 6) > 0.3
    mask[0, 0, 2] = False

    def penalty(f, dtype):
        x, w = query.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        output = f(x @ w, key.to(dtype) @ w, value.to(dtype), mask, is_causal=is_causal)
        (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        return torch.autograd.grad((gradient.flatten(1).norm(dim=1) - 1).square().mean(), w)[0]

    exact = penalty(_exact, torch.float64)
    torch.testing.assert_close(penalty(F.scaled_dot_product_attention, torch.float64), exact)
    torch.testing.assert_close(
        penalty(F.scaled_dot_product_attention, torch.float32).double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max()
    )


def test_R12_compiled_and_differentiated_twice_is_right_or_refused():
    query, key, value, _ = tensors((1, 2), 3, 3, 4)
    loss = lambda f: lambda q: f(q, key, value).square().sum()
    twice = lambda f: grad(lambda q: grad(loss(f))(q).square().sum())
    compiled = torch.compile(twice(F.scaled_dot_product_attention), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query), twice(_exact)(query))
    x = query.clone().requires_grad_()
    once = torch.compile(loss(F.scaled_dot_product_attention), fullgraph=True, backend="aot_eager")
    (first,) = torch.autograd.grad(once(x), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.square().sum(), x)


@pytest.mark.parametrize("lead", [(4, 2), (4,)], ids=str)
@pytest.mark.parametrize("masks", ["none", "bias", "dropout"])
def test_R13_per_example_gradients(lead, masks):
    query, key, value, _ = tensors((*lead[1:],), 3, 5, 4)
    queries = torch.randn(lead[0], *query.shape, dtype=torch.float64)
    bias = torch.randn(3, 5, dtype=torch.float64)

    def loss(q, k, b):
        if masks == "dropout":
            return F.scaled_dot_product_attention(q, k, value, dropout_p=0.5).square().sum()
        return F.scaled_dot_product_attention(q, k, value, b if masks == "bias" else None).square().sum()

    function = grad(loss, argnums=(0, 1, 2))
    torch.manual_seed(3)
    if masks == "dropout":  # the same mask for all, as the loop below draws
        mapped = vmap(function, in_dims=(0, None, None), randomness="same")(queries, key, bias)
    else:
        mapped = vmap(function, in_dims=(0, None, None))(queries, key, bias)
    single = []
    for q in queries:
        torch.manual_seed(3)
        single.append(function(q, key, bias))
    for ours, wanted in zip(mapped, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(wanted))


@pytest.mark.parametrize("reentrant", [False, True])
def test_R14_checkpoint_draws_the_same_dropout_again(reentrant):
    query, key, value, grad_output = tensors((1, 2), 20, 20, 4, requires_grad=True)
    function = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    results = []
    for run in (function, lambda *args: checkpoint(function, *args, use_reentrant=reentrant)):
        torch.manual_seed(11)
        for x in (query, key, value):
            x.grad = None
        run(query, key, value).backward(grad_output.detach())
        results.append([x.grad.clone() for x in (query, key, value)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("batch", "heads", "rows", "columns", "width", "value_width"),
    [
        (0, 2, 3, 4, 5, 6),
        (2, 0, 3, 4, 5, 6),
        (2, 2, 0, 4, 5, 6),
        (2, 2, 3, 0, 5, 6),
        (2, 2, 3, 4, 0, 6),
        (2, 2, 3, 4, 5, 0),
    ],
)
@pytest.mark.parametrize("masks", ["none", "bias", "causal"])
def test_R16_empty_in_every_dimension(batch, heads, rows, columns, width, value_width, masks):
    inputs = tensors((batch, heads), rows, columns, width, value_width, torch.float32, requires_grad=True)
    query, key, value, grad_output = inputs
    bias = torch.randn(rows, columns, requires_grad=True) if masks == "bias" else None
    wanted = [x for x in (query, key, value, bias) if x is not None]
    output = F.scaled_dot_product_attention(query, key, value, bias, is_causal=masks == "causal")
    expected = SDPA(query, key, value, bias, is_causal=masks == "causal")
    torch.testing.assert_close(output, expected)
    grads = torch.autograd.grad(output, wanted, grad_output.detach())
    for x, g in zip(wanted, grads, strict=True):
        assert g.shape == x.shape
        assert g.isfinite().all()
    if rows == 0 or columns == 0:
        assert not any(g.any() for g in grads)


def test_R18_packed_sequences_equal_the_sequences_alone():
    query, key, value, _ = tensors((1, 2), 40, 40, 16, dtype=torch.bfloat16)
    bounds = [(0, 11), (11, 20), (20, 37)]  # three rows belong to no sequence
    mask = torch.zeros(40, 40, dtype=torch.bool)
    for begin, end in bounds:
        mask[begin:end, begin:end] = True
    packed = F.scaled_dot_product_attention(query, key, value, mask)
    for begin, end in bounds:
        alone = F.scaled_dot_product_attention(*(x[:, :, begin:end] for x in (query, key, value)))
        torch.testing.assert_close(packed[:, :, begin:end], alone, rtol=1e-2, atol=1e-2)
    assert not packed[:, :, 37:].any()


@pytest.mark.parametrize(("heads", "key_heads", "value_heads"), [(4, 1, 1), (4, 2, 2), (4, 2, 1), (4, 1, 4), (6, 3, 2)])
def test_R19_shared_key_heads(heads, key_heads, value_heads):
    query, key, value, grad_output = tensors((2, heads), 70, 150, 8, dtype=torch.float32)
    inputs = [query, key[:, :key_heads], value[:, :value_heads], None]
    call = lambda f: lambda *args: f(*args, enable_gqa=True)
    close_to_float64(call(F.scaled_dot_product_attention), call(SDPA), inputs, grad_output)
    if key_heads == value_heads == 1:  # and without being asked for, as broadcasting
        close_to_float64(F.scaled_dot_product_attention, SDPA, inputs, grad_output)
    elif heads not in (key_heads, value_heads) or 1 not in (key_heads, value_heads):
        with pytest.raises(RuntimeError, match="enable_gqa"):
            F.scaled_dot_product_attention(*inputs)
