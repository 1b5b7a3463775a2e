"""What an evaluation returns, and the bootstrap over items that stands behind its intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

#: resamples, and the seed: sacrebleu's own, so that a figure is the same in every run
SAMPLES = 1000
SEED = 12345


@dataclass(frozen=True)
class Result:
    """One figure.

    Attributes:
        name: as the field writes it: "BLEU", "rouge1", "EM".
        score: unrounded, in the unit of the library: 0 to 100, for ROUGE and distinct-n 0 to 1.
        low, high: a 95 % bootstrap interval; None where resampling would not be valid, or was not asked for.
        signature: the settings, for another to repeat it.
        text: the line that a report shows.
        details: whatever else the measure tells (n-gram precisions, counts).
    """

    name: str
    score: float
    low: float | None
    high: float | None
    signature: str
    text: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same inputs: the second's score, the difference to the first, and the paired test's p."""

    name: str
    score: float
    other: float
    difference: float
    p: float
    signature: str

    @property
    def text(self) -> str:
        return (
            f"{self.name}: {self.score:.4g} and {self.other:.4g}, difference {self.difference:+.4g}, p = {self.p:.4f}"
        )


@dataclass(frozen=True)
class Evaluation:
    """The figures of a measure, and of a comparison where a second system was given; prints as its lines."""

    results: list[Result]
    comparisons: list[Comparison] = field(default_factory=list)

    def __getitem__(self, name: str) -> float:
        """The score of that name."""
        for result in self.results:
            if result.name == name:
                return result.score
        raise KeyError(name)

    def __str__(self) -> str:
        lines = [result.text for result in self.results]
        lines += [f"{each.text} ({each.signature})" for each in self.comparisons]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"results": [asdict(each) for each in self.results], "comparisons": list(map(asdict, self.comparisons))}


def check_pairs(hypotheses: Sequence[str], references: Sequence[Sequence[str]], other: Sequence[str] | None) -> None:
    """Raises ValueError unless there is something, and as many of each."""
    if isinstance(hypotheses, str) or isinstance(references, str) or any(isinstance(r, str) for r in references):
        raise ValueError("hypotheses must be a list of strings, references a list of such lists")
    if not hypotheses:
        raise ValueError("there are no hypotheses")
    if not references:
        raise ValueError("there are no references")
    for number, each in enumerate(references):
        if len(each) != len(hypotheses):
            raise ValueError(f"{len(hypotheses)} hypotheses, but {len(each)} references in list {number}")
    if other is not None and len(other) != len(hypotheses):
        raise ValueError(f"{len(hypotheses)} hypotheses, but {len(other)} of the other system")


def check_samples(samples: int) -> None:
    if samples < 0:
        raise ValueError(f"samples must not be negative, got {samples}")


def interval(values: Sequence[float], samples: int = SAMPLES, seed: int = SEED) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the mean of resampled ``values``."""
    means = _resampled_means(np.asarray(values, dtype=float), samples, seed)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_p(values: Sequence[float], others: Sequence[float], samples: int = SAMPLES, seed: int = SEED) -> float:
    """The two-sided p of the mean difference by paired bootstrap, shifted to the null hypothesis (Noreen 1989)."""
    differences = np.asarray(others, dtype=float) - np.asarray(values, dtype=float)
    means = _resampled_means(differences, samples, seed)
    observed = differences.mean()
    # Never 0: the sample itself is one of those that are as extreme. The margin: equal sums in another order.
    extreme = np.abs(means - observed) >= abs(observed) - 1e-12
    return float((extreme.sum() + 1) / (samples + 1))


def _resampled_means(values: np.ndarray, samples: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    # one resample at a time: all of them at once would be samples × values numbers
    return np.array([values[generator.integers(len(values), size=len(values))].mean() for _ in range(samples)])
