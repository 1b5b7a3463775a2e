"""Peak memory of attention above its inputs and results, differentiated twice, in a process of its own.

python -m benchmarks.attention_memory                 prints the curve (1 batch, 8 heads, width 64, by length)
python -m benchmarks.attention_memory picture.png     draws it, too
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

PEERS = ("fastgan", "composed")
LENGTHS = {"fastgan": (512, 1024, 2048, 4096, 8192), "composed": (512, 1024, 2048)}


def composed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query keyᵀ / sqrt(E)) value with the weights stored: what PyTorch can differentiate twice."""
    return ((query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5).softmax(-1) @ value


def attention(peer: str) -> Callable[..., Tensor]:
    if peer == "composed":
        return composed
    from fastgan.nn import functional

    return functional.scaled_dot_product_attention


def measure(peer: str, batch: int, heads: int, length: int, width: int) -> float:
    """Megabytes (2²⁰ bytes) at the peak of a run, less what was there before it and what it returns."""
    sizes = map(str, (batch, heads, length, width))
    command = [sys.executable, "-m", "benchmarks.attention_memory", "--child", peer, *sizes]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024


def _status(name: str) -> int:  # kilobytes
    with open("/proc/self/status") as lines:
        return int(next(line for line in lines if line.startswith(name)).split()[1])


def _child(peer: str, batch: int, heads: int, length: int, width: int) -> int:
    function = attention(peer)

    def run(length: int) -> int:
        inputs = [torch.randn(batch, heads, length, width, requires_grad=True) for _ in range(3)]
        grad = torch.randn(batch, heads, length, width)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts here
        before = _status("VmRSS")
        output = function(*inputs)
        first = torch.autograd.grad(output, inputs, grad, create_graph=True)
        second = torch.autograd.grad(first, inputs, [x.detach() for x in inputs])
        results = [output, *first, *second]
        return _status("VmHWM") - before - sum(r.numel() * 4 for r in results) // 1024

    run(64)  # threads, allocator, lazily loaded code
    return run(length)


def curve() -> dict[str, list[tuple[int, float]]]:
    """Peer → (length, megabytes) by length, at 1 batch, 8 heads, width 64."""
    return {peer: [(n, measure(peer, 1, 8, n, 64)) for n in LENGTHS[peer]] for peer in PEERS}


def draw(points: dict[str, list[tuple[int, float]]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    labels = {"fastgan": "fastgan", "composed": "composed in PyTorch"}
    for peer, marker in zip(PEERS, "os", strict=True):
        axes.loglog(*zip(*points[peer], strict=True), marker=marker, label=labels[peer], base=2)
    axes.set(xlabel="sequence length", ylabel="MB above inputs and results")
    axes.set_title("Forward, backward and double backward, 8 heads of 64, float32", fontsize=10)
    axes.set_xticks(LENGTHS["fastgan"], [f"{n:,}" for n in LENGTHS["fastgan"]])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--child"]:
        print(_child(arguments[1], *map(int, arguments[2:])))
        return
    points = curve()
    for peer, values in points.items():
        for length, megabytes in values:
            print(f"{peer:<9} {length:>6} {megabytes:>9.1f} MB")
    if arguments:
        draw(points, arguments[0])


if __name__ == "__main__":
    main(sys.argv[1:])
