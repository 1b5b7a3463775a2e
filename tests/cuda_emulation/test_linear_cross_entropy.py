"""linear_cross_entropy.cu, emulated and on a GPU where there is one: judged by float64 and by the CPU's own error."""

from __future__ import annotations

import math

import pytest
import torch

import fastgan
from fastgan.nn.functional import linear_cross_entropy
from fastgan.ops import _linear_cross_entropy_loops as loops
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


def by_blocks(operators, logits, target, bias, margin, gradient, smoothing, z, *, block=64, gap=0, dtype=None):
    """As ``run``: the statistics block by block, then the gradient, in place if it is ``dtype``, backwards."""
    rows, classes = logits.shape
    loss, state = torch.empty(rows), torch.empty(rows, 4, dtype=torch.float64)
    out = torch.empty(rows, classes, dtype=dtype or torch.float32)
    for ahead in (True, False):
        begins = range(0, classes, block)
        for begin in begins if ahead else reversed(begins):
            columns = slice(begin, min(begin + block, classes))
            buffer = torch.full((rows, block + gap), math.pi)
            x = buffer[:, : columns.stop - begin]
            x.copy_(logits[:, columns])
            where = (x, begin, classes, target, bias, margin, state)
            if ahead:
                operators.linear_cross_entropy_statistics(*where, loss, smoothing, z)
                assert x.equal(logits[:, columns]) or logits.isnan().any()
            else:
                to = buffer.view(out.dtype)[:, : x.shape[1]]
                operators.linear_cross_entropy_gradient(*where, gradient, to, smoothing)
                out[:, columns] = to
            assert (buffer[:, x.shape[1] :] == math.pi).all()
    return loss, out, state


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


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.1, 1e-3)])
@pytest.mark.parametrize(
    ("classes", "block", "gap"),
    [(1, 1, 0), (2, 4, 0), (65, 64, 0), (511, 128, 4), (513, 130, 1), (9001, 4608, 0), (9001, 9001, 3)],
)
def test_blocks_of_classes(cuda_kernels, classes, block, gap, smoothing, z, dtype):
    """Aligned rows and others, more of them than a thread holds at a time, a narrower gradient in place."""
    rows = 3
    logits, target = torch.randn(rows, classes) * 4, torch.tensor([0, classes - 1, classes // 2])
    gradient = torch.rand(rows)
    for bias, margin in ((None, None), (torch.randn(classes), torch.rand(rows))):
        arguments = (logits, target, bias, margin, gradient, smoothing, z)
        want_loss, want = exact(*arguments)
        loss, x, state = by_blocks(cuda_kernels, *arguments, block=block, gap=gap, dtype=dtype)
        cpu_loss, cpu = run(torch.ops.fastgan, *arguments)
        eps = torch.finfo(torch.float32).eps
        rounding = 0 if dtype is None else torch.finfo(dtype).eps / 2
        assert error(x, want) <= 2 * error(cpu, want) + 4 * eps + rounding
        assert (loss - want_loss).abs().max() <= 2 * (cpu_loss - want_loss).abs().max() + 8 * eps
        torch.testing.assert_close(state[:, 3], want.gather(1, target[:, None])[:, 0], rtol=1e-5, atol=1e-6)


def test_a_narrow_gradient_in_place_is_the_one_beside(emulated):
    """Whatever order the threads come in: the emulator's are behind one another as far as barriers let them."""
    arguments = (torch.randn(2, 9000), torch.tensor([5, 8999]), None, None, torch.rand(2), 0.1, 0.0)
    narrow = by_blocks(emulated, *arguments, block=9024, dtype=torch.bfloat16)[1]
    assert narrow.equal(by_blocks(emulated, *arguments, block=9024)[1].bfloat16())


def test_blocks_keep_what_is_not_finite_in_its_row(cuda_kernels):
    inf, nan = math.inf, math.nan
    logits = torch.randn(8, 600)
    logits[1, 5], logits[2, 590], logits[3, 7], logits[4] = nan, inf, -inf, -inf
    logits[5, :599] = -inf  # all the probability on the last
    logits[6] -= 1e4
    logits[7, 3] = 1e4
    target, gradient = torch.tensor([1, 2, 3, 8, 5, 599, 600, -1]), torch.ones(8)
    target[6], target[7] = 3, 3
    loss, x, _ = by_blocks(cuda_kernels, logits, target[:8], None, None, gradient, 0.0, 0.0)
    cpu_loss, cpu = run(torch.ops.fastgan, logits, target, None, None, gradient, 0.0, 0.0)
    assert loss.isnan().tolist() == cpu_loss.isnan().tolist() == [False, True, True, False, True, False, False, False]
    for row in (0, 3, 5, 6, 7):
        torch.testing.assert_close(x[row], cpu[row], rtol=1e-5, atol=1e-6)
    assert x[1].isnan().all()
    assert x[4].isnan().all()
    loss, x, _ = by_blocks(cuda_kernels, logits[:3], torch.tensor([600, 2, -1]), None, None, gradient[:3], 0.0, 0.0)
    assert loss.isnan().tolist() == [True, True, True]
    assert x.isnan().all()


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


@pytest.fixture
def as_on_a_gpu(emulated, monkeypatch):
    """The operator as it runs on a GPU: blocks, products of the factors as they are, the emulated kernels."""
    dtypes = set()

    def product(a, b, out, add):
        dtypes.add((a.dtype, b.dtype, out.dtype))
        out.add_(a.float() @ b.float()) if add else out.copy_(a.float() @ b.float())

    monkeypatch.setattr(loops, "_multiplies_16_bits", lambda device: True)
    monkeypatch.setattr(loops, "_widening_product", product)
    for name in ("rows", "statistics", "gradient"):
        monkeypatch.setattr(loops, f"_{name}_kernel", getattr(emulated, f"linear_cross_entropy_{name}"))
    monkeypatch.setattr(ops, "autocast_dtype", torch.get_autocast_dtype)
    monkeypatch.setattr(loops, "_ALIGNED", 16)
    monkeypatch.setattr(loops, "BLOCK_BYTES", 4 * 16 * 40)
    return dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1000, 16])  # at a time
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("reduction", "radius"), [("none", 0.0), ("mean", 0.0), ("mean", 0.3)])
def test_a_gpus_16_bit_factors_give_float32_logits(
    as_on_a_gpu, monkeypatch, reduction, radius, with_bias, tokens, dtype
):
    monkeypatch.setattr(loops, "BLOCK_TOKENS", tokens)
    input, weight, bias = (torch.randn(*size).requires_grad_() for size in ((40, 8), (50, 8), (50,)))
    target = torch.randint(0, 50, (40,))
    target[[3, 30]] = -100
    given = (input, weight, bias) if with_bias else (input, weight)
    settings = {"label_smoothing": 0.1, "reduction": reduction, "z_loss": 1e-3, "adversarial_radius": radius}
    with torch.autocast("cpu", dtype):
        loss = linear_cross_entropy(input, weight, target, bias if with_bias else None, **settings)
    assert loss.dtype == torch.float32
    assert as_on_a_gpu <= {(dtype, dtype, torch.float32)}
    assert as_on_a_gpu
    got = torch.autograd.grad(loss.sum(), given)
    leaves = [t.detach().to(dtype).double().requires_grad_() for t in (input, weight)]
    exact_bias = bias.detach().double().requires_grad_()
    with fastgan.use("reference"):
        exact_loss = linear_cross_entropy(leaves[0], leaves[1], target, exact_bias if with_bias else None, **settings)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=1e-6)
    want = torch.autograd.grad(exact_loss.sum(), (*leaves, exact_bias)[: len(given)])
    if with_bias:
        assert error(got[2], want[2]) < 1e-6
    # the logits' gradient is rounded before it is multiplied, and the result once more
    assert error(got[0], want[0]) < torch.finfo(dtype).eps
    assert error(got[1], want[1]) < torch.finfo(dtype).eps


def test_a_gpus_means_of_float16_are_divided_when_they_are_float32(as_on_a_gpu):
    """A loss is scaled after the forward, which has made the gradients already."""
    input, weight = torch.randn(40, 8).half().requires_grad_(), torch.randn(50, 8).half().requires_grad_()
    target = torch.full((40,), -100)
    target[7] = 3
    tiny = linear_cross_entropy(input.detach(), weight, target) * 2.0**-20
    many = [t.detach().double().requires_grad_() for t in (input, weight)]
    assert tiny.isfinite()
    loss = linear_cross_entropy(input, weight, torch.arange(40))
    precomputed = torch.ops.fastgan.linear_cross_entropy(
        input.detach(), weight.detach(), torch.arange(40), None, -100, 0.0, ops.MEAN, 0.0, 0.0, [True, True, False]
    )
    with fastgan.use("reference"):
        want = torch.autograd.grad(linear_cross_entropy(*many, torch.arange(40)), many)
    assert precomputed[1].dtype == precomputed[2].dtype == torch.float32
    for got, exactly in zip(precomputed[1:3], want, strict=True):
        assert error(got, exactly) < torch.finfo(torch.float16).eps
    assert loss.isfinite()


def test_a_gpus_gradients_of_bfloat16_are_of_its_memory(as_on_a_gpu):
    out = torch.ops.fastgan.linear_cross_entropy(
        torch.randn(5, 8).bfloat16(), torch.randn(50, 8).bfloat16(), torch.arange(5), None, -100, 0.0, ops.MEAN, 0.0,
        0.0, [True, True, True],
    )  # fmt: skip
    assert [each.dtype for each in out] == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]


def _on_a_device(dtype, with_bias):
    if not ops.has_kernel("cuda"):
        pytest.skip(f"no CUDA kernels on a device: {fastgan._cuda.status()}")
    input, weight, bias = torch.randn(300, 48), torch.randn(1001, 48), torch.randn(1001)
    target = torch.randint(0, 1001, (300,))
    target[::7] = -100
    leaves = [t.cuda().to(dtype).requires_grad_() for t in (input, weight, bias)[: 2 + with_bias]]
    return leaves, target.cuda()


def _values(leaves, target, **settings):
    loss = linear_cross_entropy(leaves[0], leaves[1], target, *leaves[2:], **settings)
    scale = torch.full_like(loss, 1024.0)  # float16 has no numbers for a mean's gradient
    return [loss.detach(), *torch.autograd.grad(loss, leaves, scale)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("radius", [0.0, 0.3])
def test_the_whole_operator_on_a_device(monkeypatch, dtype, with_bias, radius):
    leaves, target = _on_a_device(dtype, with_bias)
    settings = {"label_smoothing": 0.1, "z_loss": 1e-3, "adversarial_radius": radius}
    exactly = [t.detach().cpu().double().requires_grad_() for t in leaves]
    with fastgan.use("reference"):
        want = _values(exactly, target.cpu(), **settings)
    monkeypatch.setattr(loops, "CUDA_CHUNK_BYTES", 100 * 4 * 1001)  # several chunks, several blocks
    for block, tokens in ((1 << 28, 1 << 20), (300 * 4 * 256, 1 << 20), (300 * 4 * 256, 100)):
        monkeypatch.setattr(loops, "BLOCK_BYTES", block)
        monkeypatch.setattr(loops, "BLOCK_TOKENS", tokens)
        got, again = _values(leaves, target, **settings), _values(leaves, target, **settings)
        assert all(map(torch.equal, got, again))
        for a, b in zip(got, want, strict=True):
            assert error(a.cpu(), b) < 2 * torch.finfo(dtype).eps + (1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_whole_operator_in_a_graph(monkeypatch, dtype):
    leaves, target = _on_a_device(dtype, True)
    monkeypatch.setattr(loops, "BLOCK_BYTES", 300 * 4 * 256)
    want = _values(leaves, target)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _values(leaves, target)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = _values(leaves, target)
    graph.replay()
    for a, b in zip(got, want, strict=True):
        assert error(a, b.double()) < 2 * torch.finfo(dtype).eps + 1e-6


def test_a_target_out_of_range_is_refused_on_a_device():
    leaves, target = _on_a_device(torch.bfloat16, False)
    target[5] = 1001
    with pytest.raises(IndexError, match="Target 1001 is out of bounds"):
        linear_cross_entropy(*leaves, target)
    target[:] = -100
    assert linear_cross_entropy(*leaves, target).isnan()


@pytest.mark.parametrize("ignored", [(), (0, 3), (0, 1, 2, 3)])
def test_a_gpus_tokens_that_count_by_one_question(ignored):
    target = torch.tensor([4, 1, 0, 2])
    target[list(ignored)] = -100
    kept = target != -100
    index, targets = loops._kept_by_one_question(kept, target, 5)
    assert targets.equal(target[kept])
    assert index is None if not ignored else index.tolist() == kept.nonzero()[:, 0].tolist()
    for wrong, said in ((5, "Target 5 is"), (-1, "Target -1 is")):
        if not kept.any():
            break
        target[kept] = torch.where(torch.arange(kept.sum()) == 0, wrong, 1)
        with pytest.raises(IndexError, match=said):
            loops._kept_by_one_question(kept, target, 5)


def test_blocks_cover_the_classes_within_the_budget():
    for tokens, classes, features in ((8192, 50257, 768), (8192, 128256, 2048), (3, 50257, 768), (70000, 1000, 8)):
        chunk, block = loops._tokens_and_classes_per_block(tokens, classes, features)
        assert 4 * chunk * block <= loops.BLOCK_BYTES
        assert 1 <= block <= classes
        assert chunk <= loops.BLOCK_TOKENS
        assert block == classes or block % loops._ALIGNED == 0
    assert loops._tokens_and_classes_per_block(8192, 50257, 768) == (8192, 2816)  # 22 x 6 tiles, one round
    assert loops._tokens_and_classes_per_block(300, 50257, 768) == (300, 50257)
    for classes, block, sizes in (
        (50257, 50257, [50240, 17]),
        (20000, 9984, [9984, 9984, 32]),
        (16384, 8192, [8192] * 2),
        (100, 64, [64, 36]),
        (7, 7, [7]),
    ):
        blocks = loops._blocks_of_classes(classes, block)
        assert [b.stop - b.start for b in blocks] == sizes
        assert [b.start for b in blocks] == [0, *(b.stop for b in blocks[:-1])]


def test_the_same_bits_again(cuda_kernels):
    arguments = (torch.randn(5, 1237), torch.randint(0, 1237, (5,)), None, None, torch.rand(5), 0.1, 1e-4)
    first, second = run(cuda_kernels, *arguments), run(cuda_kernels, *arguments)
    assert first[0].equal(second[0])
    assert first[1].equal(second[1])
