"""What stands beside the models' figures is itself right."""

import math

import pytest

from benchmarks import quality_baselines as baselines
from fastgan.data.squad import Question


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("context", ["a rose is", "zzzzzzzzz", "is a rose"])
def test_kneser_ney_is_a_distribution(order, context):
    text = "a rose is a rose is a rose, said the rose"
    letters = sorted(set(text) | set(context))
    # What is counted is all letters of both texts: each of the last has to bring the same ones.
    start = "".join(letters) + context
    before = baselines.kneser_ney(text, start, order) * (len(start) - order + 1)
    chances = [
        math.exp(before - baselines.kneser_ney(text, start + letter, order) * (len(start) - order + 2))
        for letter in letters
    ]
    assert sum(chances) == pytest.approx(1, abs=1e-9)
    assert min(chances) > 0


def test_kneser_ney_of_one_letter_by_hand():
    # a: 3 of 4, b: 1 of 4; one letter seen once, none twice: the discount is 1 / 1, shared with 2 of 2 letters.
    found = math.exp(-baselines.kneser_ney("aaab", "b", 1))
    assert found == pytest.approx((1 - 1) / 4 + 1 * 2 / 4 * 1 / 2)


def test_answers_by_rule():
    text = "The town lies by a lake. Anna Berg built the mill in 1873, after a fire. It rains often."
    questions = [Question(str(number), asked, text, ()) for number, asked in enumerate(
        ["Who built the mill?", "When was the mill built?", "How often does it rain?"])]  # fmt: skip
    found = baselines.spans_without_network(questions)
    assert found["sentence"][0] == "Anna Berg built the mill in 1873, after a fire."
    assert found["kind"][0] == "Anna Berg"
    assert found["kind"][1] == "1873"
    assert found["chunk"][1] == "after a fire."


def test_the_best_single_sentence():
    assert baselines.best_single(["A cat. A dog sat. No."], [["a dog sat down", "x"]]) == ["A dog sat."]
