"""What a user may have put on a module, or on all, that sees or changes calls."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as _all


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Its forward, forward-pre, backward and backward-pre hooks."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def has_hooks(module: nn.Module) -> bool:
    return any(hooks_of(module))


def has_hooks_on_all() -> bool:
    """Whether hooks are registered that see the calls of every module."""
    return bool(
        _all._global_forward_hooks
        or _all._global_forward_pre_hooks
        or _all._global_backward_hooks
        or _all._global_backward_pre_hooks
    )
