"""attention_second.cu, emulated and on a GPU where there is one: the derivatives of output and gradients along a
direction, judged by float64 and by the CPU kernel's own error."""

from __future__ import annotations

import pytest
import torch

from fastgan.ops import attention as reference
from tests.cuda_emulation.build import needs_compiler
from tests.cuda_emulation.test_attention import DTYPES, _inputs, _no_worse, _padding, _wide

pytestmark = [needs_compiler, pytest.mark.kernel, pytest.mark.timeout(600)]

RESULTS = ("tangent_output", "grad_query", "grad_key", "grad_value", "grad_bias")


def _check(cuda_kernels, tensors, mask=None, bias=None, dropout_p=0.0, is_causal=False, absent=()):
    query, key, value, grad = tensors
    scale = query.shape[-1] ** -0.5
    philox = torch.tensor([0x1234567890ABCDEF, 77]) if dropout_p > 0 else None
    rest = (dropout_p, is_causal, scale)
    arguments = (query, key, value, mask, bias, philox)
    along = [None if t is None else torch.randn(t.shape).to(t.dtype) for t in (query, key, value, bias)]
    for i in absent:
        along[i] = None
    saved = torch.ops.fastgan.attention(*arguments, *rest)
    exact_saved = reference.attention_reference(*map(_wide, arguments), *rest)

    cpu = torch.ops.fastgan.attention_jvp(*arguments, *saved, *along, *rest)
    got = cuda_kernels.attention_jvp(*arguments, *saved, *along, *rest)
    exact = reference.attention_jvp_reference(*map(_wide, arguments), *exact_saved, *map(_wide, along), *rest)
    _no_worse(got, cpu, exact, query.dtype, "attention_jvp")

    cpu_all = torch.ops.fastgan.attention_double_backward(grad, *arguments, *saved, *along, *rest, True)
    got_all = cuda_kernels.attention_double_backward(grad, *arguments, *saved, *along, *rest, True)
    exact_all = reference.attention_double_backward_reference(
        _wide(grad), *map(_wide, arguments), *exact_saved, *map(_wide, along), *rest, True
    )
    assert torch.equal(got_all[0], got)
    for name, ours, theirs, judge in zip(RESULTS, got_all, cpu_all, exact_all, strict=True):
        if name == "grad_bias" and bias is None:
            assert ours.numel() == 0
        else:
            # D and D' of half precision come from the rounded output, so that a row's dS' sums to 0 but for that.
            rounding = 16e-6 if query.dtype in (torch.float32, torch.float64) else 8 * torch.finfo(query.dtype).eps
            _no_worse(ours, theirs, judge, query.dtype, name, rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width(cuda_kernels, dtype):
    widest = 128 if dtype == torch.float64 else 256
    for width, value_width, rows, columns in [(24, 17, 37, 41), (72, 100, 19, 35), (widest, widest - 1, 20, 18)]:
        _check(cuda_kernels, _inputs(dtype, rows=rows, columns=columns, width=width, value_width=value_width, heads=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_at_once(cuda_kernels, dtype):
    tensors = _inputs(dtype, batch=2, heads=4, kv_heads=2, rows=37, columns=70, width=40, value_width=16)
    bias = torch.randn(1, 4, 37, 70).to(dtype)
    mask = _padding(2, 70, 66, 31)
    _check(cuda_kernels, tensors, mask=mask, bias=bias, dropout_p=0.2, is_causal=True)
    wide = _inputs(dtype, heads=1, rows=34, columns=36, width=128)
    _check(cuda_kernels, wide, mask=torch.rand(1, 1, 34, 36) < 0.7, dropout_p=0.3)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 41), (1, 2, 37, 1), (2, 2, 37, 41)], ids=str)
def test_bias_of_every_broadcast(cuda_kernels, shape):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = _inputs(dtype, batch=2, width=16)
        _check(cuda_kernels, tensors, bias=torch.randn(shape).to(dtype))
    _check(cuda_kernels, tensors, bias=torch.randn(shape))  # float32 beside bfloat16


@pytest.mark.parametrize("absent", [(0,), (1,), (2,), (0, 1), (1, 2, 3), (0, 2, 3)], ids=str)
def test_absent_tangents_are_zero(cuda_kernels, absent):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = _inputs(dtype, heads=1, rows=20, columns=33, width=16)
        _check(cuda_kernels, tensors, bias=torch.randn(1, 1, 20, 33).to(dtype), absent=absent)


def test_dead_rows_are_zero(cuda_kernels):
    for dtype in (torch.float32, torch.bfloat16):
        mask = torch.rand(1, 1, 20, 33) < 0.5
        mask[:, :, 4] = False
        _check(cuda_kernels, _inputs(dtype, heads=1, rows=20, columns=33, width=16), mask=mask)


def test_empty(cuda_kernels):
    for sizes in [{"rows": 0}, {"columns": 0}, {"batch": 0}]:
        query, key, value, grad = _inputs(torch.bfloat16, **sizes)
        saved = cuda_kernels.attention(query, key, value, None, None, None, 0.0, False, 1.0)
        for each in cuda_kernels.attention_double_backward(
            grad, query, key, value, None, None, None, *saved, query, key, value, None, 0.0, False, 1.0, False
        ):
            assert (each == 0).all()
