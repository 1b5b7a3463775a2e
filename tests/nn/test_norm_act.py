"""BatchNormAct2d in the place of torch.nn.BatchNorm2d."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from fastgan.nn import BatchNormAct2d


def pair(act="none", dtype=torch.float32, **arguments):
    """torch's norm followed by its activation, and ours made from a copy of it."""
    norm = nn.BatchNorm2d(5, dtype=dtype, **arguments)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    activation = {"none": nn.Identity(), "relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(0.2)}[act]
    return nn.Sequential(norm, activation), BatchNormAct2d.from_torch(copy.deepcopy(norm), act=act, negative_slope=0.2)


def same_state(a, b):
    assert list(a.state_dict()) == list(b.state_dict())
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("act", ["none", "relu", "leaky_relu"])
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("track_running_stats", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_R46_trains_and_evaluates_as_torchs(act, momentum, track_running_stats, affine):
    theirs, ours = pair(act, momentum=momentum, track_running_stats=track_running_stats, affine=affine, eps=1e-3)
    assert isinstance(ours, nn.BatchNorm2d)
    assert ours.eps == 1e-3
    for step in range(3):
        x = torch.randn(4, 5, 3, 3) + step
        torch.testing.assert_close(ours(x), theirs(x))
        same_state(theirs[0], ours)
    theirs.eval()
    ours.eval()
    torch.testing.assert_close(ours(x), theirs(x))
    same_state(theirs[0], ours)


def test_R46_taking_over_keeps_the_module():
    norm = nn.BatchNorm2d(5, eps=1e-2, momentum=None).eval()
    norm.weight.requires_grad_(False)
    norm.num_batches_tracked.fill_(7)
    seen = []
    norm.register_forward_hook(lambda *_: seen.append(1))
    before = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    ours = BatchNormAct2d.from_torch(norm, act="relu")
    assert ours is norm
    after = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    assert all(after[name] is tensor for name, tensor in before.items())
    assert not ours.training
    assert not ours.weight.requires_grad
    assert ours.num_batches_tracked == 7
    assert (ours(torch.randn(2, 5, 2, 2)) >= 0).all()
    assert seen == [1]


@pytest.mark.parametrize("momentum", [0.2, None])
def test_R43_groups_count_and_move_twice(momentum):
    theirs, ours = pair("relu", momentum=momentum, dtype=torch.float64)
    ours.groups = 2
    real, fake = torch.randn(2, 3, 5, 4, 4, dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in (real, fake, torch.cat([real, fake]))]
    want = torch.cat([theirs(inputs[0]), theirs(inputs[1])])
    got = ours(inputs[2])
    torch.testing.assert_close(got, want)
    same_state(theirs[0], ours)
    assert ours.num_batches_tracked == 2
    weights = torch.randn_like(got)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    torch.testing.assert_close(inputs[2].grad, torch.cat([inputs[0].grad, inputs[1].grad]))
    torch.testing.assert_close(ours.weight.grad, theirs[0].weight.grad)
    with pytest.raises(ValueError, match="groups"):
        ours(torch.randn(3, 5, 2, 2, dtype=torch.float64))
    torch.testing.assert_close(ours.eval()(real), theirs.eval()(real))  # evaluation has no groups


def test_class_swap_alone_is_enough():
    norm = nn.BatchNorm2d(3)
    norm.__class__ = BatchNormAct2d
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(norm(x), nn.BatchNorm2d(3)(x))


def test_copies_and_state_dicts():
    _, ours = pair("leaky_relu")
    ours.groups = 2
    ours(torch.randn(4, 5, 2, 2))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)):
        same_state(ours, other)
        assert (other.act, other.negative_slope, other.groups) == ("leaky_relu", 0.2, 2)
    plain = nn.BatchNorm2d(5)
    plain.load_state_dict(ours.state_dict())
    fresh = BatchNormAct2d(5)
    fresh.load_state_dict(plain.state_dict())
    same_state(ours, fresh)


def test_half_and_mixed():
    theirs, ours = pair("relu")
    x = torch.randn(4, 5, 3, 3)
    torch.testing.assert_close(ours(x.bfloat16()), theirs(x.bfloat16()))  # float32 parameters beside bfloat16
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    torch.testing.assert_close(ours(x.bfloat16()), theirs(x.bfloat16()), rtol=2e-2, atol=2e-2)


def test_compiles_whole():
    theirs, ours = pair("relu")
    x = torch.randn(4, 5, 3, 3)
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), theirs(x))
    same_state(theirs[0], ours)


def test_repr_and_refusals():
    assert "act=leaky_relu, negative_slope=0.2, groups=2" in repr(
        BatchNormAct2d(3, act="leaky_relu", negative_slope=0.2, groups=2)
    )
    assert repr(BatchNormAct2d(3)).replace("BatchNormAct2d", "BatchNorm2d") == repr(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="act must be one of"):
        BatchNormAct2d(3, act="gelu")
    with pytest.raises(ValueError, match="groups must be positive"):
        BatchNormAct2d(3, groups=0)
    with pytest.raises(TypeError, match="BatchNorm2d"):
        BatchNormAct2d.from_torch(nn.BatchNorm1d(3))
    norm = nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="act"):
        BatchNormAct2d.from_torch(norm, act="gelu")
    assert type(norm) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="4D"):
        BatchNormAct2d(3)(torch.randn(2, 3, 4))
