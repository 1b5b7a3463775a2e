"""The LM head and its loss against cross_entropy(linear(...)) in float64: values and derivatives of every order."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fastgan
from fastgan.nn.functional import linear_cross_entropy
from fastgan.ops import linear_cross_entropy as ops
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


@pytest.mark.parametrize("reduction", ["none", "mean"])
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
