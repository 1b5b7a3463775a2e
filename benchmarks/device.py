"""Everything that a GPU is needed to tell, in one run: ``python -m benchmarks.device [--json FILE]``.

Builds the CUDA kernels, runs the tests of tests/cuda_emulation on the device, then times each kernel beside what
PyTorch does for the same result (eager, and compiled), forward and backward, and prints a Markdown table: medians of
CUDA events after a warm-up, the cache flushed before every call, and the share of the memory bandwidth that a copy
reaches in the same run, counted on the bytes that have to be moved. Attention has a table of its own: beside every
backend of PyTorch's that takes the case, and FlexAttention compiled, in TFLOP/s of the products that have to be done; a
DCGAN's training step another, beside PyTorch's eager, compiled and recorded as a CUDA graph.
Ends with an error if a result differs.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as T

import fastgan
from benchmarks import gan_steps
from fastgan import _cuda
from fastgan.nn import functional as F

REPOSITORY = Path(__file__).resolve().parent.parent
FLUSH_BYTES = 512 * 2**20  # larger than any second-level cache
# batch, channels, height: a DCGAN's layers at 64x64 pixels, and one that does not fit the cache
NORM_SHAPES = [(64, 64, 32), (128, 128, 16), (128, 256, 8), (128, 512, 4), (64, 256, 64)]
LOSS_SHAPES = [(64, 512, 4), (128, 512, 4), (1024, 512, 4), (16, 512, 31)]
# name, batch, heads, length, width, dtype, options; `forward`: that alone
ATTENTION: list[tuple[str, int, int, int, int, torch.dtype, dict[str, Any]]] = [
    ("forward", 8, 16, 2048, 64, torch.bfloat16, {"forward": True}),
    ("forward", 4, 8, 8192, 64, torch.bfloat16, {"forward": True}),
    ("forward", 8, 16, 2048, 128, torch.bfloat16, {"forward": True}),
    ("forward", 4, 8, 8192, 128, torch.bfloat16, {"forward": True}),
    ("forward, causal", 4, 8, 8192, 128, torch.bfloat16, {"forward": True, "causal": True}),
    ("causal", 8, 16, 2048, 128, torch.bfloat16, {"causal": True}),
    ("forward", 4, 8, 2048, 256, torch.bfloat16, {"forward": True}),
    ("BERT: padding, dropout", 32, 12, 512, 64, torch.bfloat16, {"padding": True, "dropout": 0.1}),
    ("padding", 32, 12, 512, 64, torch.bfloat16, {"padding": True}),
    ("T5: learned bias", 8, 12, 512, 64, torch.bfloat16, {"bias": True}),
    ("float32", 8, 12, 1024, 64, torch.float32, {}),
    ("float32, causal", 8, 12, 1024, 128, torch.float32, {"causal": True}),
]


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


def attention_calls(batch, heads, length, width, dtype, options) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Ours, PyTorch's choice, each of its backends, and FlexAttention where it can do the same."""

    def make(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", dtype=dtype).requires_grad_(not options.get("forward"))

    tensors = [make(batch, length, heads, width) for _ in range(3)]  # as projections leave them
    grad = torch.randn(batch, heads, length, width, device="cuda", dtype=dtype)
    mask = None
    if options.get("padding"):
        lengths = torch.linspace(length / 4, length, batch, device="cuda").long()
        mask = (torch.arange(length, device="cuda") < lengths[:, None]).view(batch, 1, 1, length)
    if options.get("bias"):
        mask = make(1, heads, length, length)
        tensors.append(mask)
    dropout, causal = options.get("dropout", 0.0), options.get("causal", False)

    def calling(attention: Callable[..., torch.Tensor]) -> Callable[[], Any]:
        def run(query, key, value, *rest):
            inside = [t.transpose(1, 2) for t in (query, key, value)]
            return attention(*inside, rest[0] if rest else mask, dropout, causal)

        if options.get("forward"):
            return lambda: (run(*tensors),)
        return forward_and_backward(run, tensors, grad)

    yield "fastgan", calling(F.scaled_dot_product_attention)
    yield "PyTorch", calling(T.scaled_dot_product_attention)
    for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):

        def forced(*args: Any, backend: str = backend) -> torch.Tensor:
            with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
                return T.scaled_dot_product_attention(*args)

        yield backend.removesuffix("_ATTENTION").lower(), calling(forced)
    if not dropout and dtype != torch.float32:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.compile(flex_attention)
        block_mask = None
        if causal:
            block_mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length)
        elif options.get("padding"):
            block_mask = create_block_mask(lambda b, h, q, k: k < lengths[b], batch, None, length, length)

        def flex(query, key, value, bias, *_):
            add = (lambda score, b, h, q, k: score + bias[0, h, q, k]) if options.get("bias") else None
            return compiled(query, key, value, score_mod=add, block_mask=block_mask)

        yield "flex", calling(flex)


def attention_table(flush: torch.Tensor, rounds: int) -> tuple[list[dict[str, Any]], bool]:
    """Prints the table of attention; its rows, and whether a result was wrong."""
    names = ["fastgan", "PyTorch", "flash", "efficient", "cudnn", "math", "flex"]
    print(f"\n| attention, milliseconds | {' | '.join(names)} | best / fastgan | TFLOP/s | difference |")
    print("|---|" + "---|" * (len(names) + 3))
    rows, failed = [], False
    for name, batch, heads, length, width, dtype, options in ATTENTION:
        times: dict[str, float] = {}
        results: dict[str, Any] = {}
        for which, call in attention_calls(batch, heads, length, width, dtype, options):
            try:
                results[which] = call() if which in ("fastgan", "PyTorch") else None
                times[which] = milliseconds(call, flush, rounds)
            except (RuntimeError, torch.cuda.OutOfMemoryError):  # this backend does not take the case
                if which == "fastgan":
                    raise
        # The two draw other dropout masks; tests/cuda_emulation judges those.
        off = 0.0 if options.get("dropout") else difference(results["fastgan"], results["PyTorch"])
        wrong = off > (2e-2 if dtype == torch.bfloat16 else 1e-3)
        failed = failed or wrong
        products = (2 if options.get("forward") else 7) * 2 * batch * heads * length**2 * width
        rate = products * (0.5 if options.get("causal") else 1.0) / times["fastgan"] / 1e9
        best = min(time for which, time in times.items() if which != "fastgan")
        where = f"{name}, {batch}x{heads}x{length}x{width}"
        shown = " | ".join(f"{times[n]:.3f}" if n in times else "" for n in names)
        print(
            f"| {where} | {shown} | {best / times['fastgan']:.2f}x | {rate:.0f} "
            f"| {off:.1e}{' WRONG' if wrong else ''} |",
            flush=True,
        )
        rows.append({"case": where, **times, "tflops": rate, "difference": off})
    return rows, failed


def steps_table(flush: torch.Tensor, rounds: int) -> list[dict[str, Any]]:
    """Prints the table of DCGAN steps at 64x64 pixels, width 64; its rows."""
    print(f"\n| DCGAN step, milliseconds | {' | '.join(gan_steps.DEVICE_STEPS)} | eager / fastgan | graph / fastgan |")
    print("|---|" + "---|" * (len(gan_steps.DEVICE_STEPS) + 2))
    rows = []
    for batch in (16, 64, 128):
        gan, real = gan_steps.networks(batch=batch)
        times = {}
        for name, build in gan_steps.DEVICE_STEPS.items():
            step = build(copy.deepcopy(gan).cuda(), real.cuda())
            times[name] = milliseconds(step, flush, rounds)
        ratios = [times[name] / times["fastgan"] for name in ("eager", "CUDA graph")]
        shown = " | ".join(f"{time:.3f}" for time in times.values())
        print(f"| batch {batch} | {shown} | {ratios[0]:.2f}x | {ratios[1]:.2f}x |", flush=True)
        rows.append({"case": f"batch {batch}", **times})
    return rows


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
    attention, wrong = attention_table(flush, max(10, options.rounds // 4))
    failed = failed or wrong
    steps = steps_table(flush, max(10, options.rounds // 4))
    if options.json:
        about = {"device": properties.name, "torch": torch.__version__, "cuda": torch.version.cuda, "copy": bandwidth}
        options.json.write_text(json.dumps({**about, "rows": rows, "attention": attention, "steps": steps}, indent=1))
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
