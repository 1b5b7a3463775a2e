"""Batches of whatever data came, in an order that is a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

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


def batches_of(
    data: ImageArray | Tensor | Dataset[Any] | Iterable[Any], batch_size: int, seed: int, epoch: int
) -> Iterator[Tensor]:
    """One epoch's batches of an ImageArray, Dataset or tensor of pictures, or of an iterable of batches as it comes."""
    single = isinstance(data, Dataset) and not isinstance(data, IterableDataset)  # its items are pictures
    if not single and not isinstance(data, (ImageArray, Tensor)):
        for batch in data:  # type: ignore[union-attr]
            yield _picture(batch)
        return
    if len(data) == 0:  # type: ignore[arg-type]
        raise ValueError("data must not be empty")
    order = BatchOrder(len(data), batch_size, seed)  # type: ignore[arg-type]
    for step in range(epoch * len(order), (epoch + 1) * len(order)):
        indices = order[step]
        if isinstance(data, ImageArray):
            yield data.batch(indices)
        elif isinstance(data, Tensor):
            yield data[torch.from_numpy(indices.copy())]
        else:
            yield torch.stack([_picture(data[int(i)]) for i in indices])  # type: ignore[index]


def _picture(item: Any) -> Any:
    """Without the label."""
    return item[0] if isinstance(item, (tuple, list)) else item
