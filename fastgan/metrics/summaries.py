"""ROUGE by rouge-score, Google's own reimplementation of the Perl script."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastgan.metrics.results import SAMPLES, SEED, Comparison, Evaluation, Result, check_pairs, check_samples, paired_p

TYPES = ("rouge1", "rouge2", "rougeL")
_KNOWN = re.compile(r"rouge([1-9]|L|Lsum)")


def rouge(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    other: Sequence[str] | None = None,
    types: Sequence[str] = TYPES,
    stemmer: bool = False,
    split_summaries: bool = False,
    samples: int = SAMPLES,
    seed: int = SEED,
) -> Evaluation:
    """Mean F1 of ROUGE-N and ROUGE-L (Lin 2004) over the lines; precision and recall are in the details.

    With several references a line's score is that of the one with the best F1, as rouge-score's ``score_multi`` has it.
    The interval is that of its ``BootstrapAggregator``, from ``seed``.

    Args:
        hypotheses: the system's summaries.
        references: one list of summaries, or several, each as long as hypotheses.
        other: a second system's summaries, for the paired bootstrap test.
        types: "rouge1" to "rouge9", "rougeL" (a summary as one sequence), "rougeLsum" (sentences apart, at newlines).
        stemmer: Porter's.
        split_summaries: rougeLsum finds the sentences itself (needs nltk's data).
        samples: bootstrap resamples; 0 for no interval.
        seed: of the resamples.

    Raises:
        ImportError: rouge-score is not installed.
        ValueError: no lines, or unequal numbers of them; an unknown type.
    """
    check_pairs(hypotheses, references, other)
    check_samples(samples)
    for each in types:
        if not _KNOWN.fullmatch(each):
            raise ValueError(f"types must be rouge1 to rouge9, rougeL or rougeLsum, got {each!r}")
    if not types:
        raise ValueError("types must name at least one kind of ROUGE")
    library, scoring = _rouge_score()
    scorer = library.RougeScorer(list(types), use_stemmer=stemmer, split_summaries=split_summaries)
    systems = [_scores(scorer, system, references) for system in (hypotheses, other) if system is not None]
    signature = f"nrefs:{len(references)}|stemmer:{'yes' if stemmer else 'no'}"
    signature += ("|split:yes" if split_summaries else "") + f"|bs:{samples}|seed:{seed}|{_version()}"
    results = [_result(scoring, kind, systems[0], signature, samples, seed) for kind in types]
    comparisons = []
    for kind in types if other is not None else ():
        first, second = ([score[kind].fmeasure for score in system] for system in systems)
        mine, theirs = float(np.mean(first)), float(np.mean(second))
        p = paired_p(first, second, samples or SAMPLES, seed)
        comparisons.append(Comparison(kind, mine, theirs, theirs - mine, p, signature))
    return Evaluation(results, comparisons)


def _scores(scorer: Any, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    return [
        scorer.score_multi(targets, hypothesis)
        for hypothesis, *targets in zip(hypotheses, *references, strict=True)
    ]  # fmt: skip


def _result(scoring: Any, kind: str, scores: list, signature: str, samples: int, seed: int) -> Result:
    matrix = np.array([score[kind] for score in scores])
    precision, recall, score = (float(mean) for mean in matrix.mean(axis=0))
    text = f"{kind}|{signature} = {score:.4f}"
    low = high = None
    if samples:
        aggregator = scoring.BootstrapAggregator(n_samples=samples)
        for each in scores:
            aggregator.add_scores({kind: each[kind]})
        before = np.random.get_state()  # the library draws from numpy's global generator
        np.random.seed(seed)
        try:
            aggregate = aggregator.aggregate()[kind]
        finally:
            np.random.set_state(before)
        low, high = float(aggregate.low.fmeasure), float(aggregate.high.fmeasure)
        text += f" (95 %: {low:.4f} to {high:.4f})"
    text += f" precision {precision:.4f} recall {recall:.4f}"
    return Result(kind, score, low, high, signature, text, {"precision": precision, "recall": recall})


def _version() -> str:
    from importlib.metadata import version

    return f"rouge-score:{version('rouge-score')}"


def _rouge_score() -> tuple[Any, Any]:
    try:
        from rouge_score import rouge_scorer, scoring
    except ImportError as error:
        raise ImportError(f"ROUGE needs rouge-score ({error}): pip install 'fastgan[metrics]'") from error
    return rouge_scorer, scoring
