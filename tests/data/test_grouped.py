"""The order of examples: every one is seen in every epoch, like lengths together, a function of the seed."""

import numpy as np
import pytest

from fastgan.data.grouped import GroupedByLength, sorted_by_length, steps_per_epoch


@pytest.mark.parametrize(("examples", "step"), [(1000, 16), (1003, 8), (3, 16), (1, 4)])
def test_each_epoch_has_all_examples_in_batches_of_like_lengths(examples, step):
    lengths = np.random.default_rng(0).integers(1, 100, examples)
    rows = [{"input_ids": [0] * length, "labels": number} for number, length in enumerate(lengths)]
    steps = steps_per_epoch(examples, step)
    made = GroupedByLength(rows, lengths, step, seed=3, steps=2 * steps)
    assert len(made) == 2 * steps * step
    epochs = [[made[index]["labels"] for index in range(e * steps * step, (e + 1) * steps * step)] for e in range(2)]
    for seen in epochs:
        assert set(seen) == set(range(examples))
        most = max(seen.count(number) for number in seen[:20])
        assert most <= -(-steps * step // examples)
    if examples > step:
        assert epochs[0] != epochs[1]
        padded = sum(step * max(lengths[seen[at : at + step]]) for at in range(0, len(seen), step))
        assert padded < 1.1 * sum(lengths[seen])
        firsts = lengths[seen[::step]]  # the steps themselves are in no order
        assert abs(np.corrcoef(firsts, np.arange(len(firsts)))[0, 1]) < 0.3
    again = GroupedByLength(rows, lengths, step, seed=3, steps=2 * steps)
    other = GroupedByLength(rows, lengths, step, seed=4, steps=2 * steps)
    assert np.array_equal(again.order(1), made.order(1))
    assert examples < 4 or not np.array_equal(other.order(1), made.order(1))
    with pytest.raises(IndexError):
        made[len(made)]


def test_for_evaluation_the_longest_come_first():
    rows = [{"n": 0}, {"n": 1}, {"n": 2}]
    assert [row["n"] for row in sorted_by_length(rows, [2, 9, 5])] == [1, 2, 0]
