"""``fastgan.nn.Dropout`` beside torch's, and in models that ``replace_modules`` has gone through."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastgan
from fastgan.nn import Dropout, functional
from fastgan.ops.dropout import SMALLEST


def test_what_is_kept_and_what_its_gradient_is():
    torch.manual_seed(0)
    x = torch.randn(64, 512, requires_grad=True)
    y = functional.dropout(x, 0.25)
    kept = y != 0
    assert torch.equal(y[kept], (x * (1 / 0.75))[kept])
    assert abs(kept.float().mean() - 0.75) < 0.02
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(kept, torch.tensor(1 / 0.75), torch.tensor(0.0)))
    torch.manual_seed(0)
    torch.randn(64, 512)
    assert torch.equal(functional.dropout(x, 0.25), y)  # torch's generator decides
    assert not torch.equal(functional.dropout(x, 0.25), y)


def test_where_it_is_torchs_own():
    module = Dropout(0.3)
    x = torch.randn(64, 512)
    assert functional.dropout(x, 0.3, training=False) is x
    assert module.eval()(x) is x
    module.train()

    def numbers(f, *arguments, **options):
        torch.manual_seed(1)
        return f(*arguments, **options)

    small = torch.randn(SMALLEST - 1)
    for other in (small, x.t()):
        assert torch.equal(numbers(functional.dropout, other, 0.3), numbers(nn.functional.dropout, other, 0.3))
    for p in (0.0, 1.0):
        assert torch.equal(functional.dropout(x, p), nn.functional.dropout(x, p))
    with fastgan.use("reference"):
        assert torch.equal(numbers(functional.dropout, x, 0.3), numbers(nn.functional.dropout, x, 0.3))
    written = x.clone()
    assert functional.dropout(written, 0.3, inplace=True) is written
    for bad in (-0.1, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            functional.dropout(x, bad)
    stack = torch.randn(2, 64, 512)
    different = torch.func.vmap(lambda z: functional.dropout(z, 0.5), randomness="different")(stack)
    assert not torch.equal(different[0] == 0, different[1] == 0)
    compiled = torch.compile(lambda z: functional.dropout(z, 0.3), backend="aot_eager", fullgraph=True)
    assert 0 < (compiled(x) == 0).float().mean() < 0.6


def test_checkpointing_draws_the_same_again():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(128, 128), Dropout(0.2), nn.Linear(128, 128))
    x = torch.randn(64, 128, requires_grad=True)
    grads = []
    for call in (layer, lambda z: checkpoint(layer, z, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(call(x).square().sum(), [x, *layer.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_replaced():
    plain = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1), nn.Dropout(0.2, inplace=True), nn.Dropout1d(0.5))
    ours = fastgan.replace_modules(copy.deepcopy(plain))
    assert [type(m) for m in ours[1:]] == [Dropout, nn.Dropout, nn.Dropout1d]
    rows = {row.name: (row.state, row.reason) for row in fastgan.explain(ours)}
    assert rows["1"] == ("swapped", "")
    assert rows["2"] == ("left", "inplace=True is torch's own")
    x = torch.randn(256, 64)
    assert torch.equal(ours.eval()(x), plain.eval()(x))
    assert not torch.equal(ours.train()(x), ours(x))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Dropout, got Dropout1d"):
        Dropout.from_torch(nn.Dropout1d())
