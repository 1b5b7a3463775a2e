"""GAN-BERT: losses and gradients by hand, each player's its own, and runs that save and resume both."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors.torch import load_file

from fastgan.adversarial import attach
from fastgan.adversarial.gan_bert import (
    NOISE,
    Players,
    discriminator_loss,
    diversity,
    generator_loss,
    made_from,
)
from fastgan.adversarial.unlabelled import read_unlabelled
from fastgan.data.grouped import GroupedByLength
from fastgan.data.units import TextError
from fastgan.training.finetune import finetune, resume_finetune
from fastgan.training.language_trainer import make_arguments
from fastgan.training.run import Silent
from fastgan.training.sentiment import SENTIMENT, classify
from fastgan.training.streams import EVALUATION, PLAYERS, mixed_seed
from tests.training.test_finetune import _sentences, files, rows, tiny, weights  # noqa: F401  files is a fixture
from tests.training.test_pretrain import StopsAt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def game(files, tmp_path):  # noqa: F811
    texts = [line.split("\t")[0] for line in _sentences(300, 30).splitlines()]
    (tmp_path / "raw.txt").write_text("\n".join(texts) + "\n\n")

    def config(**options):
        settings = {"adversary": "gan-bert", "unlabelled": tmp_path / "raw.txt", "epochs": 1, "max_steps": 4,
                    "eval_every": 2, **options}  # fmt: skip
        return tiny(files, **settings)

    return config


def test_losses_and_gradients_by_hand():
    """One number h stands for a text: logits (w₁h, w₂h), fake vh; the generator is a·z."""
    h, z = 0.7, 1.5
    a, v = torch.tensor(-0.4, requires_grad=True), torch.tensor(0.9, requires_grad=True)
    w = torch.tensor([0.5, -0.3], requires_grad=True)

    def judge(hidden):
        return hidden * w.reshape(1, 2), hidden.reshape(-1) * v

    text, made = torch.tensor([[h]]), (a * z).reshape(1, 1)
    d = discriminator_loss(*judge(text), *judge(made.detach()))

    def fake_share(x):  # p(fake) over the three
        odds = [math.exp(0.5 * x), math.exp(-0.3 * x), math.exp(0.9 * x)]
        return odds[2] / sum(odds), odds[0] / (odds[0] + odds[1])

    on_text, on_made = fake_share(h), fake_share(-0.6)
    assert d.item() == pytest.approx(-math.log(1 - on_text[0]) - math.log(on_made[0]), rel=1e-5)
    g = generator_loss(*judge(made), text, made)
    assert g.item() == pytest.approx(-math.log(1 - on_made[0]) + (h + 0.6) ** 2, rel=1e-5)
    none, by_v = torch.autograd.grad(d, (a, v), allow_unused=True)
    assert none is None  # nothing of the discriminator's loss reaches the generator
    assert float(by_v) == pytest.approx(on_text[0] * h - (1 - on_made[0]) * -0.6, rel=1e-5)
    (by_a,) = torch.autograd.grad(g, a)
    pull = 0.5 * on_made[1] - 0.3 * (1 - on_made[1])  # the slope of L
    assert float(by_a) == pytest.approx((on_made[0] * (0.9 - pull) + 2 * (-0.6 - h)) * z, rel=1e-5)


def one_step(config, labels=None, grouped=False):
    """The trainer after one step without an optimizer, its batch, and the generator's noise."""
    torch.manual_seed(0)
    prepared = attach(SENTIMENT.prepare(config, lambda said: None), config, lambda said: None)
    settings = {"max_steps": 4, "warmup": 0, "eval_every": 2, "eval_strategy": "no"}
    arguments = make_arguments(config, config_folder(config), **settings)
    trainer = prepared.trainer(model=prepared.model, args=arguments, data_collator=prepared.collator)
    trainer.current_gradient_accumulation_steps = 1
    chosen = GroupedByLength(prepared.rows, prepared.lengths, 8, config.seed, 1) if grouped else prepared.rows
    batch = dict(prepared.collator([chosen[i] for i in range(8)]))
    if labels is not None:
        batch["labels"] = labels
    items = batch["labels"].ne(-100).sum()
    loss = trainer.training_step(trainer.model, dict(batch), items)
    drawn = torch.randn(8, NOISE, generator=torch.Generator().manual_seed(mixed_seed(config.seed, PLAYERS, 0)))
    return trainer, batch, drawn, loss


def config_folder(config):
    from pathlib import Path

    return Path(config.unlabelled).parent / "arguments"


def test_each_players_gradient_is_its_own(game):
    """Against each loss by itself, the other player constant: the published port follows the sum of both instead."""
    trainer, batch, drawn, loss = one_step(game(dropout=0.0))
    model, players, head = trainer.model, trainer.players, trainer.head
    got = {name: each.grad.clone() for name, each in [*model.named_parameters(), *players.named_parameters()]
           if each.grad is not None}  # fmt: skip
    raw = trainer.data_collator([trainer.unlabelled[i] for i in range(8)])

    def both(trains):
        for module, name in ((model, "d"), (players.fake, "d"), (players.generator, "g")):
            module.requires_grad_(name == trains)
            module.zero_grad()
        made = players.generator(drawn)
        with head.watched() as seen:
            output, other = model(**batch), model(**raw)
        features, logits = head(made)
        texts = torch.cat(seen)
        if trains == "g":
            return generator_loss(logits, players.fake_logits(features), texts, features)
        unsupervised = discriminator_loss(
            torch.cat([output.logits, other.logits]), players.fake_logits(texts), logits, players.fake_logits(features)
        )
        return output.loss + unsupervised

    expected = both("d")
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    wanted = {name: each.grad.clone() for name, each in [*model.named_parameters(), *players.named_parameters()]
              if each.grad is not None}  # fmt: skip
    both("g").backward()
    wanted |= {f"generator.{name}": each.grad.clone() for name, each in players.generator.named_parameters()}
    assert set(got) == set(wanted)
    for name, each in wanted.items():
        torch.testing.assert_close(got[name], each, rtol=1e-4, atol=1e-7)
    assert any(float(each.abs().max()) > 0 for name, each in wanted.items() if name.startswith("generator"))


def test_R76_a_batch_without_labels_is_finite_and_unlabelled_is_no_class(game):
    trainer, _, _, loss = one_step(game(), labels=torch.full((8,), -100))
    assert bool(loss.isfinite())
    gradients = [each.grad for each in trainer.model.parameters() if each.grad is not None]
    assert gradients
    assert all(bool(each.isfinite().all()) for each in gradients)
    assert trainer.model.config.num_labels == trainer.model.classifier.out_features == 2


def test_the_labels_loss_is_that_of_k_classes(game, files, tmp_path):  # noqa: F811
    """The row for fake has no part in what is evaluated, and none in the folder that transformers reads."""
    result = finetune(SENTIMENT, game(), tmp_path / "run")
    assert result.counts["unlabelled"] == 30
    assert result.step == 4
    kept = load_file(tmp_path / "run" / "model.safetensors")
    assert kept["classifier.weight"].shape == (2, 16)
    assert not [name for name in kept if "generator" in name or "fake" in name]
    _, probabilities = classify(tmp_path / "run", ["the film warm 3 ."])
    assert probabilities.shape == (1, 2)
    assert probabilities.sum() == pytest.approx(1)


class Says(Silent):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def test_diversity_by_hand():
    texts = torch.tensor([[0.0, 0.0], [6.0, 8.0]])  # 5 from their mean
    assert diversity(texts, torch.tensor([[1.0, 1.0], [1.0, 3.0]])) == pytest.approx(0.2)
    assert diversity(texts, torch.ones(3, 2)) == 0
    assert diversity(texts, texts + 100) == pytest.approx(1)
    assert diversity(torch.ones(2, 2), texts) is None


def test_R77_diversity_stands_beside_the_accuracy_and_a_collapse_is_said(game, tmp_path, monkeypatch):
    config, reporter = game(), Says()
    result = finetune(SENTIMENT, config, tmp_path / "run", reporter=reporter)
    logged = rows(tmp_path / "run")
    judged = [row for row in logged if "validation_accuracy" in row]
    assert [row["step"] for row in judged] == [2, 4]
    assert all(row["validation_diversity"] > 0.1 for row in judged)
    assert [row["step"] for row in logged if {"loss", "generator_loss", "discriminator_loss"} <= set(row)] == [2, 4]
    assert not [said for said in reporter.said if "collapsed" in said]

    # The last one from what was saved.
    prepared = attach(SENTIMENT.prepare(config, lambda said: None), config, lambda said: None)
    head, players, last = prepared.trainer.head, prepared.trainer.players, tmp_path / "run" / "checkpoints/checkpoint-4"
    prepared.model.load_state_dict(load_file(last / "model.safetensors"))
    players.load_state_dict(load_file(last / "players.safetensors"))
    prepared.model.eval()
    with torch.no_grad(), head.watched() as seen:
        for row in prepared.held_out:
            prepared.model(torch.tensor([row["input_ids"]]))
    made, fake = made_from(head, players.train(), 256, mixed_seed(config.seed, EVALUATION, 4))
    assert diversity(torch.cat(seen), made) == pytest.approx(judged[-1]["validation_diversity"], rel=1e-4)
    assert bool(((fake > 0) & (fake < 1)).all())
    assert players.training
    if result.best_step == 4:
        assert result.figures["diversity"] == judged[-1]["validation_diversity"]

    class Constant(Players):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            torch.nn.init.zeros_(self.generator[-1].weight)

    monkeypatch.setattr("fastgan.adversarial.gan_bert.Players", Constant)
    finetune(SENTIMENT, game(adversary_lr=1e-9), tmp_path / "one", reporter=reporter)
    assert [said.split(":")[:2] for said in reporter.said if "collapsed" in said] == [
        [f"step {step}", " the generator has collapsed"] for step in (2, 4)
    ]


def test_the_players_losses_are_logged(game, tmp_path):
    """At the first step, before any weight has moved, they are those by hand."""
    config = game(dropout=0.0, max_steps=1, eval_every=1)
    trainer, batch, _, total = one_step(config, grouped=True)
    (count, sums), model = trainer._sums, trainer.model
    assert count == 1
    of_labels = model(**batch).loss
    finetune(SENTIMENT, config, tmp_path / "run")
    (row,) = [row for row in rows(tmp_path / "run") if "generator_loss" in row]
    assert [row["discriminator_loss"], row["generator_loss"]] == pytest.approx(sums.tolist(), rel=1e-4)
    assert row["loss"] == pytest.approx(float(total), rel=1e-4)
    assert float(total) == pytest.approx(float(of_labels.detach() + sums[0]), rel=1e-4)


class DiesAt(StopsAt):
    """Ends a run without a word, as a kill would: nothing is saved."""

    def update(self, step, metrics, images):
        if step == self.step:
            raise MemoryError


@pytest.mark.parametrize("ends", [StopsAt, DiesAt])
def test_stopped_or_killed_and_resumed_both_players_are_the_same(game, tmp_path, ends):
    config = game(gradient_accumulation=2, batch_size=4, adversary_lr=1e-3)
    whole = finetune(SENTIMENT, config, tmp_path / "whole")
    with contextlib.suppress(MemoryError):
        first = finetune(SENTIMENT, config, tmp_path / "run", reporter=ends(3))
        assert (first.step, first.interrupted) == (3, True)
    saved = 3 if ends is StopsAt else 2
    before = load_file(tmp_path / "run" / "checkpoints" / f"checkpoint-{saved}" / "players.safetensors")
    torch.rand(7)
    second = resume_finetune(SENTIMENT, tmp_path / "run")
    assert dataclasses.replace(second, folder=whole.folder) == whole
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    ends = [load_file(tmp_path / name / "checkpoints" / "checkpoint-4" / "players.safetensors")
            for name in ("run", "whole")]  # fmt: skip
    assert set(ends[0]) == set(before) >= {"generator.0.weight", "fake.weight"}
    for name, each in ends[0].items():
        assert torch.equal(each, ends[1][name])
    assert not torch.equal(before["generator.0.weight"], ends[0]["generator.0.weight"])
    assert not torch.equal(before["fake.weight"], ends[0]["fake.weight"])


def test_unlabelled_texts_of_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert read_unlabelled(tmp_path / "a.txt") == ["one", "two"]
    (tmp_path / "a.tsv").write_text("one\t1\ntwo\t0\n")
    assert read_unlabelled(tmp_path / "a.tsv") == ["one", "two"]
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(TextError, match=r"empty\.txt: there is no text in it"):
        read_unlabelled(tmp_path / "empty.txt")


def test_several_processes_are_refused(game, monkeypatch):
    config = game()
    prepared = SENTIMENT.prepare(config, lambda said: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="adversary gan-bert trains in one process"):
        attach(prepared, config, lambda said: None)


def test_validation_texts_among_the_unlabelled_are_said(game, files):  # noqa: F811
    said = []
    config = game(unlabelled=files / "dev.tsv")
    attach(SENTIMENT.prepare(config, said.append), config, said.append)
    assert said == [f"20 of 20 texts of {files / 'dev.tsv'} are in the validation file as well"]


def test_models_that_classify_in_another_way_are_refused(game, tmp_path):
    from transformers import GPT2Config, GPT2Model

    from fastgan.data.corpus import train_bpe

    tokenizer = train_bpe(_sentences(0, 50).splitlines(), 300)
    tokenizer.save_pretrained(tmp_path / "gpt")
    GPT2Model(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt")
    with pytest.raises(ValueError, match=r"needs a model whose head reads the first token .*GPT2"):
        finetune(SENTIMENT, game(model=str(tmp_path / "gpt")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_roberta_has_a_head_of_its_own():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    from fastgan.adversarial.gan_bert import Head

    size = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 8}  # fmt: skip
    model = RobertaForSequenceClassification(RobertaConfig(**size, num_labels=3)).eval()
    ids = torch.from_numpy(np.array([[3, 4, 5]]))
    hidden = model.roberta(ids)[0][:, 0]
    features, logits = Head(model)(hidden)
    torch.testing.assert_close(logits, model(ids).logits)
    torch.testing.assert_close(model.classifier.out_proj(features), logits)
