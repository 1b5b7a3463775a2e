"""The perturbation on a model small enough for paper: closed forms, masks, dropout, and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastgan.adversarial import PRESETS, Attack, Perturbation, divergence, preset

PAD, CLS = 0, 1


class Bag(nn.Module):
    """logits = (0, w·mean of the words' vectors): the gradient to a vector is (p − y) w / n."""

    def __init__(self, width=4, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.dropout = nn.Embedding(10, width), nn.Dropout(dropout)
        self.w = nn.Parameter(torch.randn(width))
        self.vectors = []  # of each forward pass

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask, labels):
        vectors = self.embedding(input_ids)
        self.vectors.append(vectors)
        mask = attention_mask.unsqueeze(-1).float()
        logit = ((self.dropout(vectors) * mask).sum(1) / mask.sum(1)) @ self.w
        logits = torch.stack([torch.zeros_like(logit), logit], 1)
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


@pytest.fixture
def inputs():
    ids = torch.tensor([[CLS, 2, 3, 4, 5, CLS], [CLS, 6, CLS, PAD, PAD, PAD]])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": torch.tensor([1, 0])}


def step(attack, model, inputs, seed=0):
    """One step's gradients, by name, and each pass's δ."""
    model.zero_grad()
    model.vectors.clear()
    for share in attack.passes(inputs, lambda: model(**inputs).loss, seed):
        (share * model(**inputs).loss).backward()
    clean = model.embedding(inputs["input_ids"])
    return {name: each.grad.clone() for name, each in model.named_parameters()}, [
        (each - clean).detach() for each in model.vectors
    ]


def test_the_first_ascent_is_the_closed_form(inputs):
    """All words of a sentence have the same gradient, so each moves by ε·m along ∓w; nothing else moves."""
    model = Bag()
    attack = Attack(model, Perturbation(radius=0.3, every=False), [PAD, CLS])
    norm = model.embedding.weight.norm(dim=1).mean().detach()
    assert attack.unit == pytest.approx(float(norm))
    _, (first, second) = step(attack, model, inputs)
    assert not first.any()
    direction = model.w.detach() / model.w.detach().norm()
    words = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0]]).float().unsqueeze(-1)
    sign = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1)  # the loss of label 1 grows against w
    torch.testing.assert_close(second, sign * words * direction * 0.3 * norm)
    # A sentence's norm is ε·m·√n whatever stands beside it.
    assert second.norm(dim=(1, 2)).tolist() == pytest.approx([0.3 * float(norm) * 2, 0.3 * float(norm)], rel=1e-5)


def test_linf_moves_every_coordinate_by_the_sign(inputs):
    model = Bag()
    _, (_, second) = step(Attack(model, Perturbation(radius=0.3, norm="linf"), [PAD, CLS]), model, inputs)
    size = 0.3 * model.embedding.weight.norm(dim=1).mean().item() / 2  # √width
    torch.testing.assert_close(second[1, 1], size * model.w.detach().sign())


def test_R75_freelb_trains_on_the_clean_batch_too_averages_the_passes_and_stays_in_the_ball(inputs):
    """The gradient is the mean over the clean pass and K perturbed ones, each at its own δ, by hand."""
    model = Bag()
    attack = Attack(model, preset("freelb", steps=3, radius=0.2, lr=0.15), [PAD, CLS])
    got, deltas = step(attack, model, inputs)
    assert len(deltas) == attack.settings.passes == 4
    sizes = [float(each[0].norm()) / (2 * attack.unit) for each in deltas]
    assert sizes == pytest.approx([0.0, 0.15, 0.2, 0.2], rel=1e-5)
    model.zero_grad()
    for delta in deltas:
        vectors = model.embedding(inputs["input_ids"]) + delta
        mask = inputs["attention_mask"].unsqueeze(-1).float()
        logit = ((vectors * mask).sum(1) / mask.sum(1)) @ model.w
        logits = torch.stack([torch.zeros_like(logit), logit], 1)
        (nn.functional.cross_entropy(logits, inputs["labels"]) / 4).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)


def test_pgd_trains_on_the_clean_pass_and_the_last(inputs):
    model = Bag()
    attack = Attack(model, preset("pgd", steps=3, radius=0.2, lr=0.1), [PAD, CLS])
    got, deltas = step(attack, model, inputs)
    assert [float(each[1].norm()) / attack.unit for each in deltas] == pytest.approx([0, 0.1, 0.2, 0.2], rel=1e-5)
    assert attack.settings.passes == 4
    # The model is linear: FGM goes the same way.
    with_last, _ = step(Attack(model, Perturbation(radius=0.2), [PAD, CLS]), model, inputs)
    torch.testing.assert_close(got["w"], with_last["w"])


@pytest.mark.parametrize("settings", [Perturbation(radius=0.0), Perturbation(radius=0.0, clean=False)])
def test_k_1_at_radius_0_is_plain_training_to_the_bit(inputs, settings):
    """Dropout included: both passes have the plain pass's mask, and the generator ends where it leaves it."""
    model = Bag(dropout=0.5)
    torch.manual_seed(5)
    model(**inputs).loss.backward()
    plain = {name: each.grad.clone() for name, each in model.named_parameters()}
    after = torch.get_rng_state()
    torch.manual_seed(5)
    got, _ = step(Attack(model, settings), model, inputs)
    assert all(torch.equal(got[name], plain[name]) for name in plain)
    assert torch.equal(torch.get_rng_state(), after)


def test_the_same_dropout_mask_in_every_pass_or_a_fresh_one(inputs):
    model, masks = Bag(dropout=0.5), []
    model.dropout.register_forward_hook(lambda module, arguments, output: masks.append(output != 0))
    for settings, alike in ((preset("pgd"), True), (preset("freelb"), True), (preset("freelb", masks="fresh"), False)):
        masks.clear()
        step(Attack(model, settings), model, inputs)
        assert len(masks) == settings.passes
        assert all(torch.equal(each, masks[0]) for each in masks) is alike


def test_noise_has_the_radius_and_comes_from_its_seed(inputs):
    model = Bag()
    attack = Attack(model, preset("noise", radius=0.4), [PAD, CLS])
    _, (clean, first, second) = step(attack, model, inputs, seed=3)
    assert not clean.any()
    for each in (first, second):
        assert each.norm(dim=(1, 2)).tolist() == pytest.approx([0.8 * attack.unit, 0.4 * attack.unit], rel=1e-5)
        assert not each[:, 0].any()
        assert not each[1, 2:].any()
    assert not torch.equal(first, second)
    assert torch.equal(step(attack, model, inputs, seed=3)[1][1], first)
    assert not torch.equal(step(attack, model, inputs, seed=4)[1][1], first)


def regularized(attack, model, inputs, seed=0, share=1.0):
    def forward(searching):
        output = model(**inputs)
        return output.loss, output

    return attack.regularized(inputs, forward, lambda output: [output.logits], seed, share)


def test_r_drop_is_the_mean_loss_and_the_divergence_of_two_masks(inputs):
    model = Bag(dropout=0.5)
    torch.manual_seed(1)
    one, two = model(**inputs), model(**inputs)
    p, q = one.logits.softmax(-1), two.logits.softmax(-1)
    between = ((p - q) * (p.log() - q.log())).sum() / 2 / 2  # (KL + KL) / 2, the mean of two sentences
    torch.manual_seed(1)
    loss, output = regularized(Attack(model, preset("r-drop", weight=3.0)), model, inputs)
    torch.testing.assert_close(loss, (one.loss + two.loss) / 2 + 3 * between)
    assert torch.equal(output.logits, one.logits)
    # With one mask there is nothing between the passes.
    torch.manual_seed(1)
    loss, _ = regularized(Attack(model, preset("r-drop", weight=3.0, masks="shared")), model, inputs)
    assert torch.equal(loss, one.loss)


def test_vat_finds_the_direction_of_most_divergence(inputs):
    """In a model of one number it is ±w; the clean side is constant; the loss is the clean one and the divergence."""
    model = Bag()
    attack = Attack(model, preset("vat", radius=0.5, weight=2.0), [PAD, CLS])
    loss, output = regularized(attack, model, inputs, share=0.25)
    delta = (model.vectors[-1] - model.vectors[0]).detach()
    w = model.w.detach()
    cosine = (delta[1, 1] @ w) / (delta[1, 1].norm() * w.norm())
    assert abs(float(cosine)) > 0.99
    assert float(delta[1].norm()) <= 0.5 * attack.unit * (1 + 1e-5)
    p = output.logits.softmax(-1).detach()
    vectors = model.embedding(inputs["input_ids"]) + delta
    mask = inputs["attention_mask"].unsqueeze(-1).float()
    logit = ((vectors * mask).sum(1) / mask.sum(1)) @ model.w
    q = torch.stack([torch.zeros_like(logit), logit], 1).log_softmax(-1)
    expected = output.loss + 2 * 0.25 * (p * (p.log() - q)).sum() / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, model.w, retain_graph=True)[0] for each in (loss, expected)))


def test_divergence_by_hand_and_of_nothing():
    left, right = torch.tensor([[0.0, math.log(3)]]), torch.zeros(1, 2)
    forward = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert float(divergence([left], [right], False)) == pytest.approx(forward)
    backward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert float(divergence([left], [right], True)) == pytest.approx((forward + backward) / 2)
    assert float(divergence([left[:0]], [right[:0]], True)) == 0


def test_a_sentence_without_words_or_a_gradient_that_is_not_finite_moves_nothing(inputs):
    model = Bag()
    inputs["input_ids"][1] = CLS
    grads, deltas = step(Attack(model, preset("freelb"), [PAD, CLS]), model, inputs)
    assert all(not each[1].any() for each in deltas)
    assert all(each.isfinite().all() for each in grads.values())
    attack = Attack(model, preset("freelb"), [PAD, CLS])
    from fastgan.adversarial.attack import _Place

    place = _Place(attack, inputs, 0)
    moved = place.ascended(torch.zeros(place.shape), torch.full(place.shape, math.inf))
    assert not moved.any()


def test_hooks_are_gone_after_an_error_and_after_a_break(inputs):
    model = Bag()
    attack = Attack(model, preset("freelb"))
    for _ in attack.passes(inputs, lambda: None, 0):
        break
    with pytest.raises(RuntimeError, match="no backward reached"):
        for _ in attack.passes(inputs, lambda: None, 0):
            model(**inputs)
    with pytest.raises(RuntimeError, match="not called with this batch's input_ids"):
        for _ in attack.passes(inputs, lambda: None, 0):
            pass
    assert not model.embedding._forward_hooks


def test_what_cannot_be_is_refused_by_name(inputs):
    for options, error, words in [
        ({"steps": 0}, ValueError, "steps must be at least 1"), ({"steps": 1.5}, TypeError, "steps must be an integer"),
        ({"radius": -1}, ValueError, "radius"), ({"lr": math.inf}, ValueError, "lr"),
        ({"start": 2}, ValueError, "start"), ({"radius": "big"}, TypeError, "radius"),
        ({"norm": "l1"}, ValueError, "norm must be one of l2, linf, got 'l1'"),
        ({"masks": "same"}, ValueError, "masks"), ({"raises": "divergence"}, ValueError, "raises"),
        ({"raises": "divergence", "adds": "both"}, ValueError, "start"),
        ({"adds": "both", "clean": False}, ValueError, "clean"),
    ]:  # fmt: skip
        with pytest.raises(error, match=words):
            Perturbation(**options)
    with pytest.raises(ValueError, match="name must be one of noise"):
        preset("freeLB")
    model = Bag()
    with pytest.raises(ValueError, match="adds"):
        next(Attack(model, PRESETS["vat"]).passes(inputs, lambda: None, 0))
    with pytest.raises(ValueError, match="adds"):
        regularized(Attack(model, PRESETS["fgm"]), model, inputs)
