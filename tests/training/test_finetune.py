"""Fine-tuning tiny models: they learn, resume to the same bits, keep the best weights, and say what is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fastgan.data.text import train_tokenizer
from fastgan.data.units import TextError
from fastgan.training import sentiment as module
from fastgan.training.checkpoint import RunError
from fastgan.training.finetune import finetune, resume_finetune
from fastgan.training.sentiment import SENTIMENT, SentimentConfig, classify, evaluate_sentiment
from tests.training.test_pretrain import StopsAt

GOOD, BAD = ("warm", "fine", "lovely"), ("dull", "loud", "tired")
SHAPE = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def _sentences(start, count):
    draws = np.random.default_rng(start)
    rows = []
    for number in range(start, start + count):
        label = number % 3 == 0
        words = ["film"] * int(draws.integers(1, 9)) + [str(draws.choice(GOOD if label else BAD)), str(number)]
        rows.append(f"the {' '.join(words)} .\t{'good' if label else 'bad'}")
    return "\n".join(rows) + "\n"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """train.tsv, dev.tsv, and a tiny encoder without a head."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("sentiment")
    (folder / "train.tsv").write_text(_sentences(0, 50))
    (folder / "dev.tsv").write_text(_sentences(100, 20))
    tokenizer = train_tokenizer(_sentences(0, 50).splitlines(), 200)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, initializer_range=0.25, **SHAPE)
    BertModel(config).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    return folder


def tiny(files, **options):
    settings = {"train": files / "train.tsv", "validation": files / "dev.tsv", "model": str(files / "encoder"),
                "batch_size": 8, "lr": 5e-3, **options}  # fmt: skip
    return SentimentConfig(**settings)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_transformers_reads_the_folder(files, tmp_path):
    from transformers import pipeline

    run = tmp_path / "run"
    result = finetune(SENTIMENT, tiny(files, epochs=12, lr=2e-2, eval_every=21, dropout=0.0), run)
    assert (result.step, result.total, result.interrupted) == (84, 84, False)
    assert result.figures["accuracy"] > 0.9 > result.figures["majority"] == 0.7
    assert result.counts == {"train": 50, "validation": 20, "train_cut": 0, "validation_cut": 0, "in_both": 0}
    accuracies = {row["step"]: row["validation_accuracy"] for row in rows(run) if "validation_accuracy" in row}
    assert list(accuracies) == [21, 42, 63, 84]
    assert accuracies[result.best_step] == max(accuracies.values()) == result.figures["accuracy"]
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(run.glob("best-*"))
    guesses, probabilities = classify(run, ["the film film lovely 3 .", "the loud 4 ."])
    assert guesses == ["good", "bad"]
    assert probabilities.sum(1) == pytest.approx([1, 1])
    plain = pipeline("text-classification", model=str(run), device="cpu")("the film film lovely 3 .")[0]
    assert plain["label"] == "good"
    assert plain["score"] == pytest.approx(float(probabilities[0].max()), abs=1e-5)
    evaluation = evaluate_sentiment(run, files / "dev.tsv")
    assert evaluation["accuracy"] == pytest.approx(100 * result.figures["accuracy"])


@pytest.mark.parametrize("stop", [3, 11])
def test_R65_stopped_and_resumed_it_has_the_same_weights(files, tmp_path, stop):
    config = tiny(files, gradient_accumulation=2, batch_size=4, eval_every=5)
    whole = finetune(SENTIMENT, config, tmp_path / "whole")
    first = finetune(SENTIMENT, config, tmp_path / "run", reporter=StopsAt(stop))
    assert (first.step, first.interrupted) == (stop, True)
    torch.rand(7)
    second = resume_finetune(SENTIMENT, tmp_path / "run")
    assert dataclasses.replace(second, folder=whole.folder) == whole
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert resume_finetune(SENTIMENT, tmp_path / "run") == second


def test_accumulated_batches_are_one_batch(files, tmp_path):
    """Without the count of labels the gradients of batches would be added up, not averaged."""
    config = tiny(files, dropout=0.0, max_steps=2, eval_every=1, lr=1e-3, batch_size=8)
    found = []
    for name, options in (("one", {}), ("four", {"batch_size": 2, "gradient_accumulation": 4})):
        finetune(SENTIMENT, dataclasses.replace(config, **options), tmp_path / name)
        found.append([row[each] for row in rows(tmp_path / name) for each in ("loss", "grad_norm") if each in row])
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("adversary", [None, "freelb", "r-drop"])
def test_two_processes_do_as_one_with_the_double_batch(files, tmp_path, adversary):
    config = tiny(files, dropout=0.0, max_steps=6, eval_every=3, lr=1e-3, batch_size=8, adversary=adversary)
    finetune(SENTIMENT, config, tmp_path / "one")
    options = ["--model", config.model, "--train", config.train, "--validation", config.validation, "--lr", "1e-3",
               "--dropout", "0", "--max-steps", "6", "--eval-every", "3", "--batch-size", "4",
               *(["--adversary", adversary] if adversary else [])]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastgan",
         "finetune", "sentiment", "--out", tmp_path / "two", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Not the validation loss: transformers repeats examples to fill a last batch for both, and counts them.
    one, two = ([row[each] for row in rows(tmp_path / name) for each in ("loss", "grad_norm", "validation_accuracy")
                 if each in row] for name in ("one", "two"))  # fmt: skip
    assert len(one) == 6
    assert two == pytest.approx(one, rel=1e-4)


def test_the_best_weights_are_kept_and_a_run_can_be_lengthened(files, tmp_path):
    # So large a step that the weights of the end are bad ones.
    config = tiny(files, lr=0.2, epochs=3, warmup=0.0, eval_every=4)
    result = finetune(SENTIMENT, config, tmp_path / "run")
    accuracies = {row["step"]: row["validation_accuracy"] for row in rows(tmp_path / "run") if
                  "validation_accuracy" in row}  # fmt: skip
    assert result.figures["accuracy"] == max(accuracies.values())
    evaluation = evaluate_sentiment(tmp_path / "run", files / "dev.tsv", samples=0)
    assert evaluation["accuracy"] == pytest.approx(100 * result.figures["accuracy"])
    part = resume_finetune(SENTIMENT, tmp_path / "run", {"epochs": 4}, reporter=StopsAt(23))
    assert (part.step, part.interrupted) == (23, True)
    longer = resume_finetune(SENTIMENT, tmp_path / "run")
    assert (longer.step, longer.total) == (28, 28)
    assert longer.figures["accuracy"] >= result.figures["accuracy"]
    again = evaluate_sentiment(tmp_path / "run", files / "dev.tsv", samples=0)
    assert again["accuracy"] == pytest.approx(100 * longer.figures["accuracy"])


def test_from_scratch_and_texts_that_are_too_long(files, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SMALL", SHAPE)
    said = []

    class Says(StopsAt):
        def say(self, message):
            said.append(message)

    config = tiny(files, model=None, from_scratch="small", length=6, epochs=1)
    result = finetune(SENTIMENT, config, tmp_path / "run", reporter=Says(-1))
    assert result.counts["train_cut"] > 0
    assert f"{result.counts['train_cut']} training and" in said[0]
    assert classify(tmp_path / "run", ["the dull " * 50])[0][0] in ("good", "bad")


def test_a_causal_model_without_padding_tells_classes_apart(files, tmp_path):
    from transformers import GPT2Config, GPT2Model

    from fastgan.data.corpus import train_bpe

    tokenizer = train_bpe(_sentences(0, 50).splitlines(), 300)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "gpt")
    GPT2Model(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)).save_pretrained(
        tmp_path / "gpt"
    )
    finetune(SENTIMENT, tiny(files, model=str(tmp_path / "gpt"), epochs=1), tmp_path / "run")
    text = "the film warm 3 ."
    together, alone = (classify(tmp_path / "run", texts)[1][0] for texts in ([text, text + " and so on"], [text]))
    assert together == pytest.approx(alone, abs=1e-5)


def test_what_cannot_be_is_refused_by_name(files, tmp_path):
    for options, words in [
        ({"model": None}, "model"), ({"from_scratch": "small"}, "model"), ({"epochs": 0}, "epochs"),
        ({"lr": -1.0}, "lr"), ({"warmup": 1.5}, "warmup"), ({"train": ""}, "train must name a file"),
        ({"model": None, "from_scratch": "huge"}, "from_scratch must be one of small"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            tiny(files, **options)
    (tmp_path / "bad.tsv").write_text("nice\tgood\nugly\tbad\nso so\tmiddling\n")
    (tmp_path / "empty").mkdir()
    for options, error, words in [
        ({"validation": tmp_path / "bad.tsv"}, TextError, "bad.tsv: line 3, column 2: the label is 'middling'"),
        ({"model": str(tmp_path / "nowhere")}, FileNotFoundError, "nowhere"),
        ({"model": str(tmp_path / "empty")}, FileNotFoundError, "no config.json"),
        ({"train": tmp_path / "no.tsv"}, FileNotFoundError, "no.tsv"),
    ]:
        with pytest.raises(error, match=words):
            finetune(SENTIMENT, tiny(files, **options), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="is not fine-tuned for classes: it has no classifier"):
        classify(files / "encoder", ["a"])


def test_a_name_without_a_hub_is_said_at_once(files, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="nobody/nothing"):
        finetune(SENTIMENT, tiny(files, model="nobody/nothing"), tmp_path / "run")


def test_resuming_refuses_other_settings_other_files_and_damage(files, tmp_path):
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    run = tmp_path / "run"
    with pytest.raises(RunError, match="no such folder"):
        resume_finetune(SENTIMENT, run)
    config = tiny(files, train=tmp_path / "train.tsv", validation=tmp_path / "dev.tsv", max_steps=4, epochs=1)
    finetune(SENTIMENT, config, run, reporter=StopsAt(2))
    with pytest.raises(RunError, match="holds a run already"):
        finetune(SENTIMENT, config, run)
    with pytest.raises(RunError, match=r"lr = 0\.005, not 0\.1"):
        resume_finetune(SENTIMENT, run, {"lr": 0.1})
    with open(run / "checkpoints" / "checkpoint-2" / "optimizer.pt", "r+b") as file:
        file.seek(100)
        file.write(b"\xff\x00\xff")
    with pytest.raises(RunError, match=r"optimizer\.pt: damaged"):
        resume_finetune(SENTIMENT, run)
    finetune(SENTIMENT, config, tmp_path / "other", reporter=StopsAt(2))
    (tmp_path / "dev.tsv").write_text(_sentences(200, 20))
    with pytest.raises(RunError, match=r"dev\.tsv: is not what the run"):
        resume_finetune(SENTIMENT, tmp_path / "other")
