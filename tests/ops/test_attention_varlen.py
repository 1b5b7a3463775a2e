"""Attention over packed sequences: each sequence's own mathematics, the padded batch's bits, its derivatives."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch.func import vmap

import fastgan
from fastgan.nn import functional as F
from fastgan.ops import attention_varlen as ops
from tests.derivatives import check_derivatives
from tests.ops.test_attention import SDPA, close_to_float64

varlen = torch.ops.fastgan
# Short and long beside each other, none at all, no keys, no rows, fewer rows than keys and more.
# FEW are so few that the gradients of the longest have their keys in parts.
FEW = ((3, 7), (110, 290), (5, 0), (0, 6), (9, 4))
LENGTHS = ((3, 7), (0, 0), (200, 300), (1, 40), (5, 0), (0, 6), (50, 50), (9, 4))


def offsets(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def packed(lengths, heads=2, kv_heads=2, width=8, value_width=None, dtype=torch.float64, requires_grad=False):
    """query, key, value, grad_output; and what says where the sequences are."""
    rows, columns = (sum(x) for x in zip(*lengths, strict=True))
    value_width = width if value_width is None else value_width
    shapes = (rows, heads, width), (columns, kv_heads, width), (columns, kv_heads, value_width)
    tensors = [torch.randn(s, dtype=torch.float64) for s in (*shapes, (rows, heads, value_width))]
    where = [offsets([x[i] for x in lengths]) for i in (0, 1)] + [max(x[i] for x in lengths) for i in (0, 1)]
    return [t.to(dtype).requires_grad_(requires_grad) for t in tensors], where


def one_by_one(lengths, is_causal):
    """Plain PyTorch on each sequence, with a mask where it is causal: from the lower right corner."""

    def function(query, key, value):
        out, row, column = [], 0, 0
        for rows, columns in lengths:
            q = query[row : row + rows].transpose(0, 1)
            k, v = (t[column : column + columns].transpose(0, 1) for t in (key, value))
            mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
            if columns == 0:
                out.append(query.new_zeros(rows, query.shape[1], value.shape[2]))
            else:
                out.append(SDPA(q, k, v, mask if is_causal else None, enable_gqa=True).transpose(0, 1))
            row, column = row + rows, column + columns
        return torch.cat(out)

    return function


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_distance_to_float64(capability, dtype, is_causal):
    (query, key, value, grad), where = packed(LENGTHS, 4, 2, 12, 20, dtype)
    ours = lambda *args: F.varlen_attention(*args, *where, enable_gqa=True, is_causal=is_causal)
    close_to_float64(ours, one_by_one(LENGTHS, is_causal), [query, key, value], grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "kv_heads"), [(3, 1), (9, 2)])  # with the keys in parts, and in one
def test_bits_of_the_batched_call(dtype, batch, kv_heads):
    """Dropout's too, and those of every derivative."""
    rows, heads, philox = 270, 2, torch.tensor([-5, 2**33 + 9])
    (query, key, value, grad), where = packed([(rows, rows)] * batch, heads, kv_heads, 8, 5, dtype)
    tangents = [torch.randn_like(t) for t in (query, key, value)]
    numbers = (0.3, True, 0.4)

    def batched(t):
        return t.unflatten(0, (batch, rows)).transpose(1, 2)

    def same(of_packed, of_batch):
        for ours, theirs in zip(of_packed, of_batch, strict=False):
            assert torch.equal(batched(ours), theirs)

    q, k, v, g, *along = (batched(t) for t in (query, key, value, grad, *tangents))
    masks = (None, None, philox)
    output, logsumexp = varlen.attention(q, k, v, *masks, *numbers)
    inputs = (query, key, value, *where[:2], philox)
    ours, ours_logsumexp = varlen.varlen_attention(*inputs, *where[2:], *numbers)
    same([ours], [output])
    assert torch.equal(ours_logsumexp, logsumexp.transpose(0, 1).flatten(1))
    saved, theirs = (ours, ours_logsumexp), (output, logsumexp)
    same(
        varlen.varlen_attention_backward(grad, *inputs, *saved, *where[2:], *numbers),
        varlen.attention_backward(g, q, k, v, *masks, *theirs, *numbers, False),
    )
    same(
        [varlen.varlen_attention_jvp(*inputs, *saved, *tangents, *where[2:], *numbers)],
        [varlen.attention_jvp(q, k, v, *masks, *theirs, *along, None, *numbers)],
    )
    same(
        varlen.varlen_attention_double_backward(grad, *inputs, *saved, *tangents, *where[2:], *numbers),
        varlen.attention_double_backward(g, q, k, v, *masks, *theirs, *along, None, *numbers, False),
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("absent", [None, 0, 1, 2])
def test_kernels_equal_the_references(is_causal, absent):
    """All four, with dropout; a direction that lacks one of its tangents."""
    philox = torch.tensor([5, 6])
    (query, key, value, grad), where = packed(FEW, 2, 1, 7, 3)
    tangents = [None if i == absent else torch.randn_like(t) for i, t in enumerate((query, key, value))]
    rest = (*where[2:], 0.25, is_causal, 0.6)
    inputs = (query, key, value, *where[:2], philox)
    output, logsumexp = varlen.varlen_attention(*inputs, *rest)
    saved = (output, logsumexp)
    close = lambda *results: torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)
    close((output, logsumexp), ops.varlen_attention_reference(*inputs, *rest))
    arguments = (grad, *inputs, *saved, *rest)
    close(varlen.varlen_attention_backward(*arguments), ops.varlen_attention_backward_reference(*arguments))
    arguments = (*inputs, *saved, *tangents, *rest)
    close(varlen.varlen_attention_jvp(*arguments), ops.varlen_attention_jvp_reference(*arguments))
    arguments = (grad, *arguments)
    close(
        varlen.varlen_attention_double_backward(*arguments),
        ops.varlen_attention_double_backward_reference(*arguments),
    )


def test_dropout_is_that_of_the_padded_batch():
    """Sequence n gets the bits of batch n, wherever its rows are."""
    philox, lengths = torch.tensor([17, 3]), ((5, 9), (0, 2), (30, 70))
    rows, columns, heads = 35, 81, 3
    query, key = torch.zeros(rows, heads, 1), torch.zeros(columns, heads, 1)
    value = torch.eye(columns).unsqueeze(1).expand(columns, heads, columns)
    where = [offsets(x) for x in zip(*lengths, strict=True)]
    output, _ = varlen.varlen_attention(query, key, value, *where, philox, 30, 70, 0.4, False, 1.0)
    kept = fastgan.ops.attention.dropout_mask(philox, 3, heads, 30, 70, 0.4)
    row = column = 0
    for n, (of_rows, of_columns) in enumerate(lengths):
        got = output[row : row + of_rows, :, column : column + of_columns] != 0
        assert torch.equal(got.transpose(0, 1), kept[n, :, :of_rows, :of_columns])
        row, column = row + of_rows, column + of_columns


def test_dropout_follows_the_generator():
    (query, key, value, _), where = packed(((4, 6), (3, 3)))
    draw = lambda: F.varlen_attention(query, key, value, *where, dropout_p=0.5)
    torch.manual_seed(7)
    first, second = draw(), draw()
    torch.manual_seed(7)
    assert torch.equal(draw(), first)
    assert not torch.equal(second, first)
    assert not F.varlen_attention(query, key, value, *where, dropout_p=1.0).any()


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck(is_causal):
    (query, key, value, _), where = packed(((2, 3), (0, 1), (3, 2)), 2, 1, 3, 2, requires_grad=True)
    function = lambda *args: F.varlen_attention(*args, *where, enable_gqa=True, is_causal=is_causal)
    inputs = (query, key, value)
    assert torch.autograd.gradcheck(
        function, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(function, inputs)


def test_opcheck():
    (query, key, value, grad), where = packed(((3, 5), (4, 2)), 4, 2, 8, 6, torch.float32, requires_grad=True)
    for philox, causal in ((torch.tensor([3, 4]), True), (None, False)):
        rest = (*where[2:], 0.2, causal, 0.5)
        torch.library.opcheck(varlen.varlen_attention, (query, key, value, *where[:2], philox, *rest))
        with torch.no_grad():
            inputs = (query.detach(), key.detach(), value.detach(), *where[:2], philox)
            saved = varlen.varlen_attention(*inputs, *rest)
            tangents = (inputs[0], None, inputs[2])
        # all but aot_dispatch: with output held still, the derivative by query is not that of the reference
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        for operator, arguments in (
            (varlen.varlen_attention_backward, (grad.detach(), *inputs, *saved, *rest)),
            (varlen.varlen_attention_jvp, (*inputs, *saved, *tangents, *rest)),
            (varlen.varlen_attention_double_backward, (grad.detach(), *inputs, *saved, *tangents, *rest)),
        ):
            torch.library.opcheck(operator, arguments, test_utils=tests)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_derivative_matrix(backend):
    lengths, where = ((1, 1), (3, 3)), (offsets((1, 3)), offsets((1, 3)), 3, 3)
    x = torch.randn(4, 2, 3, dtype=torch.float64)

    def plain(query, key, value):
        sequence = torch.tensor([0, 1, 1, 1])
        seen = (sequence[:, None] == sequence) & torch.ones(4, 4, dtype=torch.bool).tril()
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        scores = (query @ key.mT / math.sqrt(3)).masked_fill(~seen, float("-inf"))
        return (scores.softmax(-1) @ value).transpose(0, 1)

    assert torch.allclose(plain(x, x, x), one_by_one(lengths, True)(x, x, x))
    of = lambda f: lambda z: f(z, z.flip(-1) * 0.5 + 0.1, z.square() - 0.3)
    ours = of(lambda q, k, v: F.varlen_attention(q, k, v, *where, is_causal=True))
    check_derivatives(ours, of(plain), x, backends=(backend,))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_vmap(dropout_p):
    """Samples of queries, of keys and values along another dimension, and of offsets."""
    lengths = ((3, 4), (0, 1), (2, 2))
    (query, key, value, _), where = packed(lengths)
    queries, keys = torch.stack([query, 2 * query, -query]), torch.stack([key, key + 1, 3 * key], 2)
    cu_k = torch.stack([where[1], where[1], torch.tensor([0, 0, 1, 7], dtype=torch.int32)])
    philox = torch.tensor([1, 2]) if dropout_p else None

    def function(q, k, cu):
        return varlen.varlen_attention(q, k, value, where[0], cu, philox, 3, 6, dropout_p, True, 0.5)[0]

    expected = torch.stack([function(queries[i], keys[:, :, i], cu_k[i]) for i in range(3)])
    torch.testing.assert_close(vmap(function, (0, 2, 0))(queries, keys, cu_k), expected)
    gradient = torch.func.grad(lambda *args: function(*args).square().sum(), (0, 1))
    expected = [gradient(queries[i], keys[:, :, i], cu_k[i]) for i in range(3)]
    found = vmap(gradient, (0, 2, 0))(queries, keys, cu_k)
    torch.testing.assert_close(found, tuple(torch.stack(each) for each in zip(*expected, strict=True)))


@pytest.mark.parametrize(("kv_heads", "is_causal"), [(1, True), (8, False)])
def test_same_bits_for_every_number_of_threads(capability, kv_heads, is_causal):
    lengths = [(7, 7)] * 20 + [(400, 520), (0, 3), (90, 90)]
    (query, key, value, grad), where = packed(lengths, 8, kv_heads, 16, dtype=torch.float32, requires_grad=True)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        output = F.varlen_attention(query, key, value, *where, enable_gqa=True, is_causal=is_causal)
        results.append([output, *torch.autograd.grad(output, (query, key, value), grad)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("implementation", ["kernels", "reference"])
def test_a_nan_stays_in_its_sequence(implementation):
    (query, key, value, grad), where = packed(((3, 4), (5, 6), (2, 2)), requires_grad=True)
    with torch.no_grad():
        value[5], key[6] = math.nan, math.nan
    with fastgan.use(implementation):
        output = F.varlen_attention(query, key, value, *where, is_causal=True)
    gradients = torch.autograd.grad(output, (query, key, value), grad)
    for tensor, begin, end in zip((output, *gradients), (3, 3, 4, 4), (8, 8, 10, 10), strict=True):
        assert not torch.cat([tensor[:begin], tensor[end:]]).isnan().any()
        assert tensor[begin:end].isnan().any()


def test_strided_views_of_one_projection_and_strided_offsets():
    """As a model has them: query, key and value are slices of one tensor. The result is contiguous."""
    both = torch.randn(12, 3, 2, 8)
    query, key, value = both.unbind(1)
    cu = torch.stack([offsets((5, 7)), offsets((1, 1))], 1)[:, 0]
    assert not cu.is_contiguous()
    for dtype in (torch.int32, torch.int64):
        output = F.varlen_attention(query, key, value, cu.to(dtype), cu, 7, 12)
        torch.testing.assert_close(output, one_by_one(((5, 5), (7, 7)), False)(query, key, value))
        assert output.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 2, 4), (6, 0, 4), (6, 2, 0)])
@pytest.mark.parametrize("implementation", ["kernels", "reference"])
def test_empty(shape, implementation):
    x = torch.randn(shape, requires_grad=True)
    for lengths in ((), (shape[0],), (0, shape[0], 0)):
        if sum(lengths) != shape[0]:
            continue
        cu = offsets(lengths)
        with fastgan.use(implementation):
            output = F.varlen_attention(x, x, x, cu, cu, shape[0], shape[0])
        (gradient,) = torch.autograd.grad(output.sum(), x)
        assert output.shape == gradient.shape == shape


def test_autocast_lowers():
    (query, key, value, _), where = packed(((5, 5), (2, 2)), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = F.varlen_attention(query, key.bfloat16(), value, *where)
        with fastgan.use("reference"):
            reference = F.varlen_attention(query, key, value, *where)
    assert output.dtype == reference.dtype == torch.bfloat16


def test_compiles_whole_and_once_for_all_lengths():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    function = torch.compile(
        lambda q, k, v, *where: F.varlen_attention(q, k, v, *where, is_causal=True).square().sum(),
        fullgraph=True,
        backend=backend,
        dynamic=True,
    )
    for lengths in (((3, 4), (5, 6)), ((7, 8), (2, 9), (4, 4)), ((5, 5), (8, 8))):
        (query, key, value, _), where = packed(lengths, dtype=torch.float32)
        expected = one_by_one(lengths, True)(query, key, value).square().sum()
        torch.testing.assert_close(function(query, key, value, *where), expected)
    assert len(compilations) <= 2


def test_names_are_those_of_torch():
    theirs = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    names = list(inspect.signature(F.varlen_attention).parameters)
    of_torch = list(inspect.signature(theirs).parameters)
    assert names[:7] == of_torch[:7]
    assert {"scale", "window_size", "enable_gqa"} <= set(names) & set(of_torch)


def test_window_of_all_before_is_causal():
    (query, key, value, _), where = packed(((3, 5), (4, 4)))
    ours = F.varlen_attention(query, key, value, *where, window_size=(-1, 0))
    assert torch.equal(ours, F.varlen_attention(query, key, value, *where, is_causal=True))


WRONG_NUMBERS = [
    ({"cu_seq_q": [1, 3, 6]}, "cu_seq_q must begin with 0, got 1"),
    ({"cu_seq_q": [0, 7, 6]}, "cu_seq_q must not decrease, got .*7"),
    ({"cu_seq_k": [0, 3, 6]}, "cu_seq_k must end with the number of rows, 8, got 6"),
    ({"cu_seq_k": [0, 3, 9]}, "cu_seq_k must end with the number of rows, 8, got 9"),
    ({"max_q": 3}, "max_q must be the length of the longest sequence or more, got 3 and a sequence of 4 in cu_seq_q"),
    ({"max_k": 0}, "max_k must be .* in cu_seq_k"),
]


@pytest.mark.parametrize("implementation", ["kernels", "reference"])
@pytest.mark.parametrize(("change", "message"), WRONG_NUMBERS)
def test_wrong_offsets_are_refused_by_name(implementation, change, message):
    change = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in change.items()}
    with fastgan.use(implementation), pytest.raises(RuntimeError, match=message):
        F.varlen_attention(**(_good() | change))


def _good():
    return {
        "query": torch.zeros(6, 4, 8),
        "key": torch.zeros(8, 4, 8),
        "value": torch.zeros(8, 4, 5),
        "cu_seq_q": torch.tensor([0, 2, 6]),
        "cu_seq_k": torch.tensor([0, 3, 8]),
        "max_q": 4,
        "max_k": 5,
    }


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (RuntimeError, {"query": torch.zeros(1, 6, 4, 8)}),
        (RuntimeError, {"query": torch.zeros(6, 4, 8).double()}),
        (RuntimeError, {"key": torch.zeros(8, 4, 7)}),
        (RuntimeError, {"value": torch.zeros(7, 4, 5)}),
        (RuntimeError, {"value": torch.zeros(8, 4, 5, device="meta")}),
        (RuntimeError, {"cu_seq_q": torch.tensor([0, 2, 6], device="meta")}),
        (RuntimeError, {"cu_seq_q": torch.tensor([0.0, 2, 6])}),
        (RuntimeError, {"cu_seq_q": torch.tensor([[0, 2, 6]])}),
        (RuntimeError, {"cu_seq_k": torch.tensor([], dtype=torch.int64)}),
        (RuntimeError, {"cu_seq_k": torch.tensor([0, 8])}),
        (RuntimeError, {"max_q": -1}),
        (RuntimeError, {"dropout_p": 1.5}),
        (RuntimeError, {"query": torch.zeros(6, 4, 8).to_sparse()}),
        (ValueError, {"query": torch.zeros(6, 8, 8)}),
        (ValueError, {"query": torch.zeros(6, 6, 8), "enable_gqa": True}),
        (NotImplementedError, {"window_size": (4, 0)}),
        (TypeError, {"cu_seq_k": [0, 3, 8]}),
        (TypeError, {"max_k": 5.0}),
        (TypeError, {"dropout_p": "0.1"}),
        (TypeError, {"query": None}),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_refused(error, change):
    F.varlen_attention(**_good())
    with pytest.raises(error, match=f"varlen_attention: .*{next(iter(change))}|heads"):
        F.varlen_attention(**(_good() | change))


def test_raw_operator_guards_memory():
    good = _good()
    tensors = [good[name] for name in ("query", "key", "value", "cu_seq_q", "cu_seq_k")]
    with pytest.raises(RuntimeError, match="value has sizes"):
        varlen.varlen_attention(*tensors[:2], torch.zeros(7, 4, 5), *tensors[3:], None, 4, 5, 0.0, False, 1.0)
    with pytest.raises(RuntimeError, match="equal length"):
        varlen.varlen_attention(*tensors[:4], torch.tensor([0, 8]), None, 4, 8, 0.0, False, 1.0)
    with pytest.raises(RuntimeError, match="cu_seq_q must be int32 or int64"):
        varlen.varlen_attention(*tensors[:3], tensors[3].short(), tensors[4], None, 4, 5, 0.0, False, 1.0)
