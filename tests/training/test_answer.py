"""Answers from many texts: the right passage, its file and line, and that there is none."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("bm25s")

from fastgan.data.passages import Passage
from fastgan.data.units import TextError
from fastgan.training import answer as module
from fastgan.training import sentiment
from fastgan.training.answer import answer_from
from fastgan.training.finetune import finetune
from fastgan.training.qa import QA, Answer, QAConfig
from fastgan.training.retrieval import Found
from tests.training.test_qa import _document

SHAPE = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model that has learnt to point at what a thing is, in one short text."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("answer")
    (folder / "train.json").write_text(json.dumps(_document(0, 160)))
    (folder / "dev.json").write_text(json.dumps(_document(1, 24)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentiment, "_SMALL", SHAPE)
        config = QAConfig(train=folder / "train.json", validation=folder / "dev.json", from_scratch="small", length=64,
                          stride=8, batch_size=16, lr=1e-2, dropout=0.0, epochs=5, eval_every=25)  # fmt: skip
        assert finetune(QA, config, folder / "run").figures["f1"] > 80
    return folder / "run"


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("so it is said ,\nso it is said .\n\nthe boat is blue today .\n\nso it is said .\n")
    (folder / "b.md").write_text("so it is said ,\nso it is said ,\nthe house is\nold today .\n")
    return folder


def test_answers_come_with_file_and_line(model, corpus):
    questions = ["what is the boat ?", "what is the house ?"]
    first, second = answer_from(model, [corpus], questions, retrieval="bm25", passages=1)
    found = first.answers[0]
    assert (found.text, found.file, found.line) == ("blue", str(corpus / "a.txt"), 3 + 1)
    assert found.passage[found.start : found.end] == "blue"
    assert (second.answers[0].text, second.answers[0].file, second.answers[0].line) == ("old", str(corpus / "b.md"), 4)
    assert first.question == questions[0]
    assert math.isfinite(first.margin)


@pytest.mark.parametrize("retrieval", ["dense", "both"])
def test_every_search_gives_answers_that_are_where_they_say(model, corpus, retrieval):
    # A tiny encoder's neighbours mean nothing: all passages are read.
    reply = answer_from(model, [corpus], "what is the boat ?", retrieval=retrieval, passages=9, top=9, encoder=model)[0]
    assert "blue" in {each.text for each in reply.answers}
    for each in reply.answers:
        assert each.text.split()[0] in Path(each.file).read_text().split("\n")[each.line - 1]
        assert " ".join(each.passage[each.start : each.end].split()) == each.text


def test_top_answers_are_ordered_and_bounded(model, corpus):
    reply = answer_from(model, [corpus / "a.txt", corpus / "b.md"], "what is the boat ?", top=3)[0]
    assert 1 < len(reply.answers) <= 3
    scores = [each.score for each in reply.answers]
    assert scores == sorted(scores, reverse=True)
    assert len(answer_from(model, [corpus], "what is the boat ?", passages=1, top=3)[0].answers) == 1


def test_a_question_without_an_answer_has_none(model, corpus):
    reply = answer_from(model, [corpus], "zebra", retrieval="bm25")[0]
    assert (reply.answers, reply.margin) == ((), -math.inf)
    # The reader's own word: "no answer" is better by far than every span of these texts.
    high = answer_from(model, [corpus], "what is the boat ?", threshold=1e6)[0]
    assert high.answers == ()
    assert math.isfinite(high.margin)


def test_the_order_and_the_threshold_by_hand():
    texts = {0: Passage("f", 5, "one\ntwo\nthree"), 4: Passage("g", 1, "four")}
    found = Found(np.array([4, 0]), np.array([2.0, 1.0], np.float32))
    spans = [Answer("four", 1.5, 0, 4), Answer("two\nthree", 9.0, 4, 13)]
    reply = module._reply("?", found, texts, spans, -math.inf, 5)
    # 1.5 and all of the prior beside 9 and half of it.
    assert [(each.text, each.score, each.line, each.retrieval) for each in reply.answers] == [
        ("two three", 9.0 + 5.0, 6, 1.0), ("four", 1.5 + 10.0, 1, 2.0),
    ]  # fmt: skip
    assert reply.margin == 9.0
    assert [each.text for each in module._reply("?", found, texts, spans, 2.0, 5).answers] == ["two three"]
    assert module._reply("?", found, texts, spans, 9.0, 5).answers == ()
    assert [each.text for each in module._reply("?", found, texts, spans, -math.inf, 1).answers] == ["two three"]


def test_a_model_trained_on_unanswerable_questions_uses_the_threshold_of_zero(model, corpus, monkeypatch):
    from fastgan.training import qa
    from fastgan.training.hub import evaluating

    monkeypatch.setattr(qa, "answer", lambda *_, **__: [Answer("blue", -0.5, 0, 4)] * 2)
    with evaluating(model, "AutoModelForQuestionAnswering", "fastgan", "questions") as pair:
        for trained, count in ((False, 1), (True, 0)):
            pair[0].config.may_have_no_answer = trained
            reply = answer_from(pair, [corpus], "what is the boat ?", passages=2, retrieval="bm25")[0]
            assert len(reply.answers) == count
            assert reply.margin == -0.5


def test_memory_does_not_grow_with_the_texts(model, tmp_path):
    peaks = []
    answer_from(model, [_put(tmp_path, "the cat is red .")], "what is the boat ?", retrieval="bm25")  # imports all
    for count in (3000, 8000):
        path = _put(tmp_path, ("so it was said , and said again . " * 25 + "\n\n") * count + "the boat is blue today .")
        tracemalloc.start()
        reply = answer_from(model, [path], "what is the boat ?", retrieval="bm25", passages=2)[0]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (reply.answers[0].text, reply.answers[0].line) == ("blue", 2 * count + 1)
    # 5,000 passages of 850 letters more: some numbers of each are kept, its letters are not.
    assert peaks[1] - peaks[0] < 5000 * 850 / 4


def _put(folder, text):
    path = folder / "big.txt"
    path.write_text(text)
    return path


def test_what_cannot_be_is_refused_by_name(model, corpus, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 \n")
    for options, error, words in [
        ({"retrieval": "tfidf"}, ValueError, "retrieval must be one of"), ({"top": 0}, ValueError, "top must be"),
        ({"passages": 1.5}, TypeError, "passages must be"), ({"threshold": math.nan}, ValueError, "threshold"),
        ({"size": 3}, ValueError, "size must be"), ({"stride": 128}, ValueError, "stride must be"),
        ({"questions": []}, ValueError, "questions must not be empty"), ({"corpus": []}, ValueError, "corpus must not"),
        ({"questions": ["a", " "]}, ValueError, "questions: number 2 is blank"),
        ({"corpus": str(corpus)}, TypeError, "corpus must be a list"),
        ({"corpus": [tmp_path / "no.txt"]}, FileNotFoundError, "no.txt"),
        ({"corpus": [tmp_path / "latin.txt"]}, TextError, "line 1, column 4"),
        ({"model": tmp_path / "no"}, FileNotFoundError, "no such folder"),
        ({"encoder": tmp_path / "none"}, FileNotFoundError, "none"),
    ]:  # fmt: skip
        arguments = {"model": model, "corpus": [corpus], "questions": ["what ?"], **options}
        with pytest.raises(error, match=words):
            answer_from(**arguments)


def test_a_file_that_changes_while_it_is_read_is_said(model, corpus, monkeypatch):
    def meddled(*arguments, real=module.retrieve, **options):
        (corpus / "a.txt").write_text("the boat is red today .\n")
        return real(*arguments, **options)

    monkeypatch.setattr(module, "retrieve", meddled)
    with pytest.raises(ValueError, match=r"a\.txt: changed while it was read"):
        answer_from(model, [corpus], "what is the boat ?", retrieval="bm25")
