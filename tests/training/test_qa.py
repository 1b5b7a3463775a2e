"""Answers in texts: windows, the best span, and a tiny model that learns to point."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fastgan.data.squad import Question
from fastgan.data.text import train_tokenizer
from fastgan.training import qa as module
from fastgan.training import sentiment
from fastgan.training.finetune import finetune, resume_finetune
from fastgan.training.qa import QA, QAConfig, answer, evaluate_qa
from tests.training.test_pretrain import StopsAt

COLORS, THINGS = ("red", "blue", "old"), ("cat", "boat", "house", "dog")


def _document(seed, count, none=False):
    draws = np.random.default_rng(seed)
    paragraphs = []
    for number in range(count):
        color, thing = str(draws.choice(COLORS)), str(draws.choice(THINGS))
        before = "so it is said , " * int(draws.integers(0, 3))
        text = f"{before}the {thing} is {color} today ."
        answers = [{"text": color, "answer_start": text.index(f"is {color} ") + 3}]
        impossible = none and number % 4 == 0
        question = f"what is the {'moon' if impossible else thing} ?"
        paragraphs.append({"context": text, "qas": [{"id": f"{seed}-{number}", "question": question,
                           "answers": [] if impossible else answers, "is_impossible": impossible}]})  # fmt: skip
    return {"version": "2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qa")
    for name, document in (("train", _document(0, 160)), ("dev", _document(1, 24)), ("none", _document(2, 160, True)),
                           ("dev-none", _document(3, 24, True))):  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder


def tiny(files, **options):
    settings = {"train": files / "train.json", "validation": files / "dev.json", "from_scratch": "small", "length": 64,
                "stride": 8, "batch_size": 16, "lr": 1e-2, "dropout": 0.0, "epochs": 1, **options}  # fmt: skip
    return QAConfig(**settings)


@pytest.fixture(autouse=True)
def _small_models(monkeypatch):
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    monkeypatch.setattr(sentiment, "_SMALL", shape)


def test_it_learns_to_point_and_transformers_reads_the_folder(files, tmp_path):
    from transformers import AutoModelForQuestionAnswering

    run = tmp_path / "run"
    result = finetune(QA, tiny(files, epochs=5, eval_every=25), run)
    assert result.figures["f1"] > 80
    evaluation, predictions = evaluate_qa(run, files / "dev.json", samples=50)
    assert evaluation["F1"] == pytest.approx(result.figures["f1"])
    assert evaluation["EM"] == pytest.approx(result.figures["exact_match"])
    assert set(predictions) == {f"1-{number}" for number in range(24)}
    assert AutoModelForQuestionAnswering.from_pretrained(run).config.may_have_no_answer is False
    text = "so it is said , the boat is blue today ."
    found = answer(run, "what is the boat ?", [text])[0]
    assert text[found.start : found.end] == found.text == "blue"
    # A text of many windows: the answer is in one of the middle.
    long = "so it is said , " * 40 + text + " so it is said ," * 40
    far = answer(run, "what is the boat ?", [long], length=64, stride=8)[0]
    assert long[far.start : far.end] == far.text
    with pytest.raises(ValueError, match="as many questions"):
        answer(run, ["a", "b"], [text])


def test_questions_without_an_answer(files, tmp_path):
    from transformers import AutoConfig

    config = tiny(files, train=files / "none.json", validation=files / "dev-none.json")
    result = finetune(QA, config, tmp_path / "run")
    assert AutoConfig.from_pretrained(tmp_path / "run").may_have_no_answer is True
    evaluation, predictions = evaluate_qa(tmp_path / "run", files / "dev-none.json", samples=0)
    assert evaluation["F1"] == pytest.approx(result.figures["f1"])
    assert len(predictions) == 24


def test_R65_stopped_and_resumed_it_has_the_same_weights(files, tmp_path):
    config = tiny(files, dropout=0.1, eval_every=4, gradient_accumulation=2, batch_size=8)
    whole = finetune(QA, config, tmp_path / "whole")
    assert finetune(QA, config, tmp_path / "run", reporter=StopsAt(6)).interrupted
    second = resume_finetune(QA, tmp_path / "run")
    assert dataclasses.replace(second, folder=whole.folder) == whole
    assert (tmp_path / "run/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_windows_hold_the_answer_whole_or_not_at_all():
    text = " ".join(f"word{number}" for number in range(40)) + " the answer stands here " + "and more . " * 20
    tokenizer = train_tokenizer([text], 200)
    begin = text.index("answer stands")
    questions = [Question("a", "what ?", text, (("answer stands", begin),)), Question("b", "what ?", text, ())]
    rows, windows = module._windows(tokenizer, questions, 32, 12)
    held = 0
    for row, window in zip(rows, windows, strict=True):
        assert len(row["input_ids"]) <= 32
        start, end = row["start_positions"], row["end_positions"]
        if window.question == 1:
            assert (start, end) == (0, 0)
        elif start:
            assert text[window.offsets[start][0] : window.offsets[end][1]] == "answer stands"
            held += 1
        else:
            inside = [span for span in window.offsets if span is not None]
            assert not (inside[0][0] <= begin and inside[-1][1] >= begin + len("answer stands"))
    assert held >= 1
    short, _ = module._windows(tokenizer, questions[:1], 12, 100)  # a stride that leaves no room is made less
    assert len(short) > len(rows) // 2
    covered = {
        at for window in windows if window.question == 0 for span in window.offsets if span for at in range(*span)
    }
    assert covered >= {at for at, letter in enumerate(text) if letter != " "}


def test_the_best_span_is_found_by_hand():
    question = Question("a", "?", "abcdef", ())
    windows = [module._Window(0, [None, None, (0, 1), (1, 2), (2, 3)]), module._Window(0, [None, (3, 4), (4, 5), None])]
    begins = [np.array([1.0, 9.0, 0.0, 3.0, 5.0]), np.array([0.5, 1.0, 2.0, 9.0])]
    ends = [np.array([1.0, 9.0, 6.0, 1.0, 2.0]), np.array([0.5, 1.0, 4.5, 9.0])]
    # Ends before beginnings, and tokens of the question, do not count: (4, 4) with 5 + 2 is the best.
    found = module._best([question], windows, begins, ends, maybe_none=False)[0]
    assert (found.text, found.start, found.end, found.score) == ("c", 2, 3, 7.0 - 1.0)
    ends[1][0] = 9.0
    begins[0][0] = 9.0  # 9.5 and 10: less than the best span only in none
    assert module._best([question], windows, begins, ends, maybe_none=True)[0].text == ""
    assert module._best([question], windows, begins, ends, maybe_none=False)[0].text == "c"
    windows[0].offsets[4] = None
    assert module._best([question], windows, begins, ends, maybe_none=False)[0].text == "e"


def test_what_cannot_be_is_refused_by_name(files):
    for options, words in [({"stride": 32}, "stride"), ({"stride": -1}, "stride"), ({"length": 3}, "length")]:
        with pytest.raises(ValueError, match=words):
            tiny(files, **options)
