"""Questions in SQuAD's JSON, version 1.1 or 2.0, with answers that are where they are said to be."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from fastgan.data.labelled import read_text
from fastgan.data.units import TextError

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Question:
    """A question about a text. ``answers`` are (answer, its first character's offset in the text); none where
    the text has none."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


def read_questions(path: StrPath) -> list[Question]:
    """All questions of a file.

    Raises:
        TextError: not UTF-8, not JSON (with line and column), another form (with the place in it), an answer that is
            not at its offset, an id that is there twice, or no question at all.
        FileNotFoundError, OSError: it cannot be read.
    """
    text = read_text(path)
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise TextError(f"{path}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise TextError(f"{path}: not JSON of SQuAD's form: nested too deep") from error
    questions: list[Question] = []
    seen: set[str] = set()
    place = "data"
    try:
        for a, article in enumerate(document["data"]):
            for p, paragraph in enumerate(article["paragraphs"]):
                place = f"data[{a}].paragraphs[{p}]"
                context = _string(paragraph["context"])
                for q, each in enumerate(paragraph["qas"]):
                    place = f"data[{a}].paragraphs[{p}].qas[{q}]"
                    name, question = _string(each["id"]), _string(each["question"])
                    if name in seen:
                        raise TextError(f"{path}: {place}: the id {name!r} is there twice")
                    seen.add(name)
                    given = [] if each.get("is_impossible") else each["answers"]
                    answers = tuple((_string(answer["text"]), answer["answer_start"]) for answer in given)
                    for answer, start in answers:
                        _check(path, place, name, context, answer, start)
                    questions.append(Question(name, question, context, answers))
    except (KeyError, TypeError, AttributeError) as error:
        raise TextError(f"{path}: {place}: not of SQuAD's form ({type(error).__name__}: {error})") from error
    if not questions:
        raise TextError(f"{path}: there is no question in it")
    return questions


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a string is expected, got {value!r:.40}")
    return value


def _check(path: StrPath, place: str, name: str, context: str, answer: str, start: object) -> None:
    if isinstance(start, bool) or not isinstance(start, int):
        raise TypeError(f"answer_start must be a whole number, got {start!r:.40}")
    if not answer or start < 0 or context[start : start + len(answer)] != answer:
        found = context[max(start, 0) : max(start, 0) + max(len(answer), 1)]
        raise TextError(
            f"{path}: {place}: question {name!r}: the answer {answer[:60]!r} is not at {start}, where the text has "
            f"{found[:60]!r}"
        )
