"""Blocks of a text that begin elsewhere each epoch."""

import numpy as np
import pytest

from fastgan.data.blocks import MovedBlocks
from fastgan.data.grouped import GroupedByLength


@pytest.mark.parametrize(
    ("tokens", "length", "count"), [(100, 10, 9), (109, 10, 10), (20, 10, 1), (10, 10, 1), (9, 10, 0)]
)
def test_an_epoch_is_the_text_from_another_place_on(tokens, length, count):
    blocks = MovedBlocks(np.arange(tokens), length, seed=3)
    assert len(blocks) == count
    begins = set()
    for epoch in range(40):
        read = [blocks.of_epoch(epoch, number)["input_ids"] for number in range(count)]
        if count:
            joined = np.concatenate(read)
            assert np.array_equal(joined, np.arange(joined[0], joined[0] + count * length))
            begins.add(int(joined[0]))
    assert len(begins) == {100: 10, 109: 10, 20: 10, 10: 1, 9: 0}[tokens]
    if count:
        assert np.array_equal(blocks[0]["labels"], blocks.of_epoch(0, 0)["input_ids"])
        again = MovedBlocks(np.arange(tokens), length, seed=3)
        assert np.array_equal(again.of_epoch(7, 0)["input_ids"], blocks.of_epoch(7, 0)["input_ids"])
    with pytest.raises(IndexError):
        blocks.of_epoch(0, count)


def test_training_takes_an_epochs_own_blocks():
    blocks = MovedBlocks(np.arange(100), 10, seed=1)
    grouped = GroupedByLength(blocks, [10] * len(blocks), 3, seed=0, steps=6)
    for epoch in range(2):
        seen = {tuple(grouped[9 * epoch + place]["input_ids"]) for place in range(9)}
        assert seen == {tuple(blocks.of_epoch(epoch, number)["input_ids"]) for number in range(9)}
