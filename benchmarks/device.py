"""Everything that a GPU is needed to tell, in one run: ``python -m benchmarks.device [--json FILE]``.

Builds the CUDA kernels, runs the tests of tests/cuda_emulation on the device, then times each kernel beside what
PyTorch does for the same result (eager, and compiled), forward and backward, and prints a Markdown table: medians of
CUDA events after a warm-up, the cache flushed before every call, and the share of the memory bandwidth that a copy
reaches in the same run, counted on the bytes that have to be moved. Ends with an error if a result differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as T

import fastgan
from fastgan import _cuda
from fastgan.nn import functional as F

REPOSITORY = Path(__file__).resolve().parent.parent
FLUSH_BYTES = 512 * 2**20  # larger than any second-level cache
# batch, channels, height: a DCGAN's layers at 64x64 pixels, and one that does not fit the cache
NORM_SHAPES = [(64, 64, 32), (128, 128, 16), (128, 256, 8), (128, 512, 4), (64, 256, 64)]
LOSS_SHAPES = [(64, 512, 4), (128, 512, 4), (1024, 512, 4), (16, 512, 31)]


def milliseconds(call: Callable[[], Any], flush: torch.Tensor, rounds: int) -> float:
    """Median time of a call on the device, with a cold cache."""
    for _ in range(5):
        call()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for begin, end in pairs:
        flush.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in pairs)


def forward_and_backward(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor], grad: torch.Tensor):
    def call() -> tuple[torch.Tensor, ...]:
        output = function(*tensors)
        return output.detach(), *torch.autograd.grad(output, tensors, grad)

    return call


def cases(dtype: torch.dtype, layout: torch.memory_format):
    """(name, ours, PyTorch's, tensors, gradient of the output, bytes that must be moved forward and backward)."""

    def norm(fused: bool):
        def run(x, w, b):
            if fused:
                return F.batch_norm_act(x, None, None, w, b, True, 0.1, 1e-5, "leaky_relu", 0.2)
            return T.leaky_relu(T.batch_norm(x, None, None, w, b, True, 0.1, 1e-5), 0.2)

        return run

    def loss(fused: bool):
        def run(x, w):
            if fused:
                return F.conv_bce_with_logits(x, w, None, 1.0)[0]
            logits = T.conv2d(x, w)
            return T.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))

        return run

    for n, c, s in NORM_SHAPES:
        x = torch.randn(n, c, s, s, device="cuda", dtype=dtype).to(memory_format=layout)
        parameters = [torch.randn(c, device="cuda", requires_grad=True) for _ in range(2)]
        # Read x, write y; read x and dy, write dx. A second reading of x for its statistics is the kernel's affair.
        yield (
            f"batch norm + leaky ReLU {n}x{c}x{s}x{s}", norm(True), norm(False), [x.requires_grad_(), *parameters],
            torch.randn_like(x), 5 * x.numel() * x.element_size(),
        )  # fmt: skip
    for n, c, s in LOSS_SHAPES:
        x = torch.randn(n, c, s, s, device="cuda", dtype=dtype).to(memory_format=layout)
        w = (torch.randn(1, c, 4, 4, device="cuda") / (16 * c) ** 0.5).to(dtype)
        tensors = [x.requires_grad_(), w.requires_grad_()]
        yield (
            f"last convolution + BCE {n}x{c}x{s}x{s}", loss(True), loss(False), tensors,
            torch.ones((), device="cuda", dtype=dtype), 3 * x.numel() * x.element_size(),
        )  # fmt: skip


def difference(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> float:
    """The largest relative difference of a result, as norms."""
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
    return max(((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--skip-tests", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return 2
    begin = time.perf_counter()
    if not _cuda.has_kernel("norm_act"):
        print(_cuda.status())
        return 1
    print(f"kernels ready after {time.perf_counter() - begin:.0f} s", flush=True)
    failed = 0
    if not options.skip_tests:
        command = [sys.executable, "-m", "pytest", "-q", "-k", "device", "tests/cuda_emulation"]
        failed = subprocess.run(command, cwd=REPOSITORY).returncode

    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    source, target = torch.empty(2, FLUSH_BYTES // 4, device="cuda").unbind()
    bandwidth = 2 * source.numel() * 4 / milliseconds(lambda: target.copy_(source), flush, 20) / 1e6  # GB/s
    properties = torch.cuda.get_device_properties(0)
    print(
        f"\n{properties.name}, torch {torch.__version__}, CUDA {torch.version.cuda}, fastgan {fastgan.__version__}; "
        f"a copy moves {bandwidth:.0f} GB/s; forward and backward, milliseconds\n"
    )
    print("| | fastgan | PyTorch | compiled | PyTorch / fastgan | share of bandwidth | difference |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            for name, ours, theirs, tensors, grad, moved in cases(dtype, layout):
                calls = [forward_and_backward(f, tensors, grad) for f in (ours, theirs, torch.compile(theirs))]
                off = difference(calls[0](), calls[1]())
                times = [milliseconds(call, flush, options.rounds) for call in calls]
                share = moved / times[0] / 1e6 / bandwidth
                where = f"{name}, {str(dtype).removeprefix('torch.')}, {str(layout).removeprefix('torch.')}"
                wrong = off > (2e-2 if dtype == torch.bfloat16 else 5e-3)  # torch's convolutions may use TF32
                failed = failed or wrong
                print(
                    f"| {where} | {times[0]:.3f} | {times[1]:.3f} | {times[2]:.3f} | {times[1] / times[0]:.2f}x "
                    f"| {share:.0%} | {off:.1e}{' WRONG' if wrong else ''} |",
                    flush=True,
                )
                rows.append({"case": where, "fastgan": times[0], "pytorch": times[1], "compiled": times[2],
                             "share": share, "difference": off})  # fmt: skip
    if options.json:
        about = {"device": properties.name, "torch": torch.__version__, "cuda": torch.version.cuda, "copy": bandwidth}
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1))
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
