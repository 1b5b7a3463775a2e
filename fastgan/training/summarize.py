"""Summaries, measured by ROUGE: an encoder with a decoder writes them, an encoder alone takes a document's sentences.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fastgan.data.documents import first_sentence, read_documents
from fastgan.metrics import rouge
from fastgan.metrics.results import Evaluation, Result
from fastgan.training.extract import extract, extracts, prepare_extraction
from fastgan.training.finetune import Prepared, Task
from fastgan.training.hub import evaluating
from fastgan.training.language_run import check_integers
from fastgan.training.pairs import PairConfig, prepare_pairs, write


@dataclass(frozen=True)
class SummarizeConfig(PairConfig):
    """What ``fastgan finetune summarize`` is told. Defaults suit a pretrained model."""

    train: str = ""  # .jsonl, an object with a document and one summary or several a line
    validation: str = ""
    epochs: int = 3
    batch_size: int = 8
    length: int = 512
    target_length: int = 64  # tokens of a summary at most
    sentences: int = 1  # that an encoder alone takes

    FILES: ClassVar[tuple[str, ...]] = ("train", "validation")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"target_length": 4, "sentences": 1})


def _prepare(config: SummarizeConfig, say: Callable[[str], None]) -> Prepared:
    documents, summaries = read_documents(config.train)
    held, held_summaries = read_documents(config.validation)
    levels = _figures([first_sentence(each) for each in held], held_summaries)
    named = {f"first_sentence_{name}": figure for name, figure in levels.items()}
    if config.model is not None and extracts(config.model):
        prepared = prepare_extraction(config, (documents, summaries), (held, held_summaries), _figures, say)
        prepared.levels = named
        return prepared
    # A document with several summaries is an example for each; on validation the loss takes the first.
    every = [(document, summary) for document, own in zip(documents, summaries, strict=True) for summary in own]
    train = [document for document, _ in every], [summary for _, summary in every]

    def measure(pair: Any, beams: int) -> dict[str, float]:
        return _figures(write(pair, held, beams=beams, max_tokens=config.target_length), held_summaries)

    validation = held, [each[0] for each in held_summaries]
    prepared = prepare_pairs(config, train, validation, config.target_length, measure, "rouge1", say)
    prepared.levels = named
    return prepared


def _figures(lines: list[str], summaries: Sequence[Sequence[str]]) -> dict[str, float]:
    """In percent, of words without their endings, against the best of each document's summaries."""
    results = _rouge(lines, summaries, 0, True).results
    return {result.name: 100 * result.score for result in results}


def _rouge(lines: list[str], summaries: Sequence[Sequence[str]], samples: int, stemmer: bool) -> Evaluation:
    most = max(map(len, summaries))
    # Columns of equal length: a summary that is there twice changes no best score.
    columns = [[own[min(number, len(own) - 1)] for own in summaries] for number in range(most)]
    return rouge(lines, columns, samples=samples, stemmer=stemmer)


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

    A model that is an encoder takes the document's best sentences instead, as many as it was trained to take.

    ``model``: a folder that :func:`finetune` or transformers wrote, a name on the hub, or a (model, tokenizer) pair.
    Documents longer than the model are cut at its end. Raises ValueError or FileNotFoundError, naming the folder.
    """
    if extracts(model):
        kind = "AutoModelForTokenClassification"
        with evaluating(model, kind, attention, "sentences of a summary") as (network, tokenizer):
            return extract(network, tokenizer, documents, batch_size=batch_size)
    return write(model, documents, beams=beams, max_tokens=max_tokens, batch_size=batch_size, attention=attention)


def evaluate_summarize(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    beams: int = 5,
    max_tokens: int = 64,
    samples: int = 1000,
    stemmer: bool = True,
) -> tuple[Evaluation, list[str]]:
    """ROUGE-1, -2 and -L (0 to 1) of a model's summaries, of the documents' first sentences beside, and the summaries.

    ``stemmer``: Porter's, for English, as published figures for summaries mostly have it.

    Raises ValueError (TextError for what the file holds) or FileNotFoundError, naming the file or folder.
    """
    documents, summaries = read_documents(data)
    lines = summarize(model, documents, beams=beams, max_tokens=max_tokens)
    results = list(_rouge(lines, summaries, samples, stemmer).results)
    for result in _rouge([first_sentence(each) for each in documents], summaries, samples, stemmer).results:
        name = f"first sentence {result.name}"
        text = f"first sentence {result.text}"
        results.append(Result(name, result.score, result.low, result.high, result.signature, text, result.details))
    return Evaluation(results), lines
