"""Batches of whatever data came, in an order that is a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastgan.data import BatchOrder, ImageArray


def check_positive(**values: int | None) -> None:
    """Raises TypeError or ValueError, naming the argument, for anything but None or a positive integer."""
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def batches_of(data: ImageArray | Tensor | Iterable[Any], batch_size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """One epoch's batches of an ImageArray, of pictures in one tensor, or of an iterable of batches as it comes."""
    if not isinstance(data, (ImageArray, Tensor)):
        for batch in data:
            yield batch[0] if isinstance(batch, (tuple, list)) else batch
        return
    if len(data) == 0:
        raise ValueError("data must not be empty")
    order = BatchOrder(len(data), batch_size, seed)
    for step in range(epoch * len(order), (epoch + 1) * len(order)):
        indices = order[step]
        yield data[torch.from_numpy(indices.copy())] if isinstance(data, Tensor) else data.batch(indices)
