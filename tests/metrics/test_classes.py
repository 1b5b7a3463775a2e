"""Accuracy and macro F1 beside scikit-learn's."""

import numpy as np
import pytest

from fastgan import metrics
from fastgan.metrics.classes import confusion_table


def test_they_are_scikit_learns():
    scikit = pytest.importorskip("sklearn.metrics")
    draws = np.random.default_rng(0)
    for names in (["a", "b"], ["a", "b", "c", "never"]):
        truth = [str(each) for each in draws.choice(names[:3], 200)]
        guess = [label if draws.random() < 0.7 else str(draws.choice(names[:3])) for label in truth]
        found = metrics.classification(guess, truth, names=names, samples=200)
        assert found["accuracy"] == pytest.approx(100 * scikit.accuracy_score(truth, guess))
        assert found["macro F1"] == pytest.approx(100 * scikit.f1_score(truth, guess, average="macro"))
        details = found.results[0].details
        assert details["confusion"] == scikit.confusion_matrix(truth, guess, labels=names).tolist()
        for result in found.results:
            assert result.low < result.score < result.high
            assert 5 < result.high - result.low < 20  # 200 items at 80 %: 4 standard errors are 11
        assert confusion_table(found).splitlines()[1].split()[0] == "a"


def test_a_second_system_and_what_cannot_be():
    truth = ["a", "b"] * 50
    found = metrics.classification(["a"] * 100, truth, other=truth, samples=100)
    assert (found["accuracy"], found.comparisons[0].other, found.comparisons[0].difference) == (50, 100, 50)
    assert found.comparisons[0].p < 0.05
    assert found["macro F1"] == pytest.approx(100 / 3)
    for arguments, words in [(([], []), "no labels"), ((["a"], ["a", "b"]), "2 labels, but 1 predictions")]:
        with pytest.raises(ValueError, match=words):
            metrics.classification(*arguments)
    with pytest.raises(ValueError, match="'c' is none of the classes a, b"):
        metrics.classification(["c"], ["a"], names=["a", "b"])
