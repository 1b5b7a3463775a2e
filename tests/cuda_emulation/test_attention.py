"""attention.cu, emulated and on a GPU where there is one: judged by float64 and by the CPU kernel's own error."""

from __future__ import annotations

import pytest
import torch

from fastgan.ops import attention as reference
from tests.cuda_emulation.build import needs_compiler

pytestmark = [needs_compiler, pytest.mark.kernel, pytest.mark.timeout(600)]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GRADIENTS = ("grad_query", "grad_key", "grad_value", "grad_bias")


def _wide(tensor):
    return tensor.double() if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() else tensor


def _error(got, exact):
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def _no_worse(got, cpu, exact, dtype, what, cancelling=16e-6):
    """``cancelling``: how far from 0 what cancels may be beyond the CPU's.

    Half precision rounds the weights to 16 bits before the second product, which the CPU kernel does not.
    """
    assert got.dtype == cpu.dtype
    assert got.shape == cpu.shape
    assert got.stride() == cpu.stride()
    assert not got.isnan().any(), what
    if exact.abs().max() < 1e-12:  # what cancels: of a bias that a whole row shares, or under a weight of 1
        assert got.abs().max() <= 4 * cpu.abs().max() + min(16 * torch.finfo(dtype).eps, cancelling), what
        return
    ulp = torch.finfo(dtype).eps
    times, more = (2.0, 1.0) if dtype in (torch.bfloat16, torch.float16) else (2.0, 4.0)
    assert _error(got, exact) <= times * _error(cpu, exact) + more * ulp, (
        what,
        _error(got, exact),
        _error(cpu, exact),
    )


def _inputs(dtype, batch=1, heads=2, kv_heads=None, rows=37, columns=41, width=24, value_width=None, inside=True):
    """query, key, value and grad_output; with heads inside rows in memory, as a projection leaves them."""

    def make(n, r, c):
        if inside:
            return torch.randn(batch, r, n, c).to(dtype).transpose(1, 2)
        return torch.randn(batch, n, r, c).to(dtype)

    kv_heads, value_width = kv_heads or heads, value_width or width
    return (
        make(heads, rows, width),
        make(kv_heads, columns, width),
        make(kv_heads, columns, value_width),
        make(heads, rows, value_width),
    )


def _check(cuda_kernels, tensors, mask=None, bias=None, dropout_p=0.0, is_causal=False, bias_gradient=True):
    query, key, value, grad = tensors
    scale = query.shape[-1] ** -0.5
    philox = torch.tensor([0x1234567890ABCDEF, 77]) if dropout_p > 0 else None
    rest = (dropout_p, is_causal, scale)
    arguments = (query, key, value, mask, bias, philox)
    cpu = torch.ops.fastgan.attention(*arguments, *rest)
    got = cuda_kernels.attention(*arguments, *rest)
    exact = reference.attention_reference(*map(_wide, arguments), *rest)
    _no_worse(got[0], cpu[0], exact[0], query.dtype, "output")
    assert got[1].dtype == torch.float64
    dead = exact[1].isinf()
    assert torch.equal(got[1].isinf(), dead)
    rough = 1e-12 if query.dtype == torch.float64 else 4e-6
    torch.testing.assert_close(got[1][~dead], exact[1][~dead], rtol=rough, atol=rough)
    assert (got[0].masked_select(dead.unsqueeze(-1)) == 0).all()

    cpu_gradients = torch.ops.fastgan.attention_backward(grad, *arguments, *cpu, *rest, bias_gradient)
    gradients = cuda_kernels.attention_backward(grad, *arguments, *got, *rest, bias_gradient)
    exact_gradients = reference.attention_backward_reference(
        _wide(grad), *map(_wide, arguments), *exact, *rest, bias_gradient
    )
    for name, ours, theirs, judge in zip(GRADIENTS, gradients, cpu_gradients, exact_gradients, strict=True):
        if name == "grad_bias" and (bias is None or not bias_gradient):
            assert ours.numel() == 0
            continue
        _no_worse(ours, theirs, judge, ours.dtype if name != "grad_bias" else query.dtype, name)
    assert (gradients[0].masked_select(dead.unsqueeze(-1)) == 0).all()
    return got, gradients


def _padding(batch, columns, *lengths):
    return (torch.arange(columns) < torch.tensor(lengths)[:, None]).view(batch, 1, 1, columns)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain(cuda_kernels, dtype):
    """Widths of each tile size, odd and whole vectors, more rows and keys than a block has."""
    widest = 128 if dtype == torch.float64 else 256
    for width, value_width, rows, columns in [
        (16, 16, 5, 70),
        (33, 17, 67, 40),
        (72, 128, 19, 35),
        (widest, widest - 1, 35, 18),
        (8, widest, 3, 66),
    ]:
        _check(cuda_kernels, _inputs(dtype, rows=rows, columns=columns, width=width, value_width=value_width, heads=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(33, 70), (70, 33), (1, 5)])
def test_causal_counts_from_the_upper_left_corner(cuda_kernels, dtype, rows, columns):
    _check(cuda_kernels, _inputs(dtype, heads=1, rows=rows, columns=columns), is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inside", [True, False])
def test_grouped_heads(cuda_kernels, dtype, inside):
    _check(cuda_kernels, _inputs(dtype, batch=2, heads=4, kv_heads=2, rows=34, columns=36, inside=inside))
    _check(cuda_kernels, _inputs(dtype, heads=3, kv_heads=1, rows=50, columns=34, inside=inside), is_causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_and_whole_tiles_that_are_hidden(cuda_kernels, dtype):
    tensors = _inputs(dtype, batch=3, heads=1, rows=20, columns=150, width=16)
    _check(cuda_kernels, tensors, mask=_padding(3, 150, 130, 0, 33))
    # keys first hidden, then seen: the first tile that is worked on is not the first
    _check(cuda_kernels, tensors, mask=~_padding(3, 150, 64, 100, 150))
    _check(cuda_kernels, tensors, mask=_padding(3, 150, 64, 100, 96), dropout_p=0.3, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 45, 67), (2, 1, 1, 67), (1, 3, 45, 1), (2, 3, 45, 67), (2, 1, 45, 1)])
def test_boolean_masks_of_every_broadcast_and_stride(cuda_kernels, dtype, shape):
    tensors = _inputs(dtype, batch=shape[0], heads=shape[1], rows=45, columns=67, width=16)
    if shape == (1, 1, 45, 67):
        tensors = _inputs(dtype, batch=2, heads=2, rows=45, columns=67, width=16)
    _check(cuda_kernels, tensors, mask=torch.rand(shape) < 0.6)
    if shape[2] > 1 and shape[3] > 1:
        whole = torch.rand(*shape[:2], shape[3], 2 * shape[2]) < 0.6
        _check(cuda_kernels, tensors, mask=whole.transpose(2, 3)[:, :, ::2], is_causal=True)
        block = torch.zeros(shape, dtype=torch.bool)
        block[..., 32:, 32:64] = True  # the other tiles are hidden whole
        _check(cuda_kernels, tensors, mask=block)


BIASES = [(1, 1, 1, 1), (2, 3, 37, 41), (1, 3, 37, 41), (2, 1, 1, 41), (1, 1, 1, 41), (2, 3, 37, 1), (1, 3, 1, 1)]


@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_bias_and_its_gradient(cuda_kernels, shape):
    for dtype in DTYPES if shape[1] > 1 and shape[2] > 1 else DTYPES[::2]:
        tensors = _inputs(dtype, batch=2, heads=3, kv_heads=1, width=8)
        _check(cuda_kernels, tensors, bias=torch.randn(shape).to(dtype))
    _check(cuda_kernels, tensors, bias=torch.randn(shape).to(dtype), bias_gradient=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_bias_beside_half_precision(cuda_kernels, dtype):
    tensors = _inputs(dtype, batch=2, rows=70, columns=67)
    for bias in (torch.randn(1, 2, 70, 67), torch.randn(2, 1, 1, 67), torch.randn(70, 2).t().reshape(1, 2, 70, 1)):
        _check(cuda_kernels, tensors, bias=bias, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_minus_infinity_in_a_bias_hides(cuda_kernels, dtype):
    tensors = _inputs(dtype, batch=2, rows=36, columns=100, width=16)
    bias = torch.zeros(2, 1, 1, 100).masked_fill(~_padding(2, 100, 60, 0), float("-inf")).to(dtype)
    _check(cuda_kernels, tensors, bias=bias)
    whole = torch.randn(1, 2, 36, 100).masked_fill(torch.rand(1, 2, 36, 100) < 0.5, float("-inf"))
    whole[:, :, 3] = float("-inf")
    _check(cuda_kernels, tensors, bias=whole.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 130])
def test_dropout_drops_what_the_cpu_drops(cuda_kernels, dtype, width):
    """Values that are the unit vectors show each weight: the same are zero, to the bit."""
    if dtype == torch.float64 and width > 128:
        width = 128
    query, key, _, _ = _inputs(dtype, batch=2, heads=2, rows=35, columns=60, width=width)
    value = torch.eye(60, dtype=dtype).expand(2, 2, 60, 60)
    philox = torch.tensor([-0x123456789ABCDEF, -3])
    arguments = (query, key, value, None, None, philox, 0.4, False, width**-0.5)
    got, cpu = cuda_kernels.attention(*arguments)[0], torch.ops.fastgan.attention(*arguments)[0]
    assert torch.equal(got == 0, cpu == 0)
    assert 0.35 < (got == 0).double().mean() < 0.45
    everything = cuda_kernels.attention(query, key, value, None, None, philox, 1.0, False, 1.0)[0]
    assert (everything == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_with_everything(cuda_kernels, dtype):
    for width in (20, 100):
        tensors = _inputs(dtype, batch=2, heads=2, kv_heads=1, rows=45, columns=70, width=40, value_width=width)
        _check(
            cuda_kernels, tensors, mask=_padding(2, 70, 66, 31), bias=torch.randn(1, 2, 45, 70).to(dtype),
            dropout_p=0.2, is_causal=True,
        )  # fmt: skip


def test_dropout_in_wide_heads(cuda_kernels):
    """Where grad_key and grad_value have a launch each."""
    for dtype, width in [(torch.bfloat16, 136), (torch.float32, 136), (torch.float64, 72)]:
        _check(cuda_kernels, _inputs(dtype, heads=2, rows=34, columns=40, width=width), dropout_p=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores_keep_their_digits(cuda_kernels, dtype):
    # Many heads: of a few, a gradient's error is that of a row or two, and the judge's may be small by chance.
    query, key, value, grad = _inputs(dtype, batch=4, heads=4, rows=20, columns=50, width=32)
    _check(cuda_kernels, (query * 20, key * 5, value, grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nan_goes_to_what_depends_on_it(cuda_kernels, dtype):
    query, key, value, _ = _inputs(dtype, heads=1, rows=20, columns=45, width=16)
    query = query.clone()
    query[0, 0, 3, 5] = float("nan")
    got, _ = cuda_kernels.attention(query, key, value, None, None, None, 0.0, False, 0.25)
    assert got[0, 0, 3].isnan().all()
    assert not got[0, 0, [0, 1, 2, *range(4, 20)]].isnan().any()
    hidden = key.clone()
    hidden[0, 0, 40] = float("nan")
    got, _ = cuda_kernels.attention(query[:, :, 4:], hidden, value, _padding(1, 45, 40), None, None, 0.0, False, 0.25)
    assert not got.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(cuda_kernels, dtype):
    """Rows of odd length, columns apart, memory that is not aligned: the same as of copies."""
    query = torch.randn(2, 3, 16, 20).to(dtype).transpose(2, 3)
    key = torch.randn(2, 3, 33, 32).to(dtype)[..., ::2]
    value = torch.randn(2 * 3 * 33 * 16 + 1).to(dtype)[1:].view(2, 3, 33, 16)
    grad = torch.randn(1, 1, 20, 16).to(dtype).expand(2, 3, 20, 16)
    got, gradients = _check(cuda_kernels, (query, key, value, grad))
    copies = [t.contiguous() for t in (query, key, value, grad)]
    again, gradients_again = _check(cuda_kernels, copies)
    assert torch.equal(got[0], again[0])
    for a, b in zip(gradients, gradients_again, strict=True):
        assert torch.equal(a, b)


def test_empty(cuda_kernels):
    for dtype in (torch.float32, torch.bfloat16):
        for sizes in [{"rows": 0}, {"columns": 0}, {"batch": 0}]:
            query, key, value, grad = _inputs(dtype, **sizes)
            bias = torch.randn(1, 2, 1, 1).to(dtype)
            output, logsumexp = cuda_kernels.attention(query, key, value, None, bias, None, 0.0, False, 1.0)
            assert output.shape == (*query.shape[:3], value.shape[3])
            assert (output == 0).all()
            assert (logsumexp == float("-inf")).all()
            arguments = (query, key, value, None, bias, None, output, logsumexp, 0.0, False, 1.0, True)
            for each in cuda_kernels.attention_backward(grad, *arguments):
                assert (each == 0).all()


def test_heads_that_are_too_wide_are_refused(cuda_kernels):
    for dtype, width in [(torch.float32, 257), (torch.float64, 129)]:
        query, key, value, _ = _inputs(dtype, rows=2, columns=2, width=width)
        with pytest.raises(RuntimeError, match="wide"):
            cuda_kernels.attention(query, key, value, None, None, None, 0.0, False, 1.0)


def test_the_backward_has_the_same_bits_in_every_run(cuda_kernels):
    tensors = _inputs(torch.bfloat16, batch=2, heads=2, kv_heads=1, rows=40, columns=70, width=32)
    bias = torch.randn(1, 2, 40, 70)
    first = _check(cuda_kernels, tensors, bias=bias, dropout_p=0.1)
    second = _check(cuda_kernels, tensors, bias=bias, dropout_p=0.1)
    for a, b in zip(first[1], second[1], strict=True):
        assert torch.equal(a, b)
