"""Summaries of a tiny language: it learns, several summaries count, and the first sentence stands beside."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("rouge_score")

from fastgan import metrics
from fastgan.data.units import TextError
from fastgan.training.finetune import finetune
from fastgan.training.summarize import (
    SUMMARIZE,
    SummarizeConfig,
    evaluate_summarize,
    first_sentence,
    read_documents,
    summarize,
)
from tests.cli.test_language import fastgan

THINGS = ("cat", "boat", "house", "dog")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    for name, count in (("train", 120), ("dev", 12)):
        rows = []
        for number in range(count):
            thing = THINGS[number % 4]
            summary = f"a {thing} is seen"
            rows.append({"document": f"it rains {number} times . so we look out . there is the {thing} !",
                         "summaries": [summary, "it rains"] if number % 3 == 0 else [summary]})  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_it_learns_and_its_rouge_is_the_metrics(files, tmp_path):
    config = SummarizeConfig(
        train=files / "train.jsonl", validation=files / "dev.jsonl", from_scratch="small", layers=1, width=32, heads=2,
        vocab_size=300, length=80, target_length=16, batch_size=16, lr=1e-2, dropout=0.0, beams=2, epochs=6,
        eval_every=30,
    )  # fmt: skip
    result = finetune(SUMMARIZE, config, tmp_path / "run")
    assert result.counts["train"] == 160  # each summary is an example
    assert result.figures["rouge1"] > 60 > result.figures["first_sentence_rouge1"] > 0
    evaluation, lines = evaluate_summarize(tmp_path / "run", files / "dev.jsonl", beams=2, max_tokens=16, samples=0)
    assert 100 * evaluation["rouge1"] == pytest.approx(result.figures["rouge1_beam_2"])
    assert 100 * evaluation["first sentence rouge1"] == pytest.approx(result.figures["first_sentence_rouge1"])
    documents, summaries = read_documents(files / "dev.jsonl")
    columns = [[own[0] for own in summaries], [own[-1] for own in summaries]]
    assert evaluation["rouge2"] == pytest.approx(metrics.rouge(lines, columns, samples=0)["rouge2"])
    assert summarize(tmp_path / "run", documents[:2], beams=2, max_tokens=16) == lines[:2]
    shown = fastgan("evaluate", "summarize", "--model", tmp_path / "run", "--data", files / "dev.jsonl", "--beams", 1,
                    "--max-tokens", 8, "--samples", 0, "--out", tmp_path / "out.txt")  # fmt: skip
    assert shown.exit_code == 0, shown.output
    assert "first sentence rouge1" in shown.output
    assert len((tmp_path / "out.txt").read_text().splitlines()) == 12


def test_first_sentences():
    assert first_sentence("We see it. It is there.") == "We see it."
    assert first_sentence("No end") == "No end"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('{"document": "a"}\n', "line 1: has no summary (looked for summaries, summary"),
        ('{"document": "a", "summary": "b"}\n{"summary": "b"}\n', "line 2: has no document"),
        ('{"document": "a", "summaries": []}\n', "line 1, key 'summaries': must be text"),
        ('{"document": "a", "summary": 3}\n', "line 1, key 'summary': must be text, got 3"),
        ('{"document": " ", "summary": "b"}\n', "line 1, key 'document': must be text"),
        ('{"document": "a", \n', "line 1, column"),
        ("[1]\n", "line 1: must be an object"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, data, words):
    path = tmp_path / "a.jsonl"
    path.write_text(data)
    with pytest.raises(TextError) as error:
        read_documents(path)
    assert words in str(error.value)
