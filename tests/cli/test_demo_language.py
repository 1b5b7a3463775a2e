"""The demo's parts that write, answer and play a game: they run, and the questions do not hold their answers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("bm25s")

from fastgan.cli.demo_adversaries import ARMS, _table, compete
from fastgan.cli.demo_language import ask, write
from fastgan.data.text import exceptions_told_of, labelled_sentences, split_by_hash, train_tokenizer
from fastgan.training import sentiment

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_sentence_names_its_exception_once_and_the_question_does_not():
    told = exceptions_told_of()
    assert len(told) > 40
    assert len({sentence for _, sentence, _ in told}) == len(told)
    for name, sentence, blank in told:
        assert sentence.count(name) == 1
        assert name not in blank
        assert blank.replace("…", name, 1) == sentence or "…" in sentence


def test_a_few_steps_of_each(tmp_path, monkeypatch):
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    monkeypatch.setattr(sentiment, "_SMALL", shape)
    written = write(tmp_path / "w", seed=0, steps=2)
    assert math.isfinite(written["loss_per_character"])
    assert all(text.startswith("The function ") for text in written["written"])
    answered = ask(tmp_path / "a", seed=0, steps=2)
    assert answered["questions"] > 5
    assert 0 <= answered["right"] <= 1
    assert (tmp_path / "a" / "model" / "loss.png").exists()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny BERT with the head that the demo's has, for guessing words."""
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = train_tokenizer(labelled_sentences(per_chapter=20)[0], 200)
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, initializer_range=0.25, **shape)
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_every_arm_sees_as_many_passes_and_the_game_is_drawn(encoder, tmp_path, monkeypatch, capsys):
    from fastgan.training import finetune as module

    runs, real = [], module.finetune
    monkeypatch.setattr(module, "finetune", lambda task, config, out: runs.append(config) or real(task, config, out))
    found = compete(encoder, tmp_path / "out", seed=3, passes=6, draws=2, per_chapter=2)
    assert [len(each) for each in found["accuracies"].values()] == [2, 2, 2, 2]
    assert [config.seed for config in runs] == [3] * 4 + [4] * 4
    steps = {arm: config.max_steps for arm, config in zip(ARMS, runs[:4], strict=True)}
    assert steps == {"plain": 6, "plain, FreeLB's steps": 2, "FreeLB, K = 2": 2, "GAN-BERT": 3}
    assert (found["labels"], found["passes"]) == (12, 6)
    sentences = labelled_sentences(per_chapter=180)[0]
    held = {" ".join(sentences[i].split()) for i in split_by_hash(sentences, 0.2)[1]}
    assert found["nearest"]
    assert set(found["nearest"]) <= held
    assert found["diversity"] > 0
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "adversaries.txt").read_text().splitlines()[1].strip() in printed

    from PIL import Image

    picture = np.asarray(Image.open(tmp_path / "out" / "game.png").convert("L"), dtype=float)
    assert picture.shape[1] > 2 * picture.shape[0]
    thirds = np.array_split(picture, 3, axis=1)
    assert min(each.std() for each in thirds) > 5


def test_R75_the_table_says_by_how_much_freelb_loses_at_equal_passes():
    accuracies = {arm: [0.5, 0.6] for arm in ARMS} | {"FreeLB, K = 2": [0.4, 0.58], "GAN-BERT": [0.4, 0.7]}
    lines = _table(accuracies, 120).splitlines()
    assert lines[1].split() == ["plain", "120", "55.0", "±", "7.1", "50.0", "60.0"]
    # Draw by draw: −10 and −2.
    assert lines[3].split()[4:] == ["40", "49.0", "±", "12.7", "-6.0", "±", "5.7", "40.0", "58.0"]
    assert lines[4].split() == ["GAN-BERT", "60", "55.0", "±", "21.2", "+0.0", "±", "14.1", "40.0", "70.0"]


def test_they_are_parts_of_the_demo(encoder, tmp_path, monkeypatch):
    from fastgan.cli import demo

    shape = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    monkeypatch.setattr(sentiment, "_SMALL", shape)
    monkeypatch.setattr(demo, "_pictures", lambda *_: (None, None))
    for part in ("_gan", "_classification", "_kernels"):
        monkeypatch.setattr(demo, part, lambda *_, **__: {})
    monkeypatch.setattr(demo, "_language", lambda out, *_, **__: out.symlink_to(encoder) or {})
    demo._demo(tmp_path / "demo", "digits", 0, quick=True)
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["generation"]["steps"] == 4
    assert summary["answers"]["steps"] == 2
    assert summary["adversaries"]["passes"] == 6
    assert len(list((tmp_path / "demo").rglob("loss.png"))) == 2
    assert (tmp_path / "demo" / "adversaries" / "game.png").exists()
