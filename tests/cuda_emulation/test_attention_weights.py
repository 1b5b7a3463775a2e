"""attention_weights.cu, emulated and on a GPU where there is one: the weights of each head and their mean, judged by
float64 and by the CPU kernel's own error."""

from __future__ import annotations

import pytest
import torch

from fastgan.ops import attention as reference
from tests.cuda_emulation.build import needs_compiler
from tests.cuda_emulation.test_attention import DTYPES, _inputs, _no_worse, _padding, _wide

pytestmark = [needs_compiler, pytest.mark.kernel, pytest.mark.timeout(600)]


def _check(cuda_kernels, tensors, mask=None, bias=None, is_causal=False):
    query, key, _, _ = tensors
    scale = query.shape[-1] ** -0.5
    results = []
    for average in (True, False):

        def weights(operators, average=average):
            _, logsumexp = operators.attention(query, key, key, mask, bias, None, 0.0, is_causal, scale)
            return operators.attention_weights(query, key, mask, bias, logsumexp, is_causal, scale, average)

        cpu, got = weights(torch.ops.fastgan), weights(cuda_kernels)
        wide = map(_wide, (query, key, mask, bias))
        exact = reference.attention_weights_reference(*wide, None, is_causal, scale, average)
        _no_worse(got, cpu, exact, query.dtype, f"{average=}")
        assert (got[exact == 0] == 0).all()  # what is hidden, and dead rows
        results.append(got)
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width(cuda_kernels, dtype):
    """Of each tile size; odd rows of the result and even ones, more rows and keys than a block has."""
    widest = 128 if dtype == torch.float64 else 256
    for width, rows, columns in [(16, 5, 70), (33, 131, 43), (72, 19, 35), (widest, 67, 34), (widest - 1, 3, 67)]:
        _check(cuda_kernels, _inputs(dtype, rows=rows, columns=columns, width=width))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(33, 70), (150, 33), (1, 5)])
def test_causal_counts_from_the_upper_left_corner(cuda_kernels, dtype, rows, columns):
    _check(cuda_kernels, _inputs(dtype, rows=rows, columns=columns), is_causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_at_once(cuda_kernels, dtype):
    tensors = _inputs(dtype, batch=2, heads=4, kv_heads=2, rows=37, columns=150, width=40)
    bias = torch.randn(1, 4, 37, 150).to(dtype)
    _check(cuda_kernels, tensors, mask=_padding(2, 150, 130, 31), bias=bias, is_causal=True)
    wide = _inputs(dtype, batch=2, heads=3, kv_heads=1, rows=34, columns=36, width=128, inside=False)
    _check(cuda_kernels, wide, mask=torch.rand(2, 1, 34, 36) < 0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_that_a_mask_hides_whole(cuda_kernels, dtype):
    """The first, one between and the last: what goes by is the others."""
    tensors = _inputs(dtype, heads=5, rows=20, columns=70, width=16)
    mask = torch.rand(1, 5, 20, 70) < 0.6
    mask[:, [0, 2, 4]] = False
    mask[:, 1, 3] = False  # a dead row of a head that is not
    mean, each = _check(cuda_kernels, tensors, mask=mask)
    assert (each[:, [0, 2, 4]] == 0).all()
    assert (mean[:, 3] > 0).any()
    bias = torch.zeros(1, 5, 1, 70)
    bias[:, 1:3] = float("-inf")
    _check(cuda_kernels, tensors, bias=bias.to(dtype))


def test_float32_bias_beside_half_precision(cuda_kernels):
    for dtype in (torch.bfloat16, torch.float16):
        _check(cuda_kernels, _inputs(dtype, rows=20, columns=67), bias=torch.randn(1, 2, 20, 67), is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores_keep_their_digits(cuda_kernels, dtype):
    query, key, value, grad = _inputs(dtype, rows=20, columns=50, width=32)
    _check(cuda_kernels, (query * 20, key * 5, value, grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nan_goes_to_its_row_alone(cuda_kernels, dtype):
    query, key, _, _ = _inputs(dtype, rows=20, columns=45, width=16)
    query = query.clone()
    query[0, 0, 3, 5] = float("nan")
    _, logsumexp = torch.ops.fastgan.attention(query, key, key, None, None, None, 0.0, False, 0.25)
    mean, each = (
        cuda_kernels.attention_weights(query, key, None, None, logsumexp, False, 0.25, average)
        for average in (True, False)
    )
    assert mean[0, 3].isnan().all()
    assert not mean[0, [*range(3), *range(4, 20)]].isnan().any()
    assert each[0, 0, 3].isnan().all()
    assert not each[0, 1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(cuda_kernels, dtype):
    query = torch.randn(2, 3, 16, 20).to(dtype).transpose(2, 3)
    key = torch.randn(2, 3, 33, 32).to(dtype)[..., ::2]
    got = _check(cuda_kernels, (query, key, None, None))
    again = _check(cuda_kernels, (query.contiguous(), key.contiguous(), None, None))
    for a, b in zip(got, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", range(6))
@pytest.mark.parametrize("average", [True, False], ids=["averaged", "per-head"])
def test_R16_empty_in_every_dimension(cuda_kernels, size, average):
    shape = [2, 2, 2, 3, 4, 5]  # batch, heads, key heads, rows, columns, width
    shape[size] = 0
    batch, heads, kv_heads, rows, columns, width = shape
    query, key = (
        torch.randn(batch, min(heads, kv_heads), rows, width),
        torch.randn(batch, min(heads, kv_heads), columns, width),
    )
    _, logsumexp = torch.ops.fastgan.attention(query, key, key, None, None, None, 0.0, False, 0.3)
    arguments = (query, key, None, None, logsumexp, False, 0.3, average)
    torch.testing.assert_close(
        cuda_kernels.attention_weights(*arguments), reference.attention_weights_reference(*arguments), equal_nan=True
    )


def test_heads_that_are_too_wide_are_refused(cuda_kernels):
    query = torch.randn(1, 1, 2, 257)
    logsumexp = torch.zeros(1, 1, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="wide"):
        cuda_kernels.attention_weights(query, query, None, None, logsumexp, False, 1.0, True)
