"""The LM head and its loss against cross_entropy(linear(...)) in float64: values and derivatives of every order."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import fastgan
from fastgan.nn.functional import linear_cross_entropy
from fastgan.ops import _linear_cross_entropy_loops as loops
from fastgan.ops import linear_cross_entropy as ops
from fastgan.ops.product import tiles_are_used
from tests.derivatives import check_derivatives

T, H, V = 11, 6, 37

SETTINGS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"adversarial_radius": 0.3},
    {"label_smoothing": 0.2, "z_loss": 1e-2, "adversarial_radius": 0.3, "ignore_index": 5},
]


def plain(input, weight, target, bias=None, ignore_index=-100, label_smoothing=0.0, reduction="mean", **extra):
    """The definition, written with torch's own cross_entropy."""
    radius, z_loss = extra.get("adversarial_radius", 0.0), extra.get("z_loss", 0.0)
    logits = F.linear(input, weight, bias)
    if radius:
        hot = torch.arange(weight.shape[0]) == target[:, None]
        logits = logits - hot * (radius * input.norm(dim=-1, keepdim=True))
    loss = F.cross_entropy(logits, target, None, None, ignore_index, None, "none", label_smoothing)
    kept = target != ignore_index
    loss = torch.where(kept, loss + z_loss * logits.logsumexp(-1) ** 2, 0)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / kept.sum()}[reduction]


def inputs(tokens=T, features=H, classes=V, dtype=torch.float64, ignored=(), ignore_index=-100, grad=True):
    input = torch.randn(tokens, features, dtype=torch.float64).to(dtype).requires_grad_(grad)
    weight = torch.randn(classes, features, dtype=torch.float64).to(dtype).requires_grad_(grad)
    bias = torch.randn(classes, dtype=torch.float64).to(dtype).requires_grad_(grad)
    target = torch.randint(0, classes, (tokens,))
    target[list(ignored)] = ignore_index
    return input, weight, target, bias


def gradients(function, input, weight, target, bias, upstream=None, **settings):
    loss = function(input, weight, target, bias, **settings)
    upstream = torch.ones_like(loss) if upstream is None else upstream
    return loss, *torch.autograd.grad(loss, (input, weight, bias), upstream.to(loss.dtype))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_equals_the_definition(settings, reduction):
    args = inputs(ignored=(2, 7), ignore_index=settings.get("ignore_index", -100))
    got = gradients(linear_cross_entropy, *args, reduction=reduction, **settings)
    torch.testing.assert_close(got, gradients(plain, *args, reduction=reduction, **settings), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_reference_equals_the_kernel(reduction):
    args = inputs(ignored=(0, 10))
    got = gradients(linear_cross_entropy, *args, reduction=reduction, **SETTINGS[1])
    with fastgan.use("reference"):
        expected = gradients(linear_cross_entropy, *args, reduction=reduction, **SETTINGS[1])
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_R39_every_upstream_gradient_reaches_every_input(reduction):
    args = inputs(ignored=(4,))
    upstream = torch.randn(T if reduction == "none" else (), dtype=torch.float64)
    got = gradients(linear_cross_entropy, *args, upstream, reduction=reduction)
    torch.testing.assert_close(got, gradients(plain, *args, upstream, reduction=reduction), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("ignore_index", [-100, 3, -1, 10**6])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_R40_label_smoothing_does_not_count_ignored_tokens(ignore_index, reduction):
    input, weight, target, bias = inputs(ignored=(1, 5, 8), ignore_index=ignore_index)
    settings = {"label_smoothing": 0.3, "reduction": reduction}
    kept = target != ignore_index
    loss, dx, dw, db = gradients(
        linear_cross_entropy, input, weight, target, bias, ignore_index=ignore_index, **settings
    )
    alone = gradients(linear_cross_entropy, input[kept], weight, target[kept], bias, **settings)
    assert not dx[~kept].any()
    if reduction == "none":
        assert not loss[~kept].any()
        loss = loss[kept]
    torch.testing.assert_close((loss, dw, db), (alone[0], alone[2], alone[3]), rtol=1e-11, atol=1e-12)


def test_all_ignored_is_as_in_torch():
    args = inputs(ignored=range(T))
    for reduction in ("mean", "sum", "none"):
        got = gradients(linear_cross_entropy, *args, reduction=reduction)
        torch.testing.assert_close(got, gradients(plain, *args, reduction=reduction), equal_nan=True)
    assert linear_cross_entropy(*args).isnan()


def _asked(*args, gradients=(True, True, True), reduction=ops.MEAN, settings=(-100, 0.1, 1e-2, 0.2)):
    ignore_index, smoothing, z_loss, radius = settings
    return (*args, ignore_index, smoothing, reduction, z_loss, radius, list(gradients))


@pytest.mark.parametrize("reduction", [ops.NONE, ops.MEAN, ops.SUM])
def test_opcheck(reduction):
    args = inputs(ignored=(3,))
    torch.library.opcheck(ops.linear_cross_entropy, _asked(*args, reduction=reduction))
    grad = torch.randn(T if reduction == ops.NONE else (), dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(ops.linear_cross_entropy_backward, _asked(grad, *args, reduction=reduction))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[4]])
def test_gradcheck(settings, reduction):
    input, weight, target, bias = inputs(5, 3, 7, ignored=(2,), ignore_index=settings.get("ignore_index", -100))

    def f(input, weight, bias):
        return linear_cross_entropy(input, weight, target, bias, reduction=reduction, **settings)

    fast = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(f, (input, weight, bias), **fast)
    assert torch.autograd.gradgradcheck(f, (input, weight, bias), check_batched_grad=True)


@pytest.mark.parametrize("reduction", [pytest.param("none", marks=pytest.mark.slow), "mean"])
def test_derivative_matrix(reduction):
    weight, base = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    target = torch.tensor([3, -100, 8])
    settings = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.02, "adversarial_radius": 0.1}

    def using(function):
        def f(x):
            return function(x, weight * x.mean(), target, base * x.sum(), **settings)

        return f

    check_derivatives(using(linear_cross_entropy), using(plain), torch.randn(3, 4, dtype=torch.float64))


def test_adversarial_radius_is_the_worst_perturbation():
    """No move of the target's embedding of that length gives a larger loss, and the best one gives this loss."""
    input, weight, target, _ = inputs(1, grad=False)
    radius = 0.7
    loss = linear_cross_entropy(input, weight, target, adversarial_radius=radius)
    for direction in (-input[0], *torch.randn(200, H, dtype=torch.float64)):
        moved = weight.clone()
        moved[target[0]] += radius * direction / direction.norm()
        found = F.cross_entropy(input @ moved.t(), target)
        assert found <= loss + 1e-12
        if direction is not None and torch.equal(direction, -input[0]):
            torch.testing.assert_close(found, loss)


def test_adversarial_radius_at_zero_features():
    input, weight, target, bias = inputs()
    input = torch.cat([input[:3], torch.zeros(1, H, dtype=torch.float64)]).detach().requires_grad_()
    loss = linear_cross_entropy(input, weight, target[:4], bias, adversarial_radius=0.5)
    (dx,) = torch.autograd.grad(loss, input, create_graph=True)
    assert dx.isfinite().all()
    assert torch.autograd.grad(dx.square().sum(), input)[0].isfinite().all()


# ---- the kernel: chunks, instruction sets, dtypes ----


@pytest.fixture
def small_chunks(monkeypatch):
    """Sixteen tokens a chunk, and blocks of sixteen classes of a 16-bit weight."""
    monkeypatch.setattr(loops, "CHUNK_BYTES", 1)
    monkeypatch.setattr(loops, "TILE_CHUNK_BYTES", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [1, 7, 1024, 1031, 2100])
def test_every_instruction_set(capability, small_chunks, classes, dtype):
    args = inputs(37, 5, classes, dtype, ignored=(1, 20), ignore_index=-7)
    settings = {**SETTINGS[4], "ignore_index": -7}
    exact = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in args]
    rtol, atol = (2e-5, 2e-6) if dtype == torch.float32 else (1e-11, 1e-12)
    for reduction in ("none", "mean"):
        got = gradients(linear_cross_entropy, *args, reduction=reduction, **settings)
        expected = gradients(plain, *exact, reduction=reduction, **settings)
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_half_precision_accumulates_in_float32(small_chunks, without_tiles, dtype, reduction):
    args = inputs(40, 8, 50, dtype, ignored=(3,))
    exact = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in args]
    got = gradients(linear_cross_entropy, *args, reduction=reduction)
    assert all(t.dtype == dtype for t in got)
    expected = gradients(plain, *exact, reduction=reduction)
    # one rounding of the result, nothing in between
    torch.testing.assert_close([t.double() for t in got], list(expected), rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.kernel
@pytest.mark.skipif(not tiles_are_used(), reason="this CPU has no AMX")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_tiles_round_the_gradient_of_the_logits_alone(small_chunks, reduction):
    """Losses and the bias's gradient as with float32's products, the others no further from float64 than torch's."""
    args = inputs(300, 70, 1001, torch.bfloat16, ignored=(3,))
    exact = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in args]
    upstream = torch.rand(300 if reduction == "none" else ())
    got = gradients(linear_cross_entropy, *args, upstream.bfloat16(), reduction=reduction)
    expected = gradients(plain, *exact, upstream.bfloat16().double(), reduction=reduction)
    theirs = gradients(plain, *args, upstream.bfloat16(), reduction=reduction)
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(got[0].double(), expected[0], rtol=0.51 * eps, atol=1e-6)
    torch.testing.assert_close(got[3].double(), expected[3], rtol=0.51 * eps, atol=1e-6)
    for ours, their, right in zip(got[1:3], theirs[1:3], expected[1:3], strict=True):
        error, bound = (ours.double() - right).norm(), (their.double() - right).norm()
        assert error <= bound, (error / right.norm(), bound / right.norm())
        assert error <= eps * right.norm()


def test_float16_gradients_survive_under_a_loss_scale():
    """Computed for an upstream gradient of 1 they would be below float16's smallest number."""
    input, weight, target, _ = inputs(3000, 4, 5, torch.float16)
    (linear_cross_entropy(input * 1e-2, weight * 1e-2, target) * 65504.0).backward()
    exact = input.detach().double().requires_grad_()
    (plain(exact * 1e-2, weight.detach().double() * 1e-2, target) * 65504.0).backward()
    assert exact.grad.abs().median() / 65504.0 < 6e-8
    torch.testing.assert_close(input.grad.double(), exact.grad, rtol=2e-2, atol=1e-4)


@pytest.mark.kernel
def test_autocast_computes_in_float32(without_tiles):
    input, weight, target, bias = inputs(dtype=torch.float32)
    expected = gradients(linear_cross_entropy, input, weight, target, bias)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gradients(linear_cross_entropy, input, weight, target, bias), expected)
        mixed = linear_cross_entropy(input.bfloat16(), weight, target, bias)
        with fastgan.use("reference"):
            torch.testing.assert_close(linear_cross_entropy(input.bfloat16(), weight, target, bias), mixed)
    assert mixed.dtype == torch.float32


# ---- autocast as it is on a GPU, where the factors are of the lower type ----


@pytest.fixture
def autocast_as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(ops, "autocast_dtype", torch.get_autocast_dtype)


def test_autocast_lowers_the_factors_for_a_gpu_alone():
    input, weight, _, bias = inputs(dtype=torch.float32)
    cast = lambda device, *tensors: [t if t is None else t.dtype for t in ops.autocast(device, *tensors)]
    with torch.autocast("cpu", torch.float16):
        assert cast("cpu", input.bfloat16(), weight, bias.half()) == [torch.float32] * 3
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        assert cast("cuda", input, weight, bias) == [torch.bfloat16, torch.bfloat16, torch.float32]
        assert cast("cuda", input.half(), weight, None) == [torch.bfloat16, torch.bfloat16, None]
        assert cast("cuda", input.double(), weight.double(), bias.double()) == [torch.float64] * 3
    finally:
        torch.set_autocast_dtype("cuda", before)


@pytest.mark.parametrize("implementation", ["kernels", "reference"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.usefixtures("autocast_as_on_a_gpu", "without_tiles")
def test_lowered_factors_and_a_loss_that_is_never_rounded(reduction, implementation):
    args = inputs(40, 8, 50, torch.float32, ignored=(3,))
    input, weight, target, bias = args
    upstream = torch.rand(40 if reduction == "none" else ())
    lowered = [t.detach().bfloat16().double() for t in (input, weight)]
    exact = [t.requires_grad_() for t in (*lowered, bias.detach().double())]
    expected = gradients(plain, *exact[:2], target, exact[2], upstream, reduction=reduction)
    with fastgan.use(implementation), torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(*args, reduction=reduction)
    got = (loss, *torch.autograd.grad(loss, (input, weight, bias), upstream))
    assert all(t.dtype == torch.float32 for t in got)
    torch.testing.assert_close([got[0], got[3]], [expected[0], expected[3]], rtol=1e-5, atol=1e-6, check_dtype=False)
    # those of features and weight pass through the lower type
    torch.testing.assert_close(
        got[1:3], expected[1:3], rtol=0.51 * torch.finfo(torch.bfloat16).eps, atol=1e-6, check_dtype=False
    )


@pytest.mark.kernel  # the reference is PyTorch's own operators, whose backward autocast does lower
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_backward_inside_autocast_gives_the_same_bits(monkeypatch, reduction, gpu):
    if gpu:
        monkeypatch.setattr(ops, "autocast_dtype", torch.get_autocast_dtype)
    wanted = lambda args: (args[0], args[1], args[3])
    for forward_too in (False, True):  # in autocast
        args = inputs(40, 8, 50, torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=forward_too):
            loss = linear_cross_entropy(*args, reduction=reduction).sum()
        results = []
        for inside in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                first = torch.autograd.grad(loss, wanted(args), retain_graph=True)
                once = torch.autograd.grad(loss, args[0], create_graph=True)[0]
                penalty = once.square().sum()
                second = torch.autograd.grad(penalty, wanted(args))
            results.append([*first, *second])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.kernel
def test_autocast_compiles_and_the_raw_operator_obeys_it(autocast_as_on_a_gpu):
    args = inputs(dtype=torch.float32, ignored=(2,))
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(linear_cross_entropy, *args)
        raw = ops.linear_cross_entropy(*args, -100, 0.0, ops.MEAN, 0.0, 0.0, [False] * 3)[0]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(*args, **settings):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(*args, **settings)

    torch.testing.assert_close(gradients(compiled, *args), expected)
    assert raw.equal(expected[0])


def test_the_row_kernel_gives_the_same_bits_for_every_number_of_threads():
    logits, target = torch.randn(33, 3001), torch.randint(0, 3001, (33,))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        rows, loss = logits.clone(), torch.empty(33)
        torch.ops.fastgan.linear_cross_entropy_rows(rows, target, None, None, torch.ones(33), loss, 0.1, 1e-3)
        results.append((rows, loss))
    for rows, loss in results[1:]:
        assert torch.equal(rows, results[0][0])
        assert torch.equal(loss, results[0][1])


def test_one_call_is_like_the_next():
    args = inputs(300, 16, 500, torch.float32)
    first = gradients(linear_cross_entropy, *args)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(linear_cross_entropy, *args), strict=True))


# ---- extremes ----


@pytest.mark.kernel
def test_confident_and_masked_logits():
    """A large margin loses no digits, a vocabulary masked by -inf has no NaN."""
    weight = torch.eye(4, dtype=torch.float32)
    loss = linear_cross_entropy(weight * 30.0, weight, torch.arange(4), reduction="none")
    torch.testing.assert_close(
        loss.double(), torch.full((4,), 3 * 9.357622968840175e-14).double(), rtol=0.2, atol=1e-13
    )
    bias = torch.zeros(2000)
    bias[:1990] = float("-inf")
    input, weight = torch.randn(5, 3).requires_grad_(), torch.randn(2000, 3)
    target = torch.arange(1990, 1995)
    got = linear_cross_entropy(input, weight, target, bias)
    torch.testing.assert_close(got, F.cross_entropy(F.linear(input, weight, bias), target))
    got.backward()
    assert input.grad.isfinite().all()


def test_nan_stays_in_its_row():
    input, weight, target, bias = inputs()
    with torch.no_grad():
        input[3, 1] = float("nan")
    loss, dx, _, _ = gradients(linear_cross_entropy, input, weight, target, bias, reduction="none")
    bad = torch.arange(T) == 3
    assert loss.isnan().equal(bad)
    assert dx.isnan().any(1).equal(bad)
    assert linear_cross_entropy(input, weight, target).isnan()


@pytest.mark.parametrize(("tokens", "features"), [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_empty(tokens, features, reduction):
    args = inputs(tokens, features, 6)
    got = gradients(linear_cross_entropy, *args, reduction=reduction)
    expected = gradients(plain, *args, reduction=reduction)
    torch.testing.assert_close(got, expected, equal_nan=True)


# ---- what is accepted ----


def test_strides():
    base = inputs(grad=False)
    expected = linear_cross_entropy(*base)
    input, weight, target, bias = base
    views = (
        input.t().contiguous().t(),
        torch.stack([weight, weight], -1)[..., 0],
        torch.stack([target, target], -1)[:, 1],
        torch.stack([bias, bias], -1)[:, 0],
    )
    torch.testing.assert_close(linear_cross_entropy(*views), expected)
    row = input[:1].expand(T, H)
    torch.testing.assert_close(linear_cross_entropy(row, weight, target), plain(row, weight, target))


@pytest.mark.parametrize("lead", [(), (2, 3)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_leading_dimensions(lead, reduction):
    input, weight = torch.randn(*lead, H), torch.randn(V, H)
    target = torch.randint(0, V, lead)
    got = linear_cross_entropy(input, weight, target, reduction=reduction)
    assert got.shape == (lead if reduction == "none" else ())
    expected = plain(input.reshape(-1, H), weight, target.reshape(-1), reduction=reduction)
    torch.testing.assert_close(got, expected.reshape(got.shape))
    assert linear_cross_entropy(input, weight, target.to(torch.uint8)).isfinite()


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch.nn.functional has no linear_cross_entropy")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_equals_torchs_own_function(reduction):
    input, weight, target, bias = inputs(ignored=(2,), grad=False)
    settings = {"reduction": reduction, "label_smoothing": 0.1}
    expected = F.linear_cross_entropy(input, weight, target, linear_bias=bias, **settings)
    torch.testing.assert_close(linear_cross_entropy(input, weight, target, bias, **settings), expected)
    probabilities = torch.rand(T, V, dtype=torch.float64).softmax(-1)
    expected = F.linear_cross_entropy(input, weight, probabilities, linear_bias=bias, **settings)
    torch.testing.assert_close(linear_cross_entropy(input, weight, probabilities, bias, **settings), expected)
    weight, target = torch.randn(V, 2, H, dtype=torch.float64), torch.randint(0, V, (T, 2))
    expected = F.linear_cross_entropy(input, weight, target, **settings)
    torch.testing.assert_close(linear_cross_entropy(input, weight, target, **settings), expected)


def test_tied_embedding():
    embedding = torch.nn.Embedding(V, H).double()
    ids, target = torch.randint(0, V, (T,)), torch.randint(0, V, (T,))

    def gradient(function):
        embedding.zero_grad()
        function(embedding(ids).tanh(), embedding.weight, target).backward()
        return embedding.weight.grad.clone()

    torch.testing.assert_close(gradient(linear_cross_entropy), gradient(plain))


def test_backward_again_and_gradients_of_our_own():
    """The forward's gradients are handed over without a copy only where the graph is freed."""
    args = inputs()
    loss = linear_cross_entropy(*args)
    once = torch.autograd.grad(loss, (args[0], args[1], args[3]), retain_graph=True)
    kept = [g.clone() for g in once]
    for gradient in once:
        gradient.zero_()
    (3.0 * loss).backward()
    torch.testing.assert_close([args[0].grad, args[1].grad, args[3].grad], [3.0 * g for g in kept])
    loss = linear_cross_entropy(*args)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(args[1].grad, 5.0 * kept[1])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_batch_of_upstream_gradients(reduction):
    args = inputs()
    loss = linear_cross_entropy(*args, reduction=reduction)
    wanted = (args[0], args[1], args[3])
    upstream = torch.randn(3, *loss.shape, dtype=loss.dtype)
    each = [torch.autograd.grad(loss, wanted, u, retain_graph=True) for u in upstream]
    batched = torch.autograd.grad(loss, wanted, upstream, is_grads_batched=True)
    torch.testing.assert_close(list(batched), [torch.stack(g) for g in zip(*each, strict=True)])


@pytest.mark.kernel
def test_frozen_weight_has_no_gradient_computed(monkeypatch):
    input, weight, target, _ = inputs()
    asked = []
    chunked = loops.chunked
    monkeypatch.setattr(loops, "chunked", lambda *a, **k: asked.append(list(a[10])) or chunked(*a, **k))
    linear_cross_entropy(input, weight.detach(), target).backward()
    with torch.no_grad():
        linear_cross_entropy(input, weight, target)
    assert asked == [[True, False, False], [False, False, False]]


REFUSED = {
    "class too large": (IndexError, "out of bounds", {"target": torch.full((T,), V)}),
    "class negative": (IndexError, "out of bounds", {"target": torch.full((T,), -1)}),
    "fewer targets": (ValueError, "target", {"target": torch.zeros(T - 1, dtype=torch.int64)}),
    "target of another rank": (RuntimeError, "target", {"target": torch.zeros(T, 1, dtype=torch.int64)}),
    "int32 target": (RuntimeError, "int64", {"target": torch.zeros(T, dtype=torch.int32)}),
    "float target": (RuntimeError, "target", {"target": torch.zeros(T)}),
    "other features": (RuntimeError, "input", {"weight": torch.zeros(V, H + 1, dtype=torch.float64)}),
    "other dtype": (RuntimeError, "weight", {"weight": torch.zeros(V, H)}),
    "bias too short": (RuntimeError, "bias", {"bias": torch.zeros(V - 1, dtype=torch.float64)}),
    "integers": (RuntimeError, "input", {"input": torch.zeros(T, H, dtype=torch.int64)}),
    "other device": (RuntimeError, "weight", {"weight": torch.zeros(V, H, dtype=torch.float64, device="meta")}),
    "reduction": (ValueError, "reduction", {"reduction": "average"}),
    "smoothing": (RuntimeError, "label_smoothing", {"label_smoothing": 1.5}),
    "z_loss": (ValueError, "z_loss", {"z_loss": -1.0}),
    "radius": (ValueError, "adversarial_radius", {"adversarial_radius": -1.0}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    exception, message, changed = REFUSED[case]
    given = dict(zip(("input", "weight", "target", "bias"), inputs(grad=False), strict=True))
    with pytest.raises(exception, match=message):
        linear_cross_entropy(**{**given, **changed})


@pytest.mark.kernel
def test_the_logits_are_never_whole():
    """4,096 tokens times 20,000 classes are 328 MB; the gradients that come out, 3 MB."""
    code = """
import resource, torch
from fastgan.nn.functional import linear_cross_entropy
def step(tokens):
    x, w = torch.randn(tokens, 32, requires_grad=True), torch.randn(20000, 32, requires_grad=True)
    for reduction in ("mean", "none"):
        linear_cross_entropy(x, w, torch.randint(0, 20000, (tokens,)), reduction=reduction).sum().backward()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(64); before = peak(); step(4096); print((peak() - before) // 1024)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    assert int(ran.stdout) < 100, f"{ran.stdout} MB"


def test_R45_nothing_is_alive_after_a_step():
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        input, weight, target, bias = inputs()
        loss = linear_cross_entropy(input, weight, target, bias)
        (dx,) = torch.autograd.grad(loss, input, create_graph=True)
        (loss + dx.square().sum()).backward()
        watched = [weakref.ref(t) for t in (input, weight, loss, dx)]
        del input, weight, target, bias, loss, dx
        assert [w() for w in watched] == [None] * 4
    finally:
        gc.enable()
