"""How a module of torch's becomes one of ours: in place, so that parameters, hooks and whoever holds it stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def convert(module: nn.Module, kind: type[nn.Module], to: type[nn.Module]) -> Any:
    """Gives ``module``, exactly a ``kind`` of torch's or a ``to`` already, the class ``to``, and returns it."""
    if type(module) not in (kind, to):
        raise TypeError(f"module must be a torch.nn.{kind.__name__}, got {type(module).__name__}")
    module.__class__ = to
    return module


def empty(class_for: Callable[[Any], type], original: type) -> Any:
    """An object for pickle to fill, of a class that ``class_for`` makes of ``original`` and that no module holds."""
    kind: Any = class_for(original)
    return kind.__new__(kind)
