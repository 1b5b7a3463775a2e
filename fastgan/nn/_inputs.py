"""Checks that the public functions share: the argument is named, with what came and what was expected."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Pair = int | tuple[int, int] | list[int]


def check_tensors(*optional: str, **arguments: Any) -> None:
    """TypeError unless each argument is a Tensor, or None where its name is among ``optional``."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor) and not (value is None and name in optional):
            wanted = "a Tensor or None" if name in optional else "a Tensor"
            raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")


def number(value: Any, name: str) -> float:
    if isinstance(value, (str, bytes)) or value is None:
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def pair(value: Pair, name: str) -> tuple[int, int]:
    """Integers are what has ``__index__`` (numpy's, tensors of one), as in torch."""
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value  # what a module has: of a small layer such checks are a part of the time
    if isinstance(value, (int, torch.SymInt)):
        return value, value  # type: ignore[return-value]
    values = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else (value,)
    try:
        values = [v if isinstance(v, (int, torch.SymInt)) else operator.index(v) for v in values]
    except TypeError:
        raise TypeError(f"{name} must be one integer or two, got {value!r}") from None
    if len(values) not in (1, 2):
        raise RuntimeError(f"{name} must be one integer or two, got {tuple(values)}")
    return values[0], values[-1]
