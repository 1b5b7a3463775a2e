"""Answers from many texts: passages are found, and a model that was fine-tuned on questions points at the answer.

    from fastgan.training.answer import answer_from

    reply = answer_from("runs/qa", ["books/"], "Who wrote Frankenstein?")[0]
    reply.answers[0].text, reply.answers[0].file, reply.answers[0].line

The texts are read as a stream and never held; see ``fastgan.training.retrieval`` for the search and
``fastgan.training.qa`` for the model.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from fastgan.data.passages import SIZE, Passage, read_passages
from fastgan.data.units import text_files
from fastgan.training import qa
from fastgan.training.hub import evaluating
from fastgan.training.language_run import check_integers
from fastgan.training.retrieval import Found, check_kind, retrieve

StrPath = str | os.PathLike[str]
_PRIOR = 10.0  # logits that the best passage is ahead of one that was found with no score


@dataclass(frozen=True)
class SourcedAnswer:
    """A span of a text. ``passage[start:end]`` is where it stands, on ``line`` of ``file``.

    ``score``: the span's logits' sum less that of "no answer", plus up to ten for the passage's place in the search, by
    which answers are ordered. ``retrieval``: the passage's score in the search.
    """

    text: str
    score: float
    file: str
    line: int
    passage: str
    start: int
    end: int
    retrieval: float


@dataclass(frozen=True)
class Reply:
    """The answers to a question, best first; none where the texts have none.

    ``margin`` is the best span's logits' sum less that of "no answer" (minus infinity if no passage was found): SQuAD
    2.0's measure of whether there is an answer, the other way round.
    """

    question: str
    answers: tuple[SourcedAnswer, ...]
    margin: float


@dataclass(frozen=True)
class _Limits:
    top: int
    passages: int
    batch_size: int
    length: int
    stride: int


def answer_from(
    model: StrPath | tuple[object, object],
    corpus: Sequence[StrPath],
    questions: str | Sequence[str],
    *,
    retrieval: str = "both",
    top: int = 1,
    passages: int = 5,
    encoder: StrPath | tuple[object, object] | None = None,
    threshold: float | None = None,
    size: int = SIZE,
    batch_size: int = 32,
    length: int = 256,
    stride: int = 96,
    attention: str = "fastgan",
) -> list[Reply]:
    """The answers to each question in many texts.

    Args:
        model: a folder that ``finetune`` or transformers wrote, a name on the hub, or a (model, tokenizer) pair.
        corpus: text files in UTF-8, or folders of ``.txt``, ``.md`` and ``.rst`` files.
        questions: one or several.
        retrieval: "bm25" (words; needs bm25s), "dense" (the encoder's embeddings) or "both" combined.
        top: answers to a question at most.
        passages: that are read for an answer, the best of the search.
        encoder: of the dense search; None takes the model's own.
        threshold: an answer must be so much better than "no answer" (logits). None: 0 for a model that was trained on
            questions without one; no threshold for others, which never say that there is none if a passage is found.
        size: letters of a passage at most.
        batch_size, length, stride: of the reading, as :func:`fastgan.training.qa.answer` has them.
        attention: "fastgan", or transformers' own.

    Raises ValueError (TextError for what a file holds), TypeError, FileNotFoundError or OSError, naming the file, the
    folder or the argument.
    """
    asked = [questions] if isinstance(questions, str) else list(questions)
    check_kind(retrieval)
    limits = _Limits(top, passages, batch_size, length, stride)
    check_integers(limits, {"top": 1, "passages": 1, "batch_size": 1, "length": 8, "stride": 0})
    if stride >= length // 2:
        raise ValueError(f"stride must be less than half the length of {length}, got {stride}")
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"threshold must be finite, got {threshold}")
    if isinstance(corpus, (str, os.PathLike)):
        raise TypeError(f"corpus must be a list of files or folders, got {corpus!r}")
    if not asked or not corpus:
        raise ValueError(f"{'corpus' if asked else 'questions'} must not be empty")
    for number, each in enumerate(asked, 1):
        if not each.strip():
            raise ValueError(f"questions: number {number} is blank")
    files = text_files(list(corpus))
    before = [(each.stat().st_size, each.stat().st_mtime_ns) for each in files]

    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(evaluating(model, "AutoModelForQuestionAnswering", attention, "questions"))
        searcher = reader
        if encoder is not None and retrieval != "bm25":
            searcher = stack.enter_context(evaluating(encoder, "AutoModel", attention, "embeddings", whole=False))
        found = retrieve(
            asked, lambda: (each.text for each in read_passages(files, size)), retrieval, searcher, most=passages
        )
        wanted = {number for each in found for number in each.numbers.tolist()}
        texts = {number: each for number, each in enumerate(read_passages(files, size)) if number in wanted}
        for file, (bytes_before, time_before) in zip(files, before, strict=True):
            if (file.stat().st_size, file.stat().st_mtime_ns) != (bytes_before, time_before):
                raise ValueError(f"{file}: changed while it was read")
        pairs = [(number, place) for number, each in enumerate(found) for place in each.numbers.tolist()]
        spans = qa.answer(
            reader, [asked[number] for number, _ in pairs], [texts[place].text for _, place in pairs],
            batch_size=batch_size, length=length, stride=stride, may_have_none=False,
        )  # fmt: skip
        if threshold is None:
            threshold = 0.0 if qa.may_have_no_answer(reader[0]) else -math.inf
    replies, at = [], 0
    for question, one in zip(asked, found, strict=True):
        own = spans[at : at + len(one.numbers)]
        at += len(one.numbers)
        replies.append(_reply(question, one, texts, own, threshold, top))
    return replies


def _reply(
    question: str, found: Found, texts: dict[int, Passage], spans: Sequence[qa.Answer], threshold: float, top: int
) -> Reply:
    answers = []
    for number, score, span in zip(found.numbers.tolist(), found.scores.tolist(), spans, strict=True):
        if not span.text or span.score <= threshold:
            continue
        passage = texts[number]
        prior = _PRIOR * score / max(float(found.scores[0]), 1e-9)
        line = passage.line + passage.text.count("\n", 0, span.start)
        answers.append(SourcedAnswer(" ".join(span.text.split()), span.score + prior, passage.file, line, passage.text,
                                     span.start, span.end, score))  # fmt: skip
    answers.sort(key=lambda each: -each.score)
    margin = max((span.score for span in spans), default=-math.inf)
    return Reply(question, tuple(answers[:top]), margin)
