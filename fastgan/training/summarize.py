"""Summaries: an encoder and decoder fine-tuned on documents with their summaries, measured by ROUGE.

    from fastgan.training.finetune import finetune
    from fastgan.training.summarize import SUMMARIZE, SummarizeConfig, summarize

    config = SummarizeConfig(train="train.jsonl", validation="dev.jsonl", model="facebook/bart-base")
    finetune(SUMMARIZE, config, "runs/mine")
    summarize("runs/mine", ["A long text. It goes on."])

The ROUGE of each document's first sentence stands beside: a model trained from scratch on a few thousand documents does
not reach it, and only a pretrained one is worth using.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fastgan.data.labelled import json_lines, read_text
from fastgan.data.units import TextError
from fastgan.metrics import rouge
from fastgan.metrics.results import Evaluation, Result
from fastgan.training.finetune import Prepared, Task
from fastgan.training.language_run import check_integers
from fastgan.training.pairs import PairConfig, prepare_pairs, write

DOCUMENT_NAMES = ("document", "article", "text", "source")
SUMMARY_NAMES = ("summaries", "summary", "highlights", "target")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class SummarizeConfig(PairConfig):
    """What ``fastgan finetune summarize`` is told. Defaults suit a pretrained model."""

    train: str = ""  # .jsonl, an object with a document and one summary or several a line
    validation: str = ""
    epochs: int = 3
    batch_size: int = 8
    length: int = 512
    target_length: int = 64  # tokens of a summary at most

    FILES: ClassVar[tuple[str, ...]] = ("train", "validation")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"target_length": 4})


def read_documents(path: str | os.PathLike[str]) -> tuple[list[str], list[list[str]]]:
    """Documents and the summaries of each, from JSONL in UTF-8, plain or .gz.

    A line is an object with one of ``DOCUMENT_NAMES`` and one of ``SUMMARY_NAMES``, a string or a list of them. Raises
    TextError, which names file, line and key, FileNotFoundError or OSError.
    """
    documents, summaries = [], []
    for number, row in json_lines(path, read_text(path), "a document and its summary"):
        found = []
        for names, what in ((DOCUMENT_NAMES, "document"), (SUMMARY_NAMES, "summary")):
            key = next((name for name in names if name in row), None)
            if key is None:
                raise TextError(f"{path}: line {number}: has no {what} (looked for {', '.join(names)})")
            values = row[key] if isinstance(row[key], list) and what == "summary" else [row[key]]
            if not values or not all(isinstance(each, str) and each.strip() for each in values):
                raise TextError(f"{path}: line {number}, key {key!r}: must be text, got {row[key]!r:.40}")
            found.append([" ".join(each.split()) for each in values])
        documents.append(found[0][0])
        summaries.append(found[1])
    return documents, summaries


def first_sentence(document: str) -> str:
    return _SENTENCE.split(document, maxsplit=1)[0]


def _prepare(config: SummarizeConfig, say: Callable[[str], None]) -> Prepared:
    documents, summaries = read_documents(config.train)
    held, held_summaries = read_documents(config.validation)
    # A document with several summaries is an example for each; on validation the loss takes the first.
    every = [(document, summary) for document, own in zip(documents, summaries, strict=True) for summary in own]
    train = [document for document, _ in every], [summary for _, summary in every]

    def measure(pair: Any, beams: int) -> dict[str, float]:
        return _figures(write(pair, held, beams=beams, max_tokens=config.target_length), held_summaries)

    levels = _figures([first_sentence(each) for each in held], held_summaries)
    validation = held, [each[0] for each in held_summaries]
    prepared = prepare_pairs(config, train, validation, config.target_length, measure, "rouge1", say)
    prepared.levels = {f"first_sentence_{name}": figure for name, figure in levels.items()}
    return prepared


def _figures(lines: list[str], summaries: list[list[str]]) -> dict[str, float]:
    """In percent, against the best of each document's summaries."""
    results = _rouge(lines, summaries, 0).results
    return {result.name: 100 * result.score for result in results}


def _rouge(lines: list[str], summaries: list[list[str]], samples: int) -> Evaluation:
    most = max(map(len, summaries))
    # Columns of equal length: a summary that is there twice changes no best score.
    columns = [[own[min(number, len(own) - 1)] for own in summaries] for number in range(most)]
    return rouge(lines, columns, samples=samples)


SUMMARIZE = Task("summarize", SummarizeConfig, _prepare)


def summarize(
    model: str | os.PathLike[str] | tuple[Any, Any],
    documents: Sequence[str],
    *,
    beams: int = 5,
    max_tokens: int = 64,
    batch_size: int = 16,
    attention: str = "fastgan",
) -> list[str]:
    """A summary of each document, by beam search (greedy with one beam), by transformers' ``generate``.

    ``model``: a folder that :func:`finetune` or transformers wrote, a name on the hub, or a (model, tokenizer) pair.
    Documents longer than the model are cut at its end. Raises ValueError or FileNotFoundError, naming the folder.
    """
    return write(model, documents, beams=beams, max_tokens=max_tokens, batch_size=batch_size, attention=attention)


def evaluate_summarize(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    beams: int = 5,
    max_tokens: int = 64,
    samples: int = 1000,
) -> tuple[Evaluation, list[str]]:
    """ROUGE-1, -2 and -L (0 to 1) of a model's summaries, of the documents' first sentences beside, and the summaries.

    Raises ValueError (TextError for what the file holds) or FileNotFoundError, naming the file or folder.
    """
    documents, summaries = read_documents(data)
    lines = summarize(model, documents, beams=beams, max_tokens=max_tokens)
    results = list(_rouge(lines, summaries, samples).results)
    for result in _rouge([first_sentence(each) for each in documents], summaries, samples).results:
        name = f"first sentence {result.name}"
        text = f"first sentence {result.text}"
        results.append(Result(name, result.score, result.low, result.high, result.signature, text, result.details))
    return Evaluation(results), lines
