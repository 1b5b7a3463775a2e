"""Examples of unlike lengths in batches of like ones, so that little is padded; each a function of (seed, number)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fastgan.data.batches import _raw

_SHUFFLE, _STEPS = 4, 5  # streams apart from those of fastgan.data.batches and blocks
_POOL = 50  # steps that are sorted together: an epoch still mixes well, and lengths in a step hardly differ


class GroupedByLength(torch.utils.data.Dataset):
    """Example ``i`` of training, counted from its start: ``rows`` in an order in which like lengths stand together.

    Every epoch is a new shuffle; pools of fifty steps are sorted by length and cut into steps, and the steps shuffled.
    What a step sees does not depend on how it is divided into batches and processes. An epoch that does not fill its
    last step begins anew at its own first examples, so that every step has the same number of examples: ``len(rows)``
    rounded up to a multiple of ``step_size``.

    Args:
        rows: the examples, as the collator takes them; where they are others each epoch, with a method
            ``of_epoch(epoch, number)``.
        lengths: of each, in tokens.
        step_size: examples of a step: batch size times accumulation times processes.
        seed: of the order.
        steps: of the whole training.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        lengths: Sequence[int],
        step_size: int,
        seed: int,
        steps: int,
    ) -> None:
        self.rows, self.lengths, self.step_size = rows, np.asarray(lengths), step_size
        self.seed, self.count = seed, steps * step_size
        self.epoch_size = steps_per_epoch(len(rows), step_size) * step_size
        self._latest: tuple[int, np.ndarray] | None = None

    def order(self, epoch: int) -> np.ndarray:
        """All numbers of an epoch's examples, int64 (epoch_size,)."""
        if self._latest is None or self._latest[0] != epoch:
            shuffled = np.argsort(_raw(len(self.rows), _SHUFFLE, self.seed, epoch), kind="stable")
            filled = np.resize(shuffled, self.epoch_size)
            pool = _POOL * self.step_size
            steps = []
            for start in range(0, self.epoch_size, pool):
                part = filled[start : start + pool]
                part = part[np.argsort(self.lengths[part], kind="stable")]
                steps.append(part.reshape(-1, self.step_size))
            joined = np.concatenate(steps)
            mixed = np.argsort(_raw(len(joined), _STEPS, self.seed, epoch), kind="stable")
            self._latest = (epoch, joined[mixed].reshape(-1))
        return self._latest[1]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        epoch, place = divmod(index, self.epoch_size)
        number = int(self.order(epoch)[place])
        return self.rows.of_epoch(epoch, number) if hasattr(self.rows, "of_epoch") else self.rows[number]


def steps_per_epoch(examples: int, step_size: int) -> int:
    return -(-examples // step_size)


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Numbers in an order in which memory that does not suffice is noticed at once; equals keep theirs."""
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def batches_of_like_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """All numbers, the longest first, ``batch_size`` at a time."""
    order = longest_first(lengths)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def sorted_by_length(rows: Sequence[dict[str, Any]], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """For evaluation."""
    return [rows[index] for index in longest_first(lengths)]
