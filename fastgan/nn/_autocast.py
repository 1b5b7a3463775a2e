"""Autocast by the type of a device, "meta" included: torch's own questions raise for a device that has none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def is_on(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def off(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
