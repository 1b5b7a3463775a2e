"""How a run goes, on a terminal as a bar, elsewhere in plain lines."""

from __future__ import annotations

import os
import sys
import time
from typing import Any


def reporter(unit: str = "images", figures: tuple[str, ...] = ("loss_d", "loss_g")) -> Any:
    """A bar where standard output is a terminal, else plain lines; ``figures`` are shown as far as a step has them."""
    terminal = sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    return Bar(unit, figures) if terminal else Lines(unit=unit, figures=figures)


class _Rate:
    """Steps and images (or what is counted) a second, over the last ten seconds or so, and the share of the time in
    which a step waited for its batch."""

    def __init__(self) -> None:
        self.steps = self.images = self.waiting = 0.0
        self._seconds = self._per_step = self._wait = 0.0
        self._last = time.monotonic()

    def add(self, images: int, wait: float = 0.0) -> None:
        now = time.monotonic()
        elapsed, self._last = max(now - self._last, 1e-6), now
        weight = min(1.0, elapsed / 10) if self.steps else 1.0
        # Averages of seconds, not of rates: a slow step counts by its length.
        self._seconds = elapsed if not self.steps else (1 - weight) * self._seconds + weight * elapsed
        self._per_step = images if not self.steps else (1 - weight) * self._per_step + weight * images
        self._wait = wait if not self.steps else (1 - weight) * self._wait + weight * wait
        self.steps = 1 / self._seconds
        self.images = self._per_step / self._seconds
        self.waiting = min(self._wait / self._seconds, 1.0)


class Lines:
    """A line every ten seconds and at the end.

    Raises BrokenPipeError where nobody reads them any more. Where they cannot be written otherwise (the terminal has
    gone, the log's disk is full), training goes on without them.
    """

    def __init__(
        self, seconds: float = 10.0, unit: str = "images", figures: tuple[str, ...] = ("loss_d", "loss_g")
    ) -> None:
        self._every, self._unit, self._figures = seconds, unit, figures

    def start(self, step: int, total: int, batch_size: int) -> None:
        self._rate, self._total, self._shown = _Rate(), total, time.monotonic()
        self.say(f"step {step} of {total}")

    def update(self, step: int, metrics: dict[str, float], images: int) -> None:
        self._rate.add(images, metrics.get("wait", 0.0))
        now = time.monotonic()
        if now - self._shown < self._every and step != self._total:
            return
        self._shown = now
        left = (self._total - step) / self._rate.steps
        figures = "".join(f", {name} {metrics[name]:.4f}" for name in self._figures if name in metrics)
        if "wait" in metrics:
            figures += f", {self._rate.waiting:.1%} waiting for data"
        self.say(
            f"step {step} of {self._total}, {self._rate.steps:.2f} steps/s, {self._rate.images:.0f} {self._unit}/s, "
            f"{_duration(left)} left{figures}"
        )

    def say(self, message: str) -> None:
        try:
            print(message, flush=True)
        except BrokenPipeError:
            raise
        except (OSError, ValueError):  # ValueError: a closed stream
            pass

    def close(self) -> None:
        pass


class Bar:
    """One line that is drawn anew."""

    def __init__(self, unit: str = "images", figures: tuple[str, ...] = ("loss_d", "loss_g")) -> None:
        self._unit, self._figures = unit, figures

    def start(self, step: int, total: int, batch_size: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._rate = _Rate()
        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("", total=total, completed=step, figures="")
        self._progress.start()

    def update(self, step: int, metrics: dict[str, float], images: int) -> None:
        self._rate.add(images, metrics.get("wait", 0.0))
        figures = f"{self._rate.steps:.2f} steps/s  {self._rate.images:.0f} {self._unit}/s"
        figures += "".join(f"  {name} {metrics[name]:.3f}" for name in self._figures if name in metrics)
        if "wait" in metrics:
            figures += f"  data {self._rate.waiting:.1%}"
        self._progress.update(self._task, completed=step, figures=figures)

    def say(self, message: str) -> None:
        progress = getattr(self, "_progress", None)
        if progress is not None:
            progress.console.print(message, highlight=False, markup=False)  # above the bar
        else:
            print(message, flush=True)

    def close(self) -> None:
        progress = getattr(self, "_progress", None)
        if progress is not None:
            progress.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
