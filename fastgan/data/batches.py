"""Which pictures make up which batch: a pure function of (seed, step), so that a run resumes anywhere at once.

Nothing is drawn from a generator that would have to be saved. Shuffles and flips come from the raw bits of Philox, a
counter-based generator whose stream numpy guarantees across its versions, keyed by seed and epoch or step.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

from fastgan.data.images import ImageArray

T = TypeVar("T")

# One stream for each use, so that flips do not repeat the shuffle's bits.
_SHUFFLE, _FLIP = 0, 1


def _raw(count: int, use: int, seed: int, number: int) -> np.ndarray:
    """``count`` uint64, a pure function of the arguments."""
    entropy = [use, seed & 0xFFFFFFFFFFFFFFFF, number]
    return np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)


class BatchOrder:
    """The order in which ``length`` examples are seen, epoch after epoch, in batches.

    Every epoch is a new shuffle of all examples. The last batch of an epoch is smaller where ``batch_size`` does not
    divide ``length``; ``drop_last`` leaves it out, unless it is the epoch's only one, so that fewer examples than a
    batch still train.

    ``order[step]`` is the int64 array of the examples of a step, counted from the start of training: constant work
    after the epoch's shuffle, whatever the step, so a run that goes on at step n needs to know n alone.

    Args:
        length: number of examples, at least 1.
        batch_size: at least 1.
        seed: any integer.
        drop_last: leave out the smaller last batch.
        shuffle: False keeps the examples' own order in every epoch.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int = 0, *, drop_last: bool = False, shuffle: bool = True
    ) -> None:
        for name, value in (("length", length), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.length, self.batch_size, self.seed = length, batch_size, int(seed)
        self.drop_last, self.shuffle = drop_last, shuffle
        whole, rest = divmod(length, batch_size)
        self.steps_per_epoch = max(1, whole if drop_last else whole + (rest > 0))
        self._latest: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.steps_per_epoch

    def permutation(self, epoch: int) -> np.ndarray:
        """All examples in the order of this epoch, int64 (length,)."""
        latest = self._latest  # read once: prefetching threads share this object
        if latest is not None and latest[0] == epoch:
            return latest[1]
        if self.shuffle:
            order = np.argsort(_raw(self.length, _SHUFFLE, self.seed, epoch), kind="stable")
        else:
            order = np.arange(self.length)
        order.setflags(write=False)
        self._latest = (epoch, order)
        return order

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, batch within the epoch) of a step."""
        if step < 0:
            raise IndexError(f"step must not be negative, got {step}")
        return divmod(step, self.steps_per_epoch)

    def __getitem__(self, step: int) -> np.ndarray:
        epoch, batch = self.position(step)
        return self.permutation(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]

    def __iter__(self) -> Iterator[np.ndarray]:
        """The batches of the first epoch."""
        return (self[step] for step in range(self.steps_per_epoch))

    def flips(self, step: int) -> np.ndarray:
        """For each example of the step whether it is mirrored: boolean, a pure function of (seed, step)."""
        return (_raw(len(self[step]), _FLIP, self.seed, step) & 1).astype(bool)


class ImageBatches:
    """Batches of an :class:`ImageArray` by step: float32 (B, C, H, W) in [-1, 1].

    ``batches.at(step)`` is one batch, ``batches.steps(start, stop)`` goes through them with the next ones prepared in
    the background, ``iter(batches)`` is the first epoch, ``len(batches)`` an epoch's steps. All give the same tensors
    whatever ``num_workers``, because a batch depends on its step alone.

    Args:
        images: the pictures.
        batch_size, seed, drop_last: as in :class:`BatchOrder`.
        flip: mirror each picture with probability one half, anew in every step.
        num_workers: threads that prepare batches ahead; 0 prepares each when it is asked for. Threads, not processes:
            gathering and scaling release the interpreter lock, and nothing has to be guarded by ``__main__``.
    """

    def __init__(
        self,
        images: ImageArray,
        batch_size: int,
        seed: int = 0,
        *,
        flip: bool = False,
        drop_last: bool = False,
        num_workers: int = 0,
    ) -> None:
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}")
        self.images, self.flip, self.num_workers = images, flip, num_workers
        self.order = BatchOrder(len(images), batch_size, seed, drop_last=drop_last)

    def __len__(self) -> int:
        return len(self.order)

    def at(self, step: int) -> torch.Tensor:
        """The batch of one step."""
        indices = self.order[step]
        return self.images.batch(indices, self.order.flips(step)) if self.flip else self.images.batch(indices)

    def steps(self, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
        """The batches of the steps from ``start`` up to, not including, ``stop`` (None: without end)."""
        wanted = itertools.count(start) if stop is None else iter(range(start, stop))
        return prefetch(self.at, wanted, self.num_workers)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.steps(0, len(self))


def prefetch(make: Callable[[int], T], steps: Iterator[int], num_workers: int, ahead: int = 2) -> Iterator[T]:
    """``map(make, steps)`` in order, with ``num_workers`` threads working ``ahead`` results in front of each.

    What ``make`` raises is raised here, at its place in the order. Leaving the loop early, or deleting the iterator,
    ends the threads.
    """
    if num_workers == 0:
        yield from map(make, steps)
        return
    with ThreadPoolExecutor(num_workers, thread_name_prefix="fastgan-data") as pool:
        waiting: deque[Future[T]] = deque(
            pool.submit(make, step) for step in itertools.islice(steps, num_workers + ahead)
        )
        try:
            while waiting:
                result = waiting.popleft().result()
                for step in itertools.islice(steps, 1):
                    waiting.append(pool.submit(make, step))
                yield result
        finally:
            for future in waiting:
                future.cancel()
