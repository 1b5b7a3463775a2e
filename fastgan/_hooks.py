"""What a user may have put on a module that sees or changes its calls."""

from __future__ import annotations

from typing import Any

from torch import nn


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Its forward, forward-pre, backward and backward-pre hooks."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def has_hooks(module: nn.Module) -> bool:
    return any(hooks_of(module))
