"""Exact match and F1 of answers, as SQuAD's official evaluation script (version 2.0) defines them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from fastgan.metrics.results import SAMPLES, SEED, Comparison, Evaluation, Result, check_samples, interval, paired_p

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


def normalize_answer(answer: str) -> str:
    """Lower case, without punctuation (ASCII's) and English articles, single spaces."""
    kept = "".join(each for each in answer.lower() if each not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(answer: str, gold: str) -> float:
    """1.0 if both are the same after normalisation."""
    return float(normalize_answer(answer) == normalize_answer(gold))


def f1(answer: str, gold: str) -> float:
    """F1 of the bags of words; where either is empty after normalisation, 1.0 if both are, else 0.0."""
    words, gold_words = normalize_answer(answer).split(), normalize_answer(gold).split()
    if not words or not gold_words:
        return float(words == gold_words)
    same = sum((Counter(words) & Counter(gold_words)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(words), same / len(gold_words)
    return 2 * precision * recall / (precision + recall)


def em_f1(
    answers: Sequence[str],
    golds: Sequence[Sequence[str]],
    *,
    other: Sequence[str] | None = None,
    samples: int = SAMPLES,
    seed: int = SEED,
) -> Evaluation:
    """Exact match and F1 in percent, each question's best over its gold answers.

    Version 2.0's rules, which are those of 1.1 wherever each answer has a word: gold answers that normalise to nothing
    are left out, and a question with no other gold answer has none: an empty answer is then the right one.

    Args:
        answers: one a question; "" says that there is none.
        golds: the gold answers of each question, one list a question; [] or [""] where there is none.
        other: a second system's answers, for the paired bootstrap test.
        samples: bootstrap resamples over questions; 0 for no interval.
        seed: of the resamples.

    Raises:
        ValueError: no answers, or unequal numbers.
    """
    check_samples(samples)
    if isinstance(answers, str) or any(isinstance(each, str) for each in golds):
        raise ValueError("answers must be a list of strings, golds a list of lists of strings")
    if not answers:
        raise ValueError("there are no answers")
    for name, each in (("lists of gold answers", golds), ("answers of the other system", other)):
        if each is not None and len(each) != len(answers):
            raise ValueError(f"{len(answers)} answers, but {len(each)} {name}")
    usable = [[gold for gold in each if normalize_answer(gold)] or [""] for each in golds]
    signature = f"norm:squad-2.0|questions:{len(answers)}|bs:{samples}|seed:{seed}"
    results, comparisons = [], []
    for name, measure in (("EM", exact_match), ("F1", f1)):
        first, *rest = (
            [100.0 * max(measure(answer, gold) for gold in each) for answer, each in zip(system, usable, strict=True)]
            for system in (answers, other)
            if system is not None
        )
        score = sum(first) / len(first)
        text, low, high = f"{name}|{signature} = {score:.2f}", None, None
        if samples:
            low, high = interval(first, samples, seed)
            text += f" (95 %: {low:.2f} to {high:.2f})"
        results.append(Result(name, score, low, high, signature, text))
        for second in rest:
            theirs = sum(second) / len(second)
            p = paired_p(first, second, samples or SAMPLES, seed)
            comparisons.append(Comparison(name, score, theirs, theirs - score, p, signature))
    return Evaluation(results, comparisons)
