"""Accuracy and macro F1 of classes, with the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastgan.metrics.results import SAMPLES, SEED, Comparison, Evaluation, Result, check_samples, paired_p


def classification(
    predictions: Sequence[str],
    labels: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    other: Sequence[str] | None = None,
    samples: int = SAMPLES,
    seed: int = SEED,
) -> Evaluation:
    """Accuracy and macro F1 in percent, each with a 95 % bootstrap interval over the items.

    Macro F1 is the mean over the classes that ``labels`` or ``predictions`` hold, a class that is never predicted
    rightly counting 0, as scikit-learn's ``f1_score(average="macro")``. The accuracy's ``details`` have ``classes``
    and the ``confusion`` matrix, a row for each true class; and ``majority``, the share of the commonest label.

    Args:
        predictions: a class an item.
        labels: the true ones.
        names: the order of the classes; sorted if None.
        other: a second system's predictions, for a paired bootstrap test of the accuracy.
        samples: bootstrap resamples; 0 for no interval.
        seed: of the resamples.

    Raises:
        ValueError: no items, unequal numbers of them, or a class that ``names`` does not have.
    """
    check_samples(samples)
    if not len(labels):
        raise ValueError("there are no labels")
    for what, each in (("predictions", predictions), ("predictions of the other system", other)):
        if each is not None and len(each) != len(labels):
            raise ValueError(f"{len(labels)} labels, but {len(each)} {what}")
    classes = list(names) if names is not None else sorted({*labels, *predictions})
    number = {name: index for index, name in enumerate(classes)}
    if strange := {*labels, *predictions} - set(classes):
        raise ValueError(f"{min(strange)!r} is none of the classes {', '.join(classes[:20])}")
    truth, guess = (np.array([number[each] for each in side]) for side in (labels, predictions))
    confusion = _confusion(truth, guess, len(classes))
    signature = f"items:{len(labels)}|classes:{len(classes)}|bs:{samples}|seed:{seed}"
    drawn = []
    generator = np.random.default_rng(seed)
    for _ in range(samples):
        chosen = generator.integers(len(truth), size=len(truth))
        table = _confusion(truth[chosen], guess[chosen], len(classes))
        drawn.append((_accuracy(table), _macro_f1(table)))
    majority = 100.0 * confusion.sum(1).max() / confusion.sum()
    details = {"classes": classes, "confusion": confusion.tolist(), "majority": float(majority)}
    results = []
    for which, (name, score) in enumerate((("accuracy", _accuracy(confusion)), ("macro F1", _macro_f1(confusion)))):
        text, low, high = f"{name}|{signature} = {score:.2f}", None, None
        if samples:
            low, high = map(float, np.percentile([each[which] for each in drawn], [2.5, 97.5]))
            text += f" (95 %: {low:.2f} to {high:.2f})"
        results.append(Result(name, score, low, high, signature, text, details if which == 0 else {}))
    comparisons = []
    if other is not None:
        right, right_too = ([100.0 * (a == b) for a, b in zip(side, labels, strict=True)]
                            for side in (predictions, other))  # fmt: skip
        first, second = results[0].score, sum(right_too) / len(right_too)
        p = paired_p(right, right_too, samples or SAMPLES, seed)
        comparisons.append(Comparison("accuracy", first, second, second - first, p, signature))
    return Evaluation(results, comparisons)


def _confusion(truth: np.ndarray, guess: np.ndarray, classes: int) -> np.ndarray:
    return np.bincount(truth * classes + guess, minlength=classes * classes).reshape(classes, classes)


def _accuracy(confusion: np.ndarray) -> float:
    return float(100.0 * confusion.trace() / confusion.sum())


def _macro_f1(confusion: np.ndarray) -> float:
    both = confusion.sum(0) + confusion.sum(1)
    there = both > 0
    return float(100.0 * (2 * confusion.diagonal()[there] / both[there]).mean())


def confusion_table(evaluation: Evaluation) -> str:
    """The confusion matrix of :func:`classification` as lines: a row for each true class, a column for each guess."""
    details = evaluation.results[0].details
    names, rows = details["classes"], details["confusion"]
    width = max(6, *(len(name) for name in names), *(len(str(count)) for row in rows for count in row)) + 1
    lines = ["true \\ predicted".ljust(width + 12) + "".join(name.rjust(width) for name in names)]
    for name, row in zip(names, rows, strict=True):
        lines.append(name.ljust(width + 12) + "".join(str(count).rjust(width) for count in row))
    return "\n".join(lines)
