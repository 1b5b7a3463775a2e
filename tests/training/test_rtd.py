"""ELECTRA: what each player's loss is, whom it teaches, and that a run resumes to the same bits."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fastgan.data.blocks import make_blocks
from fastgan.data.corpus import Corpus
from fastgan.training.pretrain import make_model, pretrain, resume_pretrain
from fastgan.training.rtd import Players
from tests.training.test_pretrain import StopsAt, corpus, tiny, validation_losses, weights  # noqa: F401  a fixture

pytestmark = pytest.mark.usefixtures("one_thread")


def rtd(corpus, **options):  # noqa: F811
    return tiny(corpus, objective="rtd", **options)


@pytest.fixture
def players(corpus):  # noqa: F811
    config = rtd(corpus, dropout=0.0)
    opened = Corpus(config.data)
    return make_model(config, opened, opened.tokenizer())


@pytest.fixture
def batch(corpus):  # noqa: F811
    blocks = make_blocks(Corpus(corpus), "train", length=16, objective="rtd", seed=0, count=4)
    return {name: torch.stack([blocks[index][name] for index in range(4)]) for name in ("input_ids", "labels")}


def test_all_words_to_be_guessed_are_masked(batch, corpus):  # noqa: F811
    tokenizer = Corpus(corpus).tokenizer()
    masked = batch["labels"].ne(-100)
    assert masked.any(1).all()
    assert (batch["input_ids"][masked] == tokenizer.mask_token_id).all()
    assert not (batch["input_ids"][~masked] == tokenizer.mask_token_id).any()


def test_losses_are_transformers_own(players, batch, monkeypatch):
    """The generator's loss is that of ElectraForMaskedLM, the discriminator's that of ElectraForPreTraining."""
    drawn = []
    monkeypatch.setattr(
        players, "_sample", lambda *given, real=players._sample: drawn.append(real(*given)) or drawn[-1]
    )
    outputs = players.train()(**batch)
    masked = batch["labels"].ne(-100)
    expected = players.generator.eval()(**batch).loss
    torch.testing.assert_close(outputs["generator_loss"], expected)
    originals = torch.where(masked, batch["labels"], batch["input_ids"])
    filled = originals.clone()
    filled[masked] = drawn[0]
    with torch.no_grad():
        players._own_words().add_(players._words())  # the whole word vectors
    told = players.discriminator.eval()(input_ids=filled, labels=(filled != originals).long())
    torch.testing.assert_close(outputs["discriminator_loss"], told.loss)
    torch.testing.assert_close(outputs["loss"], expected + 50 * told.loss)


def test_each_player_learns_from_its_own_loss(players, batch):
    outputs = players(**batch)
    outputs["discriminator_loss"].backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in players.generator.parameters())
    assert players._own_words().grad.abs().sum() > 0
    players.zero_grad()
    outputs["generator_loss"].backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in players.discriminator.parameters())
    assert players._words().grad.abs().sum() > 0


def test_what_is_guessed_right_is_an_original(players, batch, monkeypatch):
    right = batch["labels"][batch["labels"].ne(-100)]
    monkeypatch.setattr(players, "_sample", lambda *given: right)
    last = players.discriminator.discriminator_predictions.dense_prediction
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(-20.0)
    outputs = players(**batch)
    assert outputs["discriminator_loss"] < 1e-6  # it says "original" of every token
    assert outputs["accuracy"] == 1.0


def test_words_are_drawn_as_the_generator_says(players, batch):
    logits = torch.log(torch.tensor([0.7, 0.2, 0.1])).repeat(20_000, 1)
    counts = torch.bincount(players.train()._sample(logits, batch["input_ids"]), minlength=3) / 20_000
    torch.testing.assert_close(counts, torch.tensor([0.7, 0.2, 0.1]), atol=0.015, rtol=0)
    players.eval()
    first = players._sample(logits, batch["input_ids"])
    torch.rand(3)
    assert torch.equal(first, players._sample(logits, batch["input_ids"]))
    assert not torch.equal(first, players._sample(logits, batch["input_ids"] + 1))


def test_it_learns_and_transformers_reads_both(corpus, tmp_path):  # noqa: F811
    from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer

    run = tmp_path / "run"
    result = pretrain(rtd(corpus, max_steps=60, eval_every=20, lr=1e-2, dropout=0.0, width=32, heads=4), run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = [row for row in rows if "generator_loss" in row]
    assert own[-1]["generator_loss"] < 0.75 * own[0]["generator_loss"]
    for row in own:
        assert row["loss"] == pytest.approx(row["generator_loss"] + 50 * row["discriminator_loss"], rel=1e-3)
    assert validation_losses(run)[60] == result.validation_loss
    assert result.figures["generator_loss"] == rows[-1]["validation_generator_loss"]
    assert 0.5 < result.figures["accuracy"] <= 1
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    discriminator = AutoModelForPreTraining.from_pretrained(run).eval()
    generator = AutoModelForMaskedLM.from_pretrained(run / "generator").eval()
    assert (type(discriminator).__name__, type(generator).__name__) == ("ElectraForPreTraining", "ElectraForMaskedLM")
    assert (discriminator.config.hidden_size, generator.config.hidden_size) == (32, 8)
    assert len(AutoTokenizer.from_pretrained(run / "generator")) == generator.config.vocab_size
    # Loaded again they are what was measured: the mean of the validation blocks' losses.
    blocks = make_blocks(Corpus(corpus), "validation", length=16, objective="rtd", seed=0)
    batch = {name: torch.stack([block[name] for block in blocks]) for name in ("input_ids", "labels")}
    again = Players(generator, discriminator).eval()
    with torch.no_grad():
        batches = [{name: value[at : at + 4] for name, value in batch.items()} for at in range(0, len(blocks), 4)]
        losses = [float(again(**each)["discriminator_loss"]) * len(each["labels"]) for each in batches]
    assert sum(losses) / len(blocks) == pytest.approx(result.figures["discriminator_loss"], rel=1e-3)
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("stop", [3, 5])
def test_R65_stopped_and_resumed_it_has_the_same_weights(corpus, tmp_path, stop):  # noqa: F811
    config = rtd(corpus, gradient_accumulation=2)
    whole = pretrain(config, tmp_path / "whole")
    assert pretrain(config, tmp_path / "run", reporter=StopsAt(stop)).interrupted
    torch.rand(7)
    result = resume_pretrain(tmp_path / "run")
    assert result.figures == whole.figures
    for part in (".", "generator"):
        assert weights(tmp_path / "run" / part) == weights(tmp_path / "whole" / part)
    assert resume_pretrain(tmp_path / "run") == result


def test_a_step_is_the_same_however_it_is_cut_into_batches(corpus, tmp_path, monkeypatch):  # noqa: F811
    # What is drawn depends on the batch; here it is what stood there, plus one.
    monkeypatch.setattr(Players, "_sample", lambda self, logits, originals: logits.argmax(-1) * 0 + 9)
    for name, size, accumulation in (("one", 4, 1), ("two", 2, 2)):
        options = {"batch_size": size, "gradient_accumulation": accumulation, "dropout": 0.0, "max_steps": 3}
        pretrain(rtd(corpus, **options), tmp_path / name)
    from safetensors.torch import load_file

    for part in (".", "generator"):
        first, second = (load_file(tmp_path / name / part / "model.safetensors") for name in ("one", "two"))
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, atol=2e-5, rtol=1e-3)


def test_early_stopping_keeps_the_best_weights(corpus, tmp_path):  # noqa: F811
    config = rtd(corpus, max_steps=60, eval_every=4, lr=0.3, early_stopping=2, dropout=0.0, warmup=10)
    result = pretrain(config, tmp_path / "run")
    assert result.stopped_early
    losses = validation_losses(tmp_path / "run")
    assert result.validation_loss == min(losses.values())
    assert not list((tmp_path / "run").glob("best-*"))


def test_what_cannot_be_is_refused_by_name(corpus, tmp_path):  # noqa: F811
    for options, words in [({"generator_share": 0.0}, "generator_share"), ({"generator_share": 1.5}, "generator_share"),
                           ({"rtd_weight": 0.0}, "rtd_weight"), ({"rtd_weight": float("inf")}, "rtd_weight"),
                           ({"model": str(tmp_path)}, "model cannot be")]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            rtd(corpus, **options)
