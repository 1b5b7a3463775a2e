"""The folder of a language model's run: ``run.json``, which says what was asked for, and who may write there."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastgan.training.checkpoint import RunError, replace_file
from fastgan.training.run_folder import RunFolder

PRECISIONS = ("float32", "bfloat16", "float16")


def first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_used(folder: Path) -> None:
    """RunError unless a new run may begin here."""
    if not first_process():
        return
    if (folder / "run.json").exists():
        raise RunError(f"{folder}: holds a run already; resume it, or name another folder")
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise RunError(f"{folder}: is there already, and a run would write to it; name another folder")


def read_document(folder: Path, form: str, version: int, what: str) -> dict[str, Any]:
    """``run.json``; RunError where it is not there, damaged or another kind of run's."""
    path = folder / "run.json"
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no such folder")
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise RunError(f"{folder}: holds no {what} of fastgan (no run.json)") from error
    except ValueError as error:
        raise RunError(f"{path}: damaged, not JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != form or document.get("version") != version:
        raise RunError(f"{path}: not a {what} that this fastgan reads")
    return document


@contextlib.contextmanager
def held(folder: Path, document: dict[str, Any]) -> Iterator[None]:
    """Makes and locks the folder, and writes ``run.json``."""
    lock = RunFolder(folder)
    if first_process():
        folder.mkdir(parents=True, exist_ok=True)
        lock.lock()
    try:
        if first_process():
            replace_file(folder / "run.json", (json.dumps(document, indent=1) + "\n").encode())
        yield
    finally:
        lock.close()


def check_integers(config: Any, least: dict[str, int]) -> None:
    """TypeError or ValueError, by name, for a field that is no integer or less than it may be."""
    for name, smallest in least.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value}")


def check_settings(config: Any) -> None:
    """What every configuration has: precision, lr, weight_decay, dropout, seed."""
    if config.precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {config.precision!r}")
    if not (config.lr > 0 and math.isfinite(config.lr)):
        raise ValueError(f"lr must be positive and finite, got {config.lr}")
    if not (config.weight_decay >= 0 and math.isfinite(config.weight_decay)):
        raise ValueError(f"weight_decay must be at least 0, got {config.weight_decay}")
    if config.dropout is not None and not 0 <= config.dropout < 1:
        raise ValueError(f"dropout must be at least 0 and less than 1, got {config.dropout}")
    if config.seed >= 1 << 32:
        raise ValueError(f"seed must be less than 2^32, got {config.seed}")
    if config.precision == "float16" and not torch.cuda.is_available():
        raise ValueError("precision float16 needs a GPU; bfloat16 works without one")
