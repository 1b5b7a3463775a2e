"""LinearCrossEntropyLoss: the function with its settings kept."""

import copy
import pickle

import pytest
import torch

import fastgan
from fastgan.nn.functional import linear_cross_entropy


def _inputs():
    return torch.randn(2, 5, 6), torch.randn(13, 6), torch.randint(0, 13, (2, 5)), torch.randn(13)


def test_equals_the_function():
    args = _inputs()
    settings = {"ignore_index": 3, "label_smoothing": 0.1, "reduction": "none", "z_loss": 1e-3}
    module = fastgan.nn.LinearCrossEntropyLoss(**settings)
    expected = linear_cross_entropy(*args, **settings)
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(each(*args), expected)
    assert not module.state_dict()
    assert not list(module.parameters())
    assert "label_smoothing=0.1" in repr(module)


@pytest.mark.parametrize("setting", [{"reduction": "average"}, {"z_loss": -1.0}, {"adversarial_radius": float("nan")}])
def test_settings_are_refused_when_it_is_made(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        fastgan.nn.LinearCrossEntropyLoss(**setting)


def test_the_adversary_trains_and_does_not_judge():
    args = _inputs()
    module = fastgan.nn.LinearCrossEntropyLoss(adversarial_radius=0.5)
    assert torch.equal(module(*args), linear_cross_entropy(*args, adversarial_radius=0.5))
    assert torch.equal(module.eval()(*args), linear_cross_entropy(*args))


def test_a_compiled_training_step_equals_the_eager_one():
    input, _, target, _ = _inputs()
    head = torch.nn.Linear(6, 13)
    module = fastgan.nn.LinearCrossEntropyLoss(label_smoothing=0.1)

    def step(run):
        head.zero_grad()
        run(input).backward()
        return head.weight.grad.clone(), head.bias.grad.clone()

    def loss(x):
        return module(x, head.weight, target, head.bias)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled), step(loss))
