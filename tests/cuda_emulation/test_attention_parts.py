"""Few queries and many keys (attention_cuda_parts.h): keys in parts, heads of one key head as rows of one tile."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cuda_roofline as roofline
from fastgan.ops import attention as reference
from tests.cuda_emulation.build import needs_compiler
from tests.cuda_emulation.test_attention import DTYPES, _check, _inputs, _no_worse, _padding, _wide

pytestmark = [needs_compiler, pytest.mark.kernel, pytest.mark.timeout(600)]


def _forward(cuda_kernels, tensors, mask=None, bias=None, dropout_p=0.0):
    query, key, value, _ = tensors
    philox = torch.tensor([0x1234567890ABCDEF, 77]) if dropout_p > 0 else None
    arguments = (query, key, value, mask, bias, philox)
    rest = (dropout_p, False, query.shape[-1] ** -0.5)
    cpu, got = torch.ops.fastgan.attention(*arguments, *rest), cuda_kernels.attention(*arguments, *rest)
    exact = reference.attention_reference(*map(_wide, arguments), *rest)
    _no_worse(got[0], cpu[0], exact[0], query.dtype, "output")
    dead = exact[1].isinf()
    assert torch.equal(got[1].isinf(), dead)
    assert (got[0][dead] == 0).all()
    rough = 1e-12 if query.dtype == torch.float64 else 4e-6
    torch.testing.assert_close(got[1][~dead], exact[1][~dead], rtol=rough, atol=rough)
    return got


def _launches(emulated, emulated_library, tensors, mask=None, is_causal=False, philox=None):
    query, key, value, _ = tensors
    arguments = (query, key, value, mask, None, philox, 0.1 if philox is not None else 0.0, is_causal, 1.0)
    made = roofline.Recorder(emulated_library)(lambda: emulated.attention(*arguments))
    return [(each.name, each.grid) for each in made if each.name != "map_kernel"]


@pytest.mark.parametrize(
    ("batch", "heads", "columns", "parts"),
    [
        (1, 1, 1023, 1),  # a short row
        (1, 1, 1024, 4),  # parts of 256 keys at least
        (1, 1, 1300, 5),  # of 320, whole tiles
        (1, 1, 100_000, 16),  # two blocks for each multiprocessor
        (1, 2, 100_000, 8),
        (2, 2, 100_000, 4),
        (1, 5, 100_000, 3),
        (2, 8, 100_000, 2),  # as many blocks as are wanted: in two all the same
        (0, 1, 100_000, 1),
    ],
)
def test_keys_are_cut_by_shape(emulated, emulated_library, batch, heads, columns, parts):
    tensors = [torch.zeros(batch, heads, n, 8, dtype=torch.bfloat16) for n in (1, columns, columns, 1)]
    made = _launches(emulated, emulated_library, tensors)
    blocks = batch * heads
    if blocks == 0:
        assert made == []
    elif parts == 1:
        assert made == [("forward_kernel", blocks)]
    else:
        assert made == [("parts_kernel", blocks * parts), ("join_kernel", blocks)]


def test_heads_of_one_key_head_share_a_tile(emulated, emulated_library):
    def launches(inside=False, rows=1, heads=8, kv_heads=2, **options):
        tensors = _inputs(torch.bfloat16, heads=heads, kv_heads=kv_heads, rows=rows, columns=1024, inside=inside)
        return _launches(emulated, emulated_library, tensors, **options)

    assert launches() == launches(inside=True) == [("parts_kernel", 2 * 4), ("join_kernel", 8)]
    assert launches(rows=7) == [("parts_kernel", 2 * 4), ("join_kernel", 56)]
    each = [("parts_kernel", 8 * 2), ("join_kernel", 56)]
    assert launches(rows=7, inside=True) == each  # rows of a group are not evenly apart
    assert launches(rows=7, mask=torch.ones(1, 1, 7, 1024, dtype=torch.bool)) == each  # a mask by rows, not by heads
    assert launches(rows=17) == [("parts_kernel", 8 * 2), ("join_kernel", 136)]  # more than a tile
    philox = torch.tensor([1, 2])
    assert launches(philox=philox) == [("parts_kernel", 8 * 2), ("join_kernel", 8)]  # words go by head and row
    assert launches(is_causal=True) == [("forward_kernel", 8)]  # one row sees one key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width(cuda_kernels, dtype):
    widest = 128 if dtype == torch.float64 else 256
    for width, value_width, heads, kv_heads, rows in [(24, 17, 4, 1, 1), (72, 128, 2, 2, 3), (widest, 40, 3, 1, 1)]:
        tensors = _inputs(
            dtype, heads=heads, kv_heads=kv_heads, rows=rows, columns=1029, width=width, value_width=value_width
        )
        _forward(cuda_kernels, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_and_bias(cuda_kernels, dtype):
    tensors = _inputs(dtype, batch=2, heads=4, kv_heads=1, rows=1, columns=1100, width=16)
    # parts of which nothing is seen, before and after; nothing at all
    _forward(cuda_kernels, tensors, mask=_padding(2, 1100, 70, 1100) & ~_padding(2, 1100, 0, 600))
    _forward(cuda_kernels, tensors, mask=_padding(2, 1100, 0, 300))
    _forward(cuda_kernels, tensors, mask=torch.rand(1, 4, 1, 1100) < 0.3)
    _forward(cuda_kernels, tensors, bias=torch.randn(1, 4, 1, 1100).to(dtype), mask=_padding(2, 1100, 900, 1))
    several = _inputs(dtype, heads=4, kv_heads=2, rows=5, columns=1100, width=16, inside=False)
    bias = torch.randn(1, 4, 5, 1100).masked_fill(torch.rand(1, 4, 5, 1100) < 0.5, float("-inf"))
    bias[:, 1, 2] = float("-inf")
    _forward(cuda_kernels, several, bias=bias.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_large_scores_and_every_derivative(cuda_kernels, dtype):
    tensors = _inputs(dtype, heads=4, kv_heads=2, rows=1, columns=1050, width=16)
    _forward(cuda_kernels, tensors, dropout_p=0.3)
    query, key, value, grad = tensors
    _forward(cuda_kernels, (query * 20, key * 5, value, grad))
    _check(cuda_kernels, tensors, mask=_padding(1, 1050, 1030), dropout_p=0.2)  # the backward of what was joined


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nan_goes_to_what_depends_on_it(cuda_kernels, dtype):
    query, key, value, _ = _inputs(dtype, heads=4, kv_heads=2, rows=1, columns=1050, width=16)
    query, hidden = query.clone(), key.clone()
    query[0, 1, 0, 5] = float("nan")
    got, _ = cuda_kernels.attention(query, key, value, None, None, None, 0.0, False, 0.25)
    assert got[0, 1].isnan().all()
    assert not got[0, [0, 2, 3]].isnan().any()
    hidden[0, 0, 700] = float("nan")
    got, _ = cuda_kernels.attention(query[:, :1], hidden[:, :1], value[:, :1], None, None, None, 0.0, False, 0.25)
    assert got.isnan().all()
    mask = _padding(1, 1050, 700)
    got, _ = cuda_kernels.attention(query[:, :1], hidden[:, :1], value[:, :1], mask, None, None, 0.0, False, 0.25)
    assert not got.isnan().any()


def test_the_same_bits_in_every_run(cuda_kernels):
    query, key, value, _ = _inputs(torch.bfloat16, heads=4, kv_heads=1, rows=1, columns=2000)
    first, second = (cuda_kernels.attention(query, key, value, None, None, None, 0.0, False, 0.2) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
