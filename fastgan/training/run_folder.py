"""A run's folder: what it holds, who may write to it, and how each file is written.

::

    config.json        what was asked for, and the hash of the data
    metrics.jsonl      a line a step; cut back to the checkpoint's step when a run is resumed
    last/              the last whole checkpoint (a link into checkpoints/)
    samples/           pictures from the same noise as training goes on
    curves.png         losses over the steps
    tensorboard/       the same figures as TensorBoard events, where it is installed
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastgan.training.checkpoint import RunError, canonical, replace_file, sha256

C = TypeVar("C")

FORMAT = "fastgan-run"
VERSION = 1
#: what a run writes
NAMES = ("config.json", "metrics.jsonl", "last", "checkpoints", "samples", "curves.png", "tensorboard")
_FIGURES = ("loss_d", "loss_g", "d_real", "d_fake")


class RunFolder:
    """A run's folder, held by one process at a time (the lock dies with the process)."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: int | None = None
        self._metrics: Any = None
        self._rows: list[dict[str, Any]] = []
        self._curves_drawn = 0.0
        self._events: Any = None
        self._events_row = 0
        self._without_events = False

    # ---- the lock ----

    def lock(self) -> None:
        """RunError if another process holds the folder. Nothing in it is changed."""
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                os.close(self._lock)
                self._lock = None
                raise RunError(f"{self.path}: another process is training in this folder") from error
            warnings.warn(
                f"{self.path}: this file system has no locks ({error.strerror}), so that two processes training in "
                "this folder at once would not be noticed",
                stacklevel=3,
            )

    def close(self) -> None:
        """Closes files and gives the lock back. On a full disk closing fails like the writing before it, which told."""
        try:
            for file in (self._metrics, self._events):
                if file is not None:
                    with contextlib.suppress(Exception):
                        file.close()
        finally:
            self._metrics = self._events = None
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def refuse_used(self) -> None:
        """RunError unless a new run may begin here: nothing that is there would be overwritten."""
        if self.exists():
            raise RunError(f"{self.path}: holds a run already; resume it, or name another folder")
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise RunError(f"{self.path}: is not a folder")
        for name in NAMES:
            if os.path.lexists(self.path / name):
                raise RunError(
                    f"{self.path / name}: is there already, and a run would write to it; name another folder"
                )

    # ---- config.json ----

    def exists(self) -> bool:
        return (self.path / "config.json").exists()

    def write_config(self, config: dict[str, Any]) -> None:
        document = {"format": FORMAT, "version": VERSION, **config}
        replace_file(self.path / "config.json", (json.dumps(document, indent=2) + "\n").encode())

    def read_config(self) -> dict[str, Any]:
        path = self.path / "config.json"
        if not os.path.isdir(self.path):
            what = "is a file, not the folder of a run" if os.path.lexists(self.path) else "there is no such folder"
            raise RunError(f"{self.path}: {what}")
        try:
            document = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise RunError(f"{self.path}: holds no run of fastgan (no config.json)") from error
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{path}: cannot be read ({error})") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise RunError(f"{path}: not the configuration of a fastgan run")
        if document.get("version") != VERSION:
            raise RunError(f"{path}: run version {document.get('version')!r}; this fastgan reads {VERSION}")
        return document

    # ---- metrics.jsonl ----

    def start_metrics(self, step: int) -> None:
        """Opens metrics.jsonl, cut back to ``step``: what was written after the checkpoint is made again."""
        path = self.path / "metrics.jsonl"
        kept = b""
        self._rows = []
        if path.exists():
            before = path.read_bytes()
            for line in before.splitlines(keepends=True):
                row = _row(line)
                if row is not None and row["step"] <= step:
                    kept += line
                    self._rows.append(row)
            if kept != before:
                replace_file(path, kept)
        self._metrics = open(path, "ab")  # noqa: SIM115  closed by close()
        self._events_row = len(self._rows)

    def log(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        try:
            self._metrics.write(json.dumps(row).encode() + b"\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path / "metrics.jsonl")) from error

    def flush(self) -> None:
        """Metrics to the disk; called before a checkpoint, which must not be ahead of them."""
        try:
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path / "metrics.jsonl")) from error

    @property
    def seconds(self) -> float:
        """Time trained, all sittings together."""
        return self._rows[-1]["seconds"] if self._rows else 0.0

    # ---- pictures ----

    def write_sample(self, step: int, png: bytes) -> Path:
        folder = self.path / "samples"
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{step:09d}.png"
        replace_file(path, png)
        return path

    def draw_curves(self, force: bool) -> None:
        """curves.png, at most every half minute unless forced: drawing takes a second."""
        if not self._rows or (not force and time.monotonic() - self._curves_drawn < 30):
            return
        from fastgan.training.pictures import curves_png

        replace_file(self.path / "curves.png", curves_png(self._rows, self.path.name))
        self._curves_drawn = time.monotonic()

    def write_events(self) -> None:
        """The rows since the last call as TensorBoard events, if TensorBoard is there."""
        rows, self._events_row = self._rows[self._events_row :], len(self._rows)
        if not rows:
            return
        if self._events is None:
            if self._without_events:
                return
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self._without_events = True
                return
            except Exception as error:  # one that does not fit the protobuf or numpy beside it
                self._no_events(error)
                return
        try:
            if self._events is None:
                self._events = SummaryWriter(str(self.path / "tensorboard"), purge_step=rows[0]["step"])
            for row in rows:
                for name in _FIGURES:
                    self._events.add_scalar(name, row[name], row["step"])
            self._events.flush()
        except Exception as error:
            self._no_events(error)

    def _no_events(self, error: Exception) -> None:
        """TensorBoard is an addition: the run goes on without it."""
        self._events, self._without_events = None, True
        reason = (str(error).splitlines() or [""])[0]
        warnings.warn(f"no TensorBoard events are written: {type(error).__name__}: {reason}", stacklevel=4)


def _row(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl, or None for a part of one."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return row if all(isinstance(row.get(name), (int, float)) for name in (*_FIGURES, "seconds")) else None


def config_digest(identity: dict[str, Any]) -> str:
    return sha256(canonical(identity))


def changed(before: C, changes: dict[str, Any] | None, changeable: Sequence[str], folder: Path) -> C:
    """The configuration with ``changes``; RunError for one that a resumed run may not have."""
    config: Any = before
    fields = {field.name for field in dataclasses.fields(config)}
    for name, value in (changes or {}).items():
        if name not in fields:
            raise TypeError(f"changes: there is no {name!r} in a run's configuration")
        if name in changeable:
            config = dataclasses.replace(config, **{name: value})
        elif getattr(before, name) != value:
            raise RunError(
                f"{folder}: this run has {name} = {getattr(before, name)!r}, not {value!r}; a resumed run may change "
                f"only {', '.join(changeable)}"
            )
    return config
