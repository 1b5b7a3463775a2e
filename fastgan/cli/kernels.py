"""Each kernel beside PyTorch's own composition, in one run: the demo's fourth part.

The full benchmarks, with every peer in its best configuration, are under ``benchmarks/`` (``make bench``); this is the
same comparison in twenty seconds on a handful of shapes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as T

import fastgan
from fastgan.nn import functional as F


@dataclass(frozen=True)
class Case:
    """One row: the same forward and backward pass by fastgan and by PyTorch."""

    name: str
    ours: Callable[[], Any]
    torch: Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds; ``ratio`` is the median, round by round, of PyTorch's time over fastgan's."""

    name: str
    ours: float
    torch: float
    ratio: float


def _both_ways(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], Any]:
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    # A dense gradient, as training has it: the one of a sum is a single expanded number.
    grad = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def _attention(name: str, shape: tuple[int, ...], dropout: float = 0.0, causal: bool = False) -> Case:
    q, k, v = (torch.randn(shape) for _ in range(3))

    def call(attention: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda q, k, v: attention(q, k, v, dropout_p=dropout, is_causal=causal)

    return Case(
        name,
        _both_ways(call(F.scaled_dot_product_attention), q, k, v),
        _both_ways(call(T.scaled_dot_product_attention), q, k, v),
    )


def cases() -> list[Case]:
    """The rows of the table, forward and backward, float32."""
    image = torch.randn(64, 128, 16, 16).contiguous(memory_format=torch.channels_last)
    scale, shift = torch.rand(128) + 0.5, torch.randn(128)
    filters = (torch.randn(256, 128, 4, 4) * 0.02).contiguous(memory_format=torch.channels_last)
    features, kernel = torch.randn(64, 512, 4, 4), torch.randn(1, 512, 4, 4) * 0.02
    real = torch.ones(64, 1, 1, 1)
    tokens, vocabulary, target = torch.randn(512, 256), torch.randn(16384, 256) * 0.02, torch.randint(16384, (512,))
    return [
        _attention("attention, BERT 8×12×128×64", (8, 12, 128, 64)),
        _attention("attention, BERT, dropout 0.1", (8, 12, 128, 64), dropout=0.1),
        _attention("attention, GPT 1×12×1024×64 causal", (1, 12, 1024, 64), causal=True),
        Case(
            "convolution 4×4 stride 2 64×128×16×16→256",
            _both_ways(lambda x, w: F.conv2d(x, w, stride=2, padding=1), image, filters),
            _both_ways(lambda x, w: T.conv2d(x, w, stride=2, padding=1), image, filters),
        ),
        Case(
            "batch norm + leaky ReLU 64×128×16×16",
            _both_ways(
                lambda x, w, b: F.batch_norm_act(x, None, None, w, b, True, 0.1, 1e-5, "leaky_relu", 0.2),
                image, scale, shift,
            ),
            _both_ways(
                lambda x, w, b: T.leaky_relu(T.batch_norm(x, None, None, w, b, True, 0.1, 1e-5), 0.2),
                image, scale, shift,
            ),
        ),
        Case(
            "last convolution + sigmoid + BCE 64×512×4×4",
            _both_ways(lambda x, w: F.conv_bce_with_logits(x, w, None, 1.0)[0], features, kernel),
            _both_ways(lambda x, w: T.binary_cross_entropy_with_logits(T.conv2d(x, w), real), features, kernel),
        ),
        Case(
            "LM head + cross-entropy 512×256→16384",
            _both_ways(lambda x, w: F.linear_cross_entropy(x, w, target), tokens, vocabulary),
            _both_ways(lambda x, w: T.cross_entropy(T.linear(x, w), target), tokens, vocabulary),
        ),
    ]  # fmt: skip


def compare(case: Case, *, rounds: int = 15, seconds: float = 4.0) -> Timing:
    """Time both sides in turn, so that drift of the machine's speed meets both alike."""
    case.ours(), case.torch()  # allocator, caches, threads
    ours: list[float] = []
    theirs: list[float] = []
    end = time.perf_counter() + seconds
    while len(ours) < rounds and (len(ours) < 5 or time.perf_counter() < end):
        for call, times in ((case.ours, ours), (case.torch, theirs)):
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    return Timing(case.name, statistics.median(ours), statistics.median(theirs), ratio)


def table(timings: list[Timing]) -> str:
    """The timings as text, headed by the machine they were taken on."""
    info = fastgan.info()
    lines = [
        f"{info['cpu']}, {info['threads']} threads, {info['capability']}, torch {info['torch']}",
        "float32, forward + backward",
        f"{'':<44} {'fastgan':>10} {'PyTorch':>10}   PyTorch / fastgan",
    ]
    lines += [f"{t.name:<44} {t.ours:>7.2f} ms {t.torch:>7.2f} ms   {t.ratio:.2f}×" for t in timings]
    return "\n".join(lines)


def plot(timings: list[Timing], path: Path) -> None:
    """Bars of the ratio, PyTorch's time over fastgan's, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(timings) + 1.4), layout="constrained")
    names = [t.name for t in reversed(timings)]
    ratios = [t.ratio for t in reversed(timings)]
    bars = axes.barh(names, ratios, color=["#2a7f62" if r >= 1 else "#b5533c" for r in ratios])
    axes.bar_label(bars, [f"{r:.2f}×" for r in ratios], padding=4)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlim(0, max([1.2, *ratios]) * 1.15)
    axes.set_xlabel("PyTorch's time / fastgan's time (above 1: fastgan is faster)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
