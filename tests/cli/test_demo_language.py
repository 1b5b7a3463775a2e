"""The demo's parts that write and answer: they run, and their questions do not hold their answers."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("bm25s")

from fastgan.cli.demo_language import ask, write
from fastgan.data.text import exceptions_told_of
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


def test_they_are_parts_of_the_demo(tmp_path, monkeypatch):
    from fastgan.cli import demo

    shape = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    monkeypatch.setattr(sentiment, "_SMALL", shape)
    monkeypatch.setattr(demo, "_pictures", lambda *_: (None, None))
    for part in ("_gan", "_language", "_classification", "_kernels"):
        monkeypatch.setattr(demo, part, lambda *_, **__: {})
    demo._demo(tmp_path / "demo", "digits", 0, quick=True)
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["generation"]["steps"] == 4
    assert summary["answers"]["steps"] == 2
    assert len(list((tmp_path / "demo").rglob("loss.png"))) == 2
