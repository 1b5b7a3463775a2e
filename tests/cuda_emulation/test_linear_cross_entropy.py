"""linear_cross_entropy.cu, emulated and on a GPU where there is one: judged by float64 and by the CPU's own error."""

from __future__ import annotations

import math

import pytest
import torch

from fastgan.nn.functional import linear_cross_entropy
from fastgan.ops import linear_cross_entropy as ops
from tests.cuda_emulation.build import needs_compiler

pytestmark = [needs_compiler, pytest.mark.kernel, pytest.mark.timeout(600)]


def exact(logits, target, bias, margin, gradient, smoothing, z):
    """(losses, gradient of the logits) in float64."""
    x = logits.double()
    if bias is not None:
        x = x + bias.double()
    hot = torch.nn.functional.one_hot(target, x.shape[1]).double()
    if margin is not None:
        x = x - hot * margin.double()[:, None]
    lse = x.logsumexp(-1)
    loss = (1 - smoothing) * (lse - (x * hot).sum(-1)) + smoothing * (lse - x.mean(-1)) + z * lse.square()
    if gradient is None:
        return loss, None
    slope = x.softmax(-1) * (1 + 2 * z * lse)[:, None] - (1 - smoothing) * hot - smoothing / x.shape[1]
    return loss, slope * gradient.double()[:, None]


def run(operators, logits, target, bias, margin, gradient, smoothing, z, want_loss=True):
    x = logits.clone(memory_format=torch.preserve_format)
    loss = torch.empty(len(x), dtype=x.dtype) if want_loss else None
    operators.linear_cross_entropy_rows(x, target, bias, margin, gradient, loss, smoothing, z)
    return loss, x


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.1, 1e-3)])
@pytest.mark.parametrize("classes", [1, 2, 31, 33, 511, 513, 3001])
def test_losses_and_gradients(cuda_kernels, classes, smoothing, z, dtype):
    torch.manual_seed(0)
    rows = 3
    logits = torch.randn(rows, classes, dtype=dtype) * 4
    target = torch.randint(0, classes, (rows,))
    gradient = torch.rand(rows, dtype=dtype)
    for bias, margin in ((None, None), (torch.randn(classes, dtype=dtype), torch.rand(rows, dtype=dtype))):
        arguments = (logits, target, bias, margin, gradient, smoothing, z)
        want_loss, want = exact(*arguments)
        loss, x = run(cuda_kernels, *arguments)
        cpu_loss, cpu = run(torch.ops.fastgan, *arguments)
        eps = torch.finfo(dtype).eps
        assert error(x, want) <= 2 * error(cpu, want) + 4 * eps
        # of one class the loss is z lse² alone, and else a rest of cancelled numbers
        assert (loss - want_loss).abs().max() <= 2 * (cpu_loss - want_loss).abs().max() + 8 * eps


def test_only_the_loss_or_only_the_gradient(cuda_kernels):
    logits, target = torch.randn(2, 40), torch.tensor([3, 39])
    want_loss, want = exact(logits, target, None, None, torch.ones(2), 0.0, 0.0)
    loss, _ = run(cuda_kernels, logits, target, None, None, None, 0.0, 0.0)
    torch.testing.assert_close(loss, want_loss.float())
    _, x = run(cuda_kernels, logits, target, None, None, torch.ones(2), 0.0, 0.0, want_loss=False)
    torch.testing.assert_close(x, want.float())


def test_rows_with_gaps(cuda_kernels):
    whole = torch.randn(3, 100)
    view, target = whole[:, :70], torch.tensor([0, 69, 5])
    _, want = exact(view, target, None, None, torch.ones(3), 0.0, 0.0)
    loss = torch.empty(3)
    before = whole[:, 70:].clone()
    cuda_kernels.linear_cross_entropy_rows(view, target, None, None, torch.ones(3), loss, 0.0, 0.0)
    torch.testing.assert_close(view, want.float())
    assert whole[:, 70:].equal(before)


def test_what_is_not_finite_stays_in_its_row(cuda_kernels):
    inf, nan = math.inf, math.nan
    logits = torch.randn(6, 600)
    logits[1, 5], logits[2, 590], logits[3, 7], logits[4] = nan, inf, -inf, -inf
    logits[5, :599] = -inf  # all the probability on the last
    target, gradient = torch.tensor([1, 2, 3, 8, 5, 599]), torch.ones(6)
    loss, x = run(cuda_kernels, logits, target, None, None, gradient, 0.0, 0.0)
    cpu_loss, cpu = run(torch.ops.fastgan, logits, target, None, None, gradient, 0.0, 0.0)
    assert loss.isnan().tolist() == [False, True, True, False, True, False] == cpu_loss.isnan().tolist()
    for row in (0, 3, 5):
        torch.testing.assert_close(x[row], cpu[row])
    assert x[1].isnan().all()
    assert x[4].isnan().all()


def test_logits_far_apart(cuda_kernels):
    logits = torch.randn(4, 700)
    logits[0, 3], logits[1] = 1e4, logits[1] - 1e4
    logits[2, 650], logits[3, 0] = 300.0, -3e38
    target = torch.tensor([3, 4, 5, 0])
    want_loss, want = exact(logits, target, None, None, torch.ones(4), 0.0, 0.0)
    loss, x = run(cuda_kernels, logits, target, None, None, torch.ones(4), 0.0, 0.0)
    torch.testing.assert_close(loss, want_loss.float())
    torch.testing.assert_close(x, want.float(), atol=1e-6, rtol=1e-4)


def test_a_target_outside_makes_its_row_nan_and_reads_nothing(cuda_kernels):
    """A host that looked at the targets would wait for the device."""
    logits = torch.randn(3, 50)
    loss, x = run(cuda_kernels, logits, torch.tensor([50, 1, -1]), None, None, torch.ones(3), 0.0, 0.0)
    assert loss.isnan().tolist() == x.isnan().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_gpus_16_bit_factors_give_float32_logits(emulated, monkeypatch, reduction):
    """The operator as it runs on a GPU: chunks, products of the factors as they are, the emulated row kernel."""
    dtypes = set()

    def product(a, b, out, add):
        dtypes.add((a.dtype, b.dtype, out.dtype))
        out.add_(a.float() @ b.float()) if add else out.copy_(a.float() @ b.float())

    monkeypatch.setattr(ops, "CHUNK_BYTES", 1)  # sixteen rows a chunk
    monkeypatch.setattr(ops, "_multiplies_16_bits", lambda device: True)
    monkeypatch.setattr(ops, "_widening_product", product)
    monkeypatch.setattr(ops, "_rows_kernel", emulated.linear_cross_entropy_rows)
    monkeypatch.setattr(ops, "autocast_dtype", torch.get_autocast_dtype)
    input, weight, bias = (torch.randn(*size).requires_grad_() for size in ((40, 8), (50, 8), (50,)))
    target = torch.randint(0, 50, (40,))
    target[[3, 30]] = -100
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(input, weight, target, bias, label_smoothing=0.1, reduction=reduction)
    assert loss.dtype == torch.float32
    assert dtypes <= {(torch.bfloat16, torch.bfloat16, torch.float32)}
    assert dtypes
    got = torch.autograd.grad(loss.sum(), (input, weight, bias))
    leaves = [t.detach().bfloat16().double().requires_grad_() for t in (input, weight)]
    exact_bias = bias.detach().double().requires_grad_()
    exact_loss = torch.nn.functional.cross_entropy(
        leaves[0] @ leaves[1].t() + exact_bias, target, label_smoothing=0.1, reduction=reduction
    )
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=1e-6)
    want = torch.autograd.grad(exact_loss.sum(), (*leaves, exact_bias))
    assert error(got[2], want[2]) < 1e-6
    # the logits' gradient is rounded before it is multiplied, and the result once more
    assert error(got[0], want[0]) < torch.finfo(torch.bfloat16).eps
    assert error(got[1], want[1]) < torch.finfo(torch.bfloat16).eps


def test_the_same_bits_again(cuda_kernels):
    arguments = (torch.randn(5, 1237), torch.randint(0, 1237, (5,)), None, None, torch.rand(5), 0.1, 1e-4)
    first, second = run(cuda_kernels, *arguments), run(cuda_kernels, *arguments)
    assert first[0].equal(second[0])
    assert first[1].equal(second[1])
