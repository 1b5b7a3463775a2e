"""The batch order: every example once an epoch, the same from any starting point, for any number of workers."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgan
from fastgan.data import BatchOrder, ImageArray, ImageBatches
from fastgan.data.batches import prefetch

# Written down once: a run must go on after an update of numpy.
EXPECTED_ORDER = [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
EXPECTED_FLIPS = [False, False, True, True, True, True, False, False, True, True]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 70), st.integers(-3, 2**65), st.integers(0, 5), st.booleans())
def test_every_example_once_an_epoch(length, batch_size, seed, epoch, drop_last):
    order = BatchOrder(length, batch_size, seed, drop_last=drop_last)
    batches = [order[epoch * len(order) + step] for step in range(len(order))]
    seen = np.concatenate(batches)
    assert len(set(seen.tolist())) == len(seen)
    if not drop_last or length < batch_size:
        assert sorted(seen) == list(range(length))
    if drop_last and length >= batch_size:
        assert {len(batch) for batch in batches} == {batch_size}
    assert all(1 <= len(batch) <= batch_size for batch in batches)


def test_R62_nine_examples_in_batches_of_four_and_of_sixty_four():
    assert [len(batch) for batch in BatchOrder(9, 4)] == [4, 4, 1]
    assert [len(batch) for batch in BatchOrder(9, 4, drop_last=True)] == [4, 4]
    for drop_last in (False, True):
        assert [len(batch) for batch in BatchOrder(9, 64, drop_last=drop_last)] == [9]


def test_R65_R66_pure_function_of_seed_and_step():
    order = BatchOrder(100, 8, seed=5)
    forward = [order[step].copy() for step in range(40)]
    for step in (39, 0, 13, 12, 26):
        assert np.array_equal(BatchOrder(100, 8, seed=5)[step], forward[step])
        assert np.array_equal(BatchOrder(100, 8, seed=5).flips(step), order.flips(step))
    assert not np.array_equal(BatchOrder(100, 8, seed=6)[0], forward[0])
    assert not np.array_equal(order.permutation(0), order.permutation(1))
    assert not np.array_equal(order.permutation(0), np.arange(100))


def test_order_is_the_same_in_every_version():
    assert BatchOrder(10, 10, seed=0).permutation(0).tolist() == EXPECTED_ORDER
    assert BatchOrder(10, 10, seed=0).flips(0).tolist() == EXPECTED_FLIPS


def test_flips_are_balanced_and_differ_between_steps():
    order = BatchOrder(1000, 1000)
    assert 400 < order.flips(0).sum() < 600
    assert not np.array_equal(order.flips(0), order.flips(1))


@pytest.mark.parametrize(
    ("length", "batch_size", "kind"), [(0, 4, ValueError), (4, 0, ValueError), (4, 2.0, TypeError)]
)
def test_impossible_orders_are_refused(length, batch_size, kind):
    with pytest.raises(kind, match=r"length|batch_size"):
        BatchOrder(length, batch_size)


def _images(count=9):
    return ImageArray(np.random.default_rng(0).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8))


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_same_batches_for_every_number_of_workers_and_start(num_workers):
    batches = ImageBatches(_images(), 4, seed=3, flip=True, num_workers=num_workers)
    expected = [batches.at(step) for step in range(10)]
    assert [len(batch) for batch in expected[:4]] == [4, 4, 1, 4]
    for start in (0, 4):
        result = list(batches.steps(start, 10))
        assert len(result) == 10 - start
        assert all(torch.equal(one, other) for one, other in zip(result, expected[start:], strict=True))
    assert len(list(batches)) == 3
    endless = batches.steps(7)
    assert torch.equal(next(endless), expected[7])
    endless.close()


def test_prefetch_raises_in_its_place_and_stops_early():
    made = []

    def make(step):
        made.append(step)
        if step == 3:
            raise OSError("the disk is gone")
        return step

    results = prefetch(make, itertools.count(), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(results)
    assert max(made) < 12


def test_R67_works_without_a_guarded_main_module(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, numpy as np\n"
        "multiprocessing.set_start_method('spawn')\n"
        "from fastgan.data import ImageArray, ImageBatches\n"
        "batches = ImageBatches(ImageArray(np.zeros((9, 1, 8, 8), np.uint8)), 4, num_workers=2)\n"
        "print([len(batch) for batch in batches])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(fastgan.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.stdout.strip() == "[4, 4, 1]", result.stderr
