"""DiscriminatorHeadLoss: the module around conv_gan_loss."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgan.nn import DiscriminatorHeadLoss


def test_equals_the_plain_lines():
    conv = nn.Conv2d(16, 1, 4, stride=2, padding=1, bias=False)
    features, labels = torch.randn(3, 16, 8, 8), torch.tensor([1.0, 0.0, 1.0])
    loss, logits = DiscriminatorHeadLoss()(features, conv, labels)
    assert logits.shape == (3, 1, 4, 4)
    want = F.binary_cross_entropy_with_logits(conv(features), labels.view(3, 1, 1, 1).expand(3, 1, 4, 4))
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert conv.weight.grad is not None


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(16, 2, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(16, 2, 3, dilation=2),
        nn.Conv2d(16, 2, 3, groups=2),
        nn.Conv2d(16, 2, 2, padding="same"),
        nn.Conv2d(16, 2, 3, padding="same"),
        nn.utils.spectral_norm(nn.Conv2d(16, 2, 3)).eval(),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 2, 3)),
        nn.Sequential(nn.Conv2d(16, 8, 3), nn.Conv2d(8, 1, 1)),
    ],
    ids=["reflect", "dilated", "grouped", "same, even", "same", "spectral norm", "weight norm", "sequence"],
)
def test_every_last_layer(conv):
    features = torch.randn(2, 16, 8, 8)
    for loss, want in (
        ("bce", lambda x: F.softplus(-x).mean()),
        ("hinge", lambda x: F.relu(1 - x).mean()),
        ("lsgan", lambda x: (x - 1).square().mean()),
        ("wasserstein", lambda x: -x.mean()),
    ):
        value, logits = DiscriminatorHeadLoss(loss)(features, conv, 1.0)
        torch.testing.assert_close(logits, conv(features))
        torch.testing.assert_close(value, want(logits))


def test_hooks_fire():
    conv, seen = nn.Conv2d(16, 1, 4), []
    conv.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    DiscriminatorHeadLoss()(torch.randn(2, 16, 4, 4), conv, 1.0)
    assert seen == [(2, 1, 1, 1)]


def test_weight_instead_of_module():
    features, weight, bias = torch.randn(2, 16, 4, 4), torch.randn(1, 16, 4, 4), torch.randn(1)
    loss, logits = DiscriminatorHeadLoss("hinge", label_smoothing=0.2)(features, weight, 1.0, bias=bias)
    x = F.conv2d(features, weight, bias)
    torch.testing.assert_close(logits, x)
    torch.testing.assert_close(loss, (0.9 * F.relu(1 - x) + 0.1 * F.relu(1 + x)).mean())
    with pytest.raises(TypeError, match="bias"):
        DiscriminatorHeadLoss()(features, nn.Conv2d(16, 1, 4), 1.0, bias=bias)


def test_a_module_among_modules():
    head = DiscriminatorHeadLoss("lsgan", reduction="sum")
    assert not list(head.parameters())
    assert not head.state_dict()
    assert not any(part in type(head).__name__ for part in ("Conv", "BatchNorm"))
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert repr(other) == repr(head)
    for wrong in ({"loss": "ns"}, {"reduction": "average"}, {"label_smoothing": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DiscriminatorHeadLoss(**wrong)


def test_compiles_as_one_graph():
    head, conv = DiscriminatorHeadLoss(), nn.Conv2d(16, 1, 4)
    features = torch.randn(2, 16, 4, 4)
    step = torch.compile(lambda x: head(x, conv, 1.0), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(features), head(features, conv, 1.0))
    step(features)[0].backward()
    assert conv.weight.grad is not None
