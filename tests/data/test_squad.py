"""Questions in SQuAD's JSON: what is read, and what is said of what is wrong."""

from __future__ import annotations

import json

import pytest

from fastgan.data.squad import Question, read_questions
from fastgan.data.units import TextError

TEXT = "Mary Shelley wrote it, größer than life, in 1818."


def document(**changes):
    question = {"id": "q1", "question": "Who?", "answers": [{"text": "Mary Shelley", "answer_start": 0}], **changes}
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": TEXT, "qas": [question]}]}]}


def put(folder, value):
    path = folder / "a.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def test_both_versions_are_read(tmp_path):
    later = {"text": "1818", "answer_start": TEXT.index("1818")}
    path = put(tmp_path, document(answers=[{"text": "Mary Shelley", "answer_start": 0}, later]))
    assert read_questions(path) == [Question("q1", "Who?", TEXT, (("Mary Shelley", 0), ("1818", TEXT.index("1818"))))]
    path = put(tmp_path, document(answers=[], is_impossible=True, plausible_answers=[later]))
    assert read_questions(path) == [Question("q1", "Who?", TEXT, ())]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "no text in it"),
        ('{"data": [\n', "line 2, column 1: not JSON"),
        ({"data": []}, "there is no question"),
        ({"questions": []}, "data: not of SQuAD's form (KeyError: 'data')"),
        (["data"], "not of SQuAD's form"),
        (document(answers=None), "data[0].paragraphs[0].qas[0]: not of SQuAD's form"),
        (document(question=3), "a string is expected, got 3"),
        (document(answers=[{"text": "Mary", "answer_start": "0"}]), "answer_start must be a whole number"),
        (document(answers=[{"text": "Mary", "answer_start": 1}]), "question 'q1': the answer 'Mary' is not at 1"),
        (document(answers=[{"text": "1818", "answer_start": -5}]), "is not at -5"),
        (document(answers=[{"text": "", "answer_start": 0}]), "is not at 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(tmp_path, value, words):
    path = put(tmp_path, value)
    with pytest.raises(TextError) as error:
        read_questions(path)
    assert words in str(error.value)
    assert str(error.value).startswith(str(path))


def test_an_id_that_is_there_twice(tmp_path):
    value = document()
    value["data"] *= 2
    with pytest.raises(TextError, match=r"data\[1\]\.paragraphs\[0\]\.qas\[0\]: the id 'q1' is there twice"):
        read_questions(put(tmp_path, value))
