"""Attention's CUDA kernels over packed sequences: judged by float64, by the CPU kernels, by the batched call's bits."""

from __future__ import annotations

import pytest
import torch

from fastgan.ops import attention_varlen as reference
from tests.cuda_emulation.build import needs_compiler
from tests.cuda_emulation.test_attention import DTYPES, _no_worse, _wide

pytestmark = [needs_compiler, pytest.mark.kernel, pytest.mark.timeout(600)]

#: rows and columns: none, no keys, no rows, more than a block has, fewer rows than keys and more
LENGTHS = ((0, 0), (3, 7), (40, 75), (2, 0), (0, 6), (33, 33), (9, 4))


def _packed(dtype, lengths=LENGTHS, heads=2, kv_heads=1, width=24, value_width=17, offsets=torch.int32):
    rows, columns = (sum(x) for x in zip(*lengths, strict=True))
    shapes = (rows, heads, width), (columns, kv_heads, width), (columns, kv_heads, value_width)
    tensors = [torch.randn(s).to(dtype) for s in (*shapes, (rows, heads, value_width))]
    where = [torch.tensor([0, *(x[i] for x in lengths)]).cumsum(0).to(offsets) for i in (0, 1)]
    return tensors, where, [max(x[i] for x in lengths) for i in (0, 1)]


def _close(ours, theirs, judges, dtype, names):
    for name, got, cpu, exact in zip(names, ours, theirs, judges, strict=True):
        _no_worse(got, cpu, exact, dtype, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("is_causal", "dropout_p"), [(False, 0.3), (True, 0.0), (True, 0.2)])
def test_first_order(cuda_kernels, dtype, is_causal, dropout_p):
    (query, key, value, grad), where, most = _packed(dtype)
    philox = torch.tensor([0x1234567890ABCDEF, 77]) if dropout_p else None
    inputs, rest = (query, key, value, *where, philox), (*most, dropout_p, is_causal, 0.2)
    got = cuda_kernels.varlen_attention(*inputs, *rest)
    cpu = torch.ops.fastgan.varlen_attention(*inputs, *rest)
    exact = reference.varlen_attention_reference(*map(_wide, inputs), *rest)
    _close(got[:1], cpu[:1], exact[:1], dtype, ["output"])
    dead = exact[1].isinf()
    assert dead.any()
    assert torch.equal(got[1].isinf(), dead)
    torch.testing.assert_close(got[1][~dead], exact[1][~dead], rtol=4e-6, atol=4e-6)
    _close(
        cuda_kernels.varlen_attention_backward(grad, *inputs, *got, *rest),
        torch.ops.fastgan.varlen_attention_backward(grad, *inputs, *cpu, *rest),
        reference.varlen_attention_backward_reference(_wide(grad), *map(_wide, inputs), *exact, *rest),
        dtype,
        ["grad_query", "grad_key", "grad_value"],
    )


def test_gradients_of_long_sequences(cuda_kernels):
    """Above 128 keys what is subtracted from a row's gradients comes from the output."""
    (query, key, value, grad), where, most = _packed(torch.float32, ((5, 140), (20, 3)), width=8, value_width=8)
    inputs, rest = (query, key, value, *where, None), (*most, 0.0, True, 0.3)
    saved = cuda_kernels.varlen_attention(*inputs, *rest)
    exact = reference.varlen_attention_backward_reference(_wide(grad), *map(_wide, inputs), *saved, *rest)
    for ours, judge in zip(cuda_kernels.varlen_attention_backward(grad, *inputs, *saved, *rest), exact, strict=True):
        torch.testing.assert_close(ours.double(), judge, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("absent", [None, 0, 1, 2])
def test_second_order(cuda_kernels, dtype, absent):
    lengths = ((3, 7), (0, 2), (35, 40), (2, 0), (6, 4))
    (query, key, value, grad), where, most = _packed(dtype, lengths, width=16, value_width=9, offsets=torch.int64)
    philox = torch.tensor([3, 5])
    tangents = [None if i == absent else torch.randn_like(t) for i, t in enumerate((query, key, value))]
    inputs, rest = (query, key, value, *where, philox), (*most, 0.2, True, 0.3)
    saved = cuda_kernels.varlen_attention(*inputs, *rest)
    of_cpu = torch.ops.fastgan.varlen_attention(*inputs, *rest)
    judge = [_wide(t) for t in (*inputs, *of_cpu, *tangents)]
    _close(
        [cuda_kernels.varlen_attention_jvp(*inputs, *saved, *tangents, *rest)],
        [torch.ops.fastgan.varlen_attention_jvp(*inputs, *of_cpu, *tangents, *rest)],
        [reference.varlen_attention_jvp_reference(*judge, *rest)],
        dtype,
        ["tangent_output"],
    )
    _close(
        cuda_kernels.varlen_attention_double_backward(grad, *inputs, *saved, *tangents, *rest),
        torch.ops.fastgan.varlen_attention_double_backward(grad, *inputs, *of_cpu, *tangents, *rest),
        reference.varlen_attention_double_backward_reference(_wide(grad), *judge, *rest),
        dtype,
        ["tangent_output", "grad_query", "grad_key", "grad_value"],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_the_batched_call(cuda_kernels, dtype):
    batch, rows, philox = 2, 40, torch.tensor([9, 4])
    (query, key, value, grad), where, most = _packed(dtype, ((rows, rows),) * batch)
    numbers = (0.3, True, 0.4)

    def batched(tensor):
        return tensor.unflatten(0, (batch, rows)).transpose(1, 2)

    q, k, v, g = (batched(t) for t in (query, key, value, grad))
    inputs = (query, key, value, *where, philox)
    ours = cuda_kernels.varlen_attention(*inputs, *most, *numbers)
    theirs = cuda_kernels.attention(q, k, v, None, None, philox, *numbers)
    assert torch.equal(batched(ours[0]), theirs[0])
    gradients = cuda_kernels.varlen_attention_backward(grad, *inputs, *ours, *most, *numbers)
    of_batch = cuda_kernels.attention_backward(g, q, k, v, None, None, philox, *theirs, *numbers, False)
    for got, wanted in zip(gradients, of_batch[:3], strict=True):
        assert torch.equal(batched(got), wanted)


def test_offsets_that_are_none_do_not_reach_out_of_the_tensors(emulated):
    """Nobody looks at the numbers on CUDA. Rows of no sequence are not written; the others are, within their bounds."""
    query, key, value, _ = _packed(torch.float32, ((5, 5), (6, 6), (4, 4)))[0]
    wrong = torch.tensor([0, 2000000, -7, 15], dtype=torch.int32)
    inputs = (query, key, value, wrong, wrong, None)
    output, logsumexp = emulated.varlen_attention(*inputs, 15, 15, 0.0, True, 0.3)
    assert output[:15].isfinite().all()
    gradients = emulated.varlen_attention_backward(query[..., :17], *inputs, output, logsumexp, 15, 15, 0.0, True, 0.3)
    assert all(gradient.shape == tensor.shape for gradient, tensor in zip(gradients, inputs, strict=False))
