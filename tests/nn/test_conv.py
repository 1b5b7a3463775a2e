"""Conv2d and ConvTranspose2d in the place of torch's."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastgan.nn

CONVOLUTIONS = [
    {"kernel_size": 4, "stride": 2, "padding": 1, "bias": False},
    {"kernel_size": (3, 2), "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "groups": 2},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"},
    {"kernel_size": 1, "padding": "valid"},
]
TRANSPOSED = [
    {"kernel_size": 4, "stride": 2, "padding": 1, "bias": False},
    {"kernel_size": 5, "stride": 3, "output_padding": 2, "groups": 2},
    {"kernel_size": 1, "stride": 2, "output_padding": 1},
    {"kernel_size": 3, "dilation": 2, "output_padding": 1},
]
CASES = [("Conv2d", c) for c in CONVOLUTIONS] + [("ConvTranspose2d", c) for c in TRANSPOSED]


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=str)
def test_equals_torchs_and_takes_it_over(name, arguments):
    theirs = getattr(nn, name)(4, 6, **arguments)
    kind = getattr(fastgan.nn, name)
    taken = copy.deepcopy(theirs)
    parameters = dict(taken.named_parameters())
    ours = kind.from_torch(taken)
    assert ours is taken
    assert isinstance(ours, type(theirs))
    assert all(ours.get_parameter(key) is value for key, value in parameters.items())
    made = kind(4, 6, **arguments)
    made.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 7, 6)
    for module in (ours, made, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(module(x), theirs(x), rtol=0, atol=0)
        assert repr(module) == repr(theirs)
    theirs.load_state_dict(ours.state_dict())


def test_output_size_chooses_as_in_torch():
    theirs = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)
    ours = fastgan.nn.ConvTranspose2d.from_torch(copy.deepcopy(theirs))
    x = torch.randn(1, 2, 4, 4)
    for size in ([7, 8], [8, 8]):
        torch.testing.assert_close(ours(x, output_size=size), theirs(x, output_size=size))
    with pytest.raises(ValueError, match="output size"):
        ours(x, output_size=[20, 20])


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
def test_compiles_whole(name):
    module = getattr(fastgan.nn, name)(2, 3, 3, stride=2, padding=1)
    x = torch.randn(1, 2, 6, 6)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))


def test_subclasses_are_not_taken_over():
    class Mine(nn.Conv2d):
        pass

    with pytest.raises(TypeError, match="Mine"):
        fastgan.nn.Conv2d.from_torch(Mine(1, 1, 1))
    with pytest.raises(TypeError, match="ConvTranspose2d"):
        fastgan.nn.ConvTranspose2d.from_torch(nn.Conv2d(1, 1, 1))
