"""Summaries of a tiny language: it learns, several summaries count, and the first sentence stands beside."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("rouge_score")

from fastgan import metrics
from fastgan.data.documents import first_sentence, read_documents, sentences_of
from fastgan.data.units import TextError
from fastgan.training.extract import _rows, best_sentences
from fastgan.training.finetune import finetune
from fastgan.training.hub import load_tokenizer
from fastgan.training.summarize import (
    SUMMARIZE,
    SummarizeConfig,
    evaluate_summarize,
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
    assert evaluation["rouge2"] == pytest.approx(metrics.rouge(lines, columns, samples=0, stemmer=True)["rouge2"])
    assert summarize(tmp_path / "run", documents[:2], beams=2, max_tokens=16) == lines[:2]
    shown = fastgan("evaluate", "summarize", "--model", tmp_path / "run", "--data", files / "dev.jsonl", "--beams", 1,
                    "--max-tokens", 8, "--samples", 0, "--out", tmp_path / "out.txt")  # fmt: skip
    assert shown.exit_code == 0, shown.output
    assert "first sentence rouge1" in shown.output
    assert len((tmp_path / "out.txt").read_text().splitlines()) == 12


@pytest.fixture(scope="module")
def encoder(files, tmp_path_factory):
    from transformers import BertConfig, BertModel

    from fastgan.data.text import train_tokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = train_tokenizer(read_documents(files / "train.jsonl")[0], 200, max_length=64)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.2, **shape)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_encoder_takes_the_documents_sentences(encoder, tmp_path):
    # What is wanted is now the second sentence and now the third: neither its place nor one word alone gives it away.
    for name, count in (("train", 120), ("dev", 12)):
        rows = []
        for number in range(count):
            thing, other = THINGS[number % 4], THINGS[(number // 4 + number) % 4]
            said = [f"it rains {number} times .", f"we look out at the {other} .", "there is nothing !"]
            said.insert(1 + number % 2, f"look , the {thing} is red .")
            rows.append({"document": " ".join(said), "summary": f"the {thing} is red"})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SummarizeConfig(train=tmp_path / "train.jsonl", validation=tmp_path / "dev.jsonl", model=encoder, epochs=6,
                             lr=3e-3, batch_size=8)  # fmt: skip
    result = finetune(SUMMARIZE, config, tmp_path / "run")
    assert result.figures["rouge1"] > 70 > 30 > result.figures["first_sentence_rouge1"]
    evaluation, lines = evaluate_summarize(tmp_path / "run", tmp_path / "dev.jsonl", samples=0)
    assert 100 * evaluation["rouge1"] == pytest.approx(result.figures["rouge1"])
    documents, _ = read_documents(tmp_path / "dev.jsonl")
    assert all(line in sentences_of(document) for line, document in zip(lines, documents, strict=True))
    # transformers reads it as a classifier of tokens
    from transformers import AutoModelForTokenClassification

    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "run", local_files_only=True)
    assert plain.config.summary_sentences == 1
    shown = fastgan("finetune", "summarize", "--out", tmp_path / "run", "--resume")
    assert shown.exit_code == 0, shown.output
    assert "ROUGE-1 on validation" in shown.output
    assert "greedily" not in shown.output


def test_the_sentences_to_learn_raise_rouge_one_by_one():
    sentences = ["a cat sat", "nothing here", "on the mat", "a cat sat on a hat"]
    assert best_sentences(sentences, ["a cat sat on the mat"], 1) == [3]
    assert best_sentences(sentences[:3], ["a cat sat on the mat"], 3) == [0, 2]  # a third would make it worse
    assert best_sentences(sentences, ["something else", "nothing here"], 2) == [1]
    assert best_sentences(["x", "y"], ["z"], 1) == [0]


def test_tokens_of_sentences_and_of_what_is_cut(encoder):
    tokenizer = load_tokenizer(str(encoder))
    text = "it rains 3 times . there is the cat ! the end"
    rows, spans, cut = _rows(tokenizer, [text], 64)
    assert cut == 0
    own = tokenizer(sentences_of(text), add_special_tokens=False)["input_ids"]
    assert [rows[0]["input_ids"][start:stop] for start, stop in spans[0]] == own
    for length in range(4, len(rows[0]["input_ids"])):
        short, places, number = _rows(tokenizer, [text], length)
        assert number == 1
        assert len(short[0]["input_ids"]) == length
        assert places[0][0][0] == 1
        assert places[0][-1][1] == length - 1
        assert places[0][:-1] == spans[0][: len(places[0]) - 1]
    # a sentence whose letters the tokenizer drops keeps its number
    _, spans, _ = _rows(tokenizer, ["a cat . \u200b\u200b. the end . b"], 64)
    assert len(spans[0]) == 4


def test_what_cannot_be_taken_is_refused():
    with pytest.raises(ValueError, match="sentences must be at least 1, got 0"):
        SummarizeConfig(train="a", validation="b", model="m", sentences=0)


def test_first_sentences():
    assert first_sentence("We see it. It is there.") == "We see it."
    assert first_sentence("No end") == "No end"
    assert sentences_of(" One. Two?  Three!Four ") == ["One.", "Two?", "Three!Four"]
    assert sentences_of("一。二！三") == ["一。", "二！", "三"]
    assert sentences_of("") == [""]


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
