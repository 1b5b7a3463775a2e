"""Grids of pictures and curves of losses, as PNG files."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor


def grid_png(pictures: Tensor, columns: int | None = None, padding: int = 2) -> bytes:
    """Pictures (N, C, H, W) in [-1, 1] as one PNG, gray for one channel, else the first three as red, green, blue.

    Args:
        pictures: N at least 1. Two channels get a third of zeros.
        columns: None makes the grid as square as it goes.
        padding: black pixels around each picture.
    """
    from PIL import Image

    count, channels, height, width = pictures.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    values = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    shown = 1 if channels == 1 else 3
    grid = np.zeros((rows * (height + padding) + padding, columns * (width + padding) + padding, shown), np.uint8)
    for index in range(count):
        top = padding + index // columns * (height + padding)
        left = padding + index % columns * (width + padding)
        layers = min(channels, shown)
        grid[top : top + height, left : left + width, :layers] = values[index, :layers].transpose(1, 2, 0)
    image = Image.fromarray(grid[:, :, 0] if shown == 1 else grid)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def curves_png(metrics: list[dict[str, Any]], title: str = "") -> bytes:
    """Losses, and the probabilities the discriminator gave, over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps = np.array([row["step"] for row in metrics])
    for axes, names in ((upper, ("loss_d", "loss_g")), (lower, ("d_real", "d_fake"))):
        for name, color in zip(names, ("tab:blue", "tab:orange"), strict=True):
            values = np.array([row[name] for row in metrics], dtype=float)
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.7)
            axes.plot(*_smooth(steps, values), color=color, label=name)
        axes.legend(loc="upper right")
        axes.grid(alpha=0.3)
    upper.set_ylabel("loss")
    lower.set_ylabel("probability of real")
    lower.set_ylim(0, 1)
    lower.set_xlabel("step")
    if title:
        # A folder's name can be any bytes, and a $ in it begins no formula.
        upper.set_title("".join(letter if letter.isprintable() else "?" for letter in title), parse_math=False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _smooth(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running means over a fiftieth of the steps."""
    window = max(1, len(values) // 50)
    if len(values) < 2 * window:
        return steps, values
    return steps[window - 1 :], np.convolve(values, np.ones(window) / window, mode="valid")
