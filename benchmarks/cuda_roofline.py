"""What limits each CUDA kernel, from its compiled code: ``python -m benchmarks.cuda_roofline [--out FILE]``. No GPU.

Registers and static shared memory are nvcc's report for sm_90a. Grids, threads and dynamic shared memory are what the
host's code asks for, on the shapes of ``benchmarks.device``: the operators run on the emulator, which writes launches
down instead of making them. From both follow the blocks that a multiprocessor holds, the rounds that a grid takes on
132 of them, and the balance: the average multiprocessor's blocks by the busiest one's. Bytes are those that each kernel
must move between memory and chip when all that its blocks read again comes from the second-level cache (what a second
launch reads again counts again, though of a tensor below 50 MB the cache may still have it); operations are those that
it does, recomputed ones included. The larger of bytes / 3.35 TB/s and operations / peak is the least time
that a launch can take on an H100 (989 TFLOP/s of bfloat16 products, 165 of float32 by three of TF32, 67 by themselves,
34 of float64); without balance it is longer by as much. ``best`` is how close the design can come: the time that the
operator's own inputs, outputs and operations need at least, over the sum of its launches. What wgmma reaches and
mma.sync does not, caches, barriers and launches are for a GPU to tell.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
ARCHITECTURE = "90a"

# An H100 SXM: a multiprocessor's resources (CUDA's programming guide, compute capability 9.0) and the chip's rates.
PROCESSORS, BLOCKS, THREADS, REGISTERS = 132, 32, 2048, 65536
SHARED, RESERVED = 228 * 1024, 1024  # bytes; of each block the driver keeps 1 KiB
BANDWIDTH = 3.35e12
TF32_PEAK = 495e12
PEAK = {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12, torch.float64: 34e12}


@dataclass(frozen=True)
class Launch:
    kernel: str  # mangled, without its namespace
    grid: int
    threads: int
    shared: int

    @property
    def name(self) -> str:
        return re.match(r"[a-z_]+?kernel", self.kernel)[0]  # type: ignore[index]


@dataclass(frozen=True)
class Compiled:
    registers: int
    shared: int  # static


@dataclass(frozen=True)
class Work:
    """Of a launch, or of an operator: bytes between memory and chip, and floating-point operations."""

    bytes: float
    operations: float = 0.0

    def seconds(self, peak: float) -> float:
        return max(self.bytes / BANDWIDTH, self.operations / peak)

    def limit(self, peak: float) -> str:
        return "memory" if self.bytes / BANDWIDTH >= self.operations / peak else "products"


def _up(number: int, to: int) -> int:
    return -(-number // to) * to


def blocks_per_processor(compiled: Compiled, launch: Launch) -> int:
    """How many blocks a multiprocessor holds: registers go to a warp by 256, shared memory to a block by 128 bytes."""
    warps = _up(launch.threads, 32) // 32
    registers = REGISTERS // (warps * _up(compiled.registers * 32, 256))
    shared = SHARED // (_up(compiled.shared + launch.shared, 128) + RESERVED)
    return min(BLOCKS, THREADS // (warps * 32), registers, shared)


def rounds(grid: int, blocks: int) -> int:
    """How often all multiprocessors are filled, the last time perhaps in part."""
    return -(-grid // (blocks * PROCESSORS))


def balance(grid: int) -> float:
    """The average multiprocessor's blocks by the busiest one's, which the others wait for."""
    return grid / PROCESSORS / -(-grid // PROCESSORS)


# ---- what is compiled ----


def kernel_of(symbol: str) -> str | None:
    """A kernel's mangled name without the unnamed namespace, which nvcc and g++ write differently."""
    found = re.match(r"_ZN7fastgan\d+_GLOBAL__N_(?:_[0-9a-f]+_\d+_\w+?_cu_[0-9a-f]{8}|1)L?(\d+)", symbol)
    if found is None or "kernel" not in symbol[found.end() :][: int(found[1])]:
        return None
    return symbol[found.end() :]


def parse_report(report: str) -> dict[str, Compiled]:
    """Of ptxas -v: kernel -> what it takes."""
    out: dict[str, Compiled] = {}
    kernel = None
    for line in report.splitlines():
        if (entry := re.search(r"Compiling entry function '(\S+)'", line)) is not None:
            kernel = kernel_of(entry[1])
        elif (used := re.search(r"Used (\d+) registers", line)) is not None and kernel is not None:
            shared = re.search(r"(\d+) bytes smem", line)
            out[kernel] = Compiled(int(used[1]), int(shared[1]) if shared else 0)
    return out


def compile_all(folder: Path) -> dict[str, dict[str, Compiled]]:
    """stem -> kernel -> what nvcc says of it."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise SystemExit("benchmarks.cuda_roofline needs the CUDA compiler (nvcc)")

    def compile_one(source: Path) -> tuple[str, dict[str, Compiled]]:
        done = subprocess.run(
            [
                nvcc, "-std=c++20", "-O3", f"-I{REPOSITORY / 'csrc'}", "-Xptxas=-v", "-c", source, "-o",
                folder / f"{source.stem}.o", f"-gencode=arch=compute_{ARCHITECTURE},code=sm_{ARCHITECTURE}",
            ],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return source.parent.name, parse_report(done.stderr)

    out: dict[str, dict[str, Compiled]] = {}
    with ThreadPoolExecutor() as pool:
        for stem, kernels in pool.map(compile_one, sorted((REPOSITORY / "csrc").glob("*/*.cu"))):
            out.setdefault(stem, {}).update(kernels)
    return out


# ---- what is launched ----


class _Record(ctypes.Structure):
    _fields_ = [("kernel", ctypes.c_void_p), ("grid", ctypes.c_int64), ("threads", ctypes.c_int64),
                ("shared", ctypes.c_int64)]  # fmt: skip


class Recorder:
    """The emulated operators, whose launches are written down and not made."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        names = {}  # by address: a kernel in several files has its name several times
        for line in subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout.splitlines():
            *address, _, symbol = line.split()
            if address:
                names[int(address[0], 16)] = symbol
        begin = ctypes.cast(self._library.fastgan_emulator_record, ctypes.c_void_p).value
        assert begin is not None
        base = begin - next(at for at, name in names.items() if name == "fastgan_emulator_record")
        self._names = {base + at: name for at, name in names.items()}
        self._library.fastgan_emulator_recorded.restype = ctypes.c_int64
        self._library.fastgan_emulator_recorded.argtypes = [ctypes.POINTER(_Record), ctypes.c_int64]

    def __call__(self, call: Callable[[], Any]) -> list[Launch]:
        """The launches of a call; what it returns is left undefined."""
        self._library.fastgan_emulator_record(1)
        try:
            call()
        finally:
            self._library.fastgan_emulator_record(0)
        records = (_Record * 64)()
        count = self._library.fastgan_emulator_recorded(records, len(records))
        assert count <= len(records)
        return [
            Launch(str(kernel_of(self._names[r.kernel])), r.grid, r.threads, r.shared) for r in list(records)[:count]
        ]


# ---- the operators on shapes, and what their kernels have to do ----


@dataclass(frozen=True)
class Case:
    stem: str
    name: str
    dtype: torch.dtype
    call: Callable[[], Any]
    needed: Work  # of the operator: its inputs and outputs once, no operation twice
    work: Callable[[Launch, int, int], Work]  # of a launch, the how manieth of how many of its kernel

    @property
    def peak(self) -> float:
        """Only attention's products are the tensor cores'; of float32 they are three each of TF32."""
        if self.stem != "attention":
            return PEAK[torch.float32]
        return TF32_PEAK / 3 if self.dtype == torch.float32 else PEAK[self.dtype]


def _attention(batch, heads, length, width, dtype, causal=False, second=False) -> Iterator[Case]:
    ops = torch.ops.fastgan_emulated
    q, k, v, grad = (torch.empty(batch, length, heads, width, dtype=dtype).transpose(1, 2) for _ in range(4))
    output, lse = torch.empty_like(q), torch.empty(batch, heads, length, dtype=torch.float64)
    tile = q.numel() * q.element_size()  # bytes of a tensor of the call
    accumulate = 8 if dtype == torch.float64 else 4
    numbers = batch * heads * length  # rows
    product = 2.0 * batch * heads * length * length * width * (0.5 if causal else 1.0)
    settings = (0.0, causal, width**-0.5)
    shape = f"{batch}x{heads}x{length}x{width}{', causal' if causal else ''}"

    def work(launch: Launch, *_: int) -> Work:
        both = re.search(r"Lb([01])ELb([01])E", launch.kernel)
        key, value = (int(each) for each in both.groups()) if both else (1, 1)
        kept = 3 * numbers * accumulate  # lse, its rest, delta
        return {
            "forward_kernel": Work(4 * tile + 8 * numbers, 2 * product),
            "rows_kernel": Work(2 * tile + 8 * numbers + kept),
            "delta_kernel": Work(4 * tile + kept, 2 * product),
            "queries_kernel": Work(5 * tile + kept, 3 * product),
            "keys_kernel": Work((3 + 2 * key + value) * tile + kept, (1 + 2 * key + value) * product),
            # with tangents of queries, keys and values
            "tangent_kernel": Work(9 * tile + 8 * numbers + kept, 5 * product),
            "second_queries_kernel": Work(8 * tile + 8 * numbers + kept, 7 * product),
            "second_keys_kernel": Work(
                (7 + key + value) * tile + 8 * numbers + kept, (3 + 4 * key + value) * product
            ),
        }[launch.name]  # fmt: skip

    if not second:
        yield Case("attention", f"forward {shape}", dtype, lambda: ops.attention(q, k, v, None, None, None, *settings),
                   Work(4 * tile + 8 * numbers, 2 * product), work)  # fmt: skip
        yield Case("attention", f"backward {shape}", dtype,
                   lambda: ops.attention_backward(grad, q, k, v, None, None, None, output, lse, *settings, False),
                   Work(8 * tile + 8 * numbers, 5 * product), work)  # fmt: skip
        return
    along = [torch.empty_like(t) for t in (q, k, v)]
    yield Case(
        "attention", f"double backward {shape}", dtype,
        lambda: ops.attention_double_backward(
            grad, q, k, v, None, None, None, output, lse, *along, None, *settings, False
        ),
        Work(12 * tile + 8 * numbers, 12 * product), work,
    )  # fmt: skip


def _norm(batch, channels, size, dtype) -> Iterator[Case]:
    ops = torch.ops.fastgan_emulated
    x = torch.empty(batch, channels, size, size, dtype=dtype).to(memory_format=torch.channels_last)
    parameters = [torch.empty(channels) for _ in range(2)]
    moments = [torch.empty(1, channels, dtype=torch.float64) for _ in range(2)]
    tile = x.numel() * x.element_size()
    shape = f"{batch}x{channels}x{size}x{size}, channels_last"
    settings = (1e-5, "leaky_relu", 0.2, 1)

    def of(tensors: int) -> Callable[[Launch, int, int], Work]:
        # One launch reads again from the cache; of three the first reads for the sums, the last reads again and writes,
        # and coefficients lie between.
        moved = {"sums_kernel": (tensors - 1) * tile, "prepare_kernel": 20 * channels}
        return lambda launch, *_: Work(moved.get(launch.name, tensors * tile))

    yield Case("norm_act", f"forward {shape}", dtype, lambda: ops.norm_act(x, *parameters, *settings),
               Work(2 * tile), of(2))  # fmt: skip
    yield Case("norm_act", f"backward {shape}", dtype,
               lambda: ops.norm_act_backward(x, x, *parameters, *moments, *settings, [True] * 3),
               Work(3 * tile), of(3))  # fmt: skip


def _loss(batch, channels, size, dtype) -> Iterator[Case]:
    ops = torch.ops.fastgan_emulated
    x = torch.empty(batch, channels, size, size, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.empty(1, channels, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
    out = size - 3
    count = batch * out * out
    tile, logits = x.numel() * x.element_size(), count * x.element_size()
    product = 2.0 * count * 16 * channels
    patches = 2.0 * batch * size * size * 16 * channels  # of all pixels with all taps, where logits are many
    pixels = 4 * 16 * batch * size * size  # the sums of one split of the channels
    settings = (None, None, 1.0, None, None, 0, (1, 1), (0, 0), 0.0, 1, False)

    def work(launch: Launch, *_: int) -> Work:
        return {
            "logits_kernel": Work(tile + logits, product),
            "covering_logits_kernel": Work(tile + logits, product),
            "covering_backward_kernel": Work(2 * tile + logits, 2 * product),
            "products_kernel": Work(tile + pixels, patches),
            "patch_logits_kernel": Work(pixels + logits),
            "gradients_kernel": Work(2 * tile + logits, 2 * patches),
            "weights_kernel": Work(4 * 16 * channels),
            "loss_kernel": Work(4 * count),
            "gradient_kernel": Work(2 * logits),
            "backward_kernel": Work(2 * tile + logits, 2 * product),
        }[launch.name]

    shape = f"{batch}x{channels}x{size}x{size}"
    given = torch.empty(batch, 1, out, out, dtype=dtype)
    yield Case("gan_loss", f"forward {shape}", dtype, lambda: ops.conv_gan_loss(x, weight, *settings),
               Work(tile + logits, product), work)  # fmt: skip
    yield Case("gan_loss", f"backward {shape}", dtype,
               lambda: ops.conv_gan_loss_backward(
                   torch.empty(()), None, x, weight, None, given, *settings[1:-1], [True, True, False]
               ), Work(2 * tile + logits, 2 * product), work)  # fmt: skip


def _rows(rows, classes) -> Iterator[Case]:
    ops = torch.ops.fastgan_emulated
    logits, target, one = torch.empty(rows, classes), torch.zeros(rows, dtype=torch.int64), torch.empty(rows)
    size = 4 * logits.numel()
    yield Case("linear_cross_entropy", f"rows {rows}x{classes}, loss and gradient", torch.float32,
               lambda: ops.linear_cross_entropy_rows(logits, target, None, None, one, one, 0.0, 0.0),
               Work(2 * size), lambda *_: Work(2 * size))  # fmt: skip


def _blocks(rows, columns, classes, dtype) -> Iterator[Case]:
    ops = torch.ops.fastgan_emulated
    logits, target, one = torch.empty(rows, columns), torch.zeros(rows, dtype=torch.int64), torch.empty(rows)
    state, size = torch.empty(rows, 4, dtype=torch.float64), 4 * logits.numel()
    where = (logits, 0, classes, target, None, None, state)
    yield Case("linear_cross_entropy", f"statistics {rows}x{columns}", torch.float32,
               lambda: ops.linear_cross_entropy_statistics(*where, None, 0.0, 0.0),
               Work(size), lambda *_: Work(size))  # fmt: skip
    to = logits.view(dtype)[:, :columns]
    yield Case("linear_cross_entropy", f"gradient {rows}x{columns}, in place", dtype,
               lambda: ops.linear_cross_entropy_gradient(*where, one, to, 0.0),
               Work(1.5 * size), lambda *_: Work(1.5 * size))  # fmt: skip


def cases() -> Iterator[Case]:
    yield from _attention(8, 16, 2048, 64, torch.bfloat16)
    yield from _attention(8, 16, 2048, 128, torch.bfloat16)
    yield from _attention(4, 8, 8192, 128, torch.bfloat16, causal=True)
    yield from _attention(4, 8, 2048, 256, torch.bfloat16)
    yield from _attention(32, 12, 512, 64, torch.bfloat16)
    yield from _attention(8, 12, 1024, 64, torch.float32)
    yield from _attention(8, 12, 1024, 64, torch.bfloat16, second=True)
    yield from _attention(8, 12, 1024, 64, torch.float32, second=True)
    for dtype in (torch.float32, torch.bfloat16):
        yield from _norm(64, 64, 32, dtype)
        yield from _norm(128, 512, 4, dtype)
        yield from _norm(64, 256, 64, dtype)
        yield from _loss(64, 512, 4, dtype)
        yield from _loss(1024, 512, 4, dtype)
        yield from _loss(16, 512, 31, dtype)
    yield from _rows(1099, 30522)
    yield from _blocks(8192, 3008, 50257, torch.bfloat16)


# ---- the table ----


def rows_of(case: Case, launches: list[Launch], compiled: dict[str, Compiled]) -> list[dict[str, Any]]:
    """A row for each launch."""
    out = []
    for i, launch in enumerate(launches):
        same = [other for other in launches if other.kernel == launch.kernel]
        index = sum(other.kernel == launch.kernel for other in launches[:i])
        work, of = case.work(launch, index, len(same)), compiled[launch.kernel]
        blocks = blocks_per_processor(of, launch)
        balanced = balance(launch.grid)
        least = work.seconds(case.peak)
        out.append({
            "case": case.name, "dtype": str(case.dtype).removeprefix("torch."), "kernel": launch.name,
            "grid": launch.grid, "threads": launch.threads, "registers": of.registers,
            "shared": of.shared + launch.shared, "blocks": blocks,
            "occupancy": blocks * launch.threads / THREADS, "rounds": rounds(launch.grid, blocks),
            "balance": balanced, "bytes": work.bytes, "operations": work.operations, "limit": work.limit(case.peak),
            "least": least, "expected": least / balanced,
        })  # fmt: skip
    return out


def best(case: Case, rows: list[dict[str, Any]]) -> float:
    """The operator's least time over its launches'."""
    return case.needed.seconds(case.peak) / sum(row["expected"] for row in rows)


def table(all_rows: list[tuple[Case, list[dict[str, Any]]]]) -> Iterator[str]:
    yield (
        "| operator | kernel | blocks × threads | registers | shared, KiB | blocks a processor (occupancy) "
        "| rounds (balance) | MB | GFLOP | limit | least, µs | best |"
    )
    yield "|---|" + "---|" * 11
    for case, rows in all_rows:
        for i, row in enumerate(rows):
            first = f"{case.stem}: {row['case']}, {row['dtype']}" if i == 0 else ""
            share = f"{best(case, rows):.0%}" if i == 0 else ""
            yield (
                f"| {first} | {row['kernel'].removesuffix('_kernel')} | {row['grid']} × {row['threads']} "
                f"| {row['registers']} | {row['shared'] / 1024:.1f} | {row['blocks']} ({row['occupancy']:.0%}) "
                f"| {row['rounds']} ({row['balance']:.0%}) | {row['bytes'] / 1e6:.1f} | {row['operations'] / 1e9:.1f} "
                f"| {row['limit']} | {row['least'] * 1e6:.1f} | {share} |"
            )


def main() -> int:
    from tests.cuda_emulation.build import build_operators

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    options = parser.parse_args()
    os.environ["FASTGAN_EMULATED_GPU"] = ARCHITECTURE.removesuffix("a")  # what is launched there
    with tempfile.TemporaryDirectory() as name:
        compiled = compile_all(Path(name))
        recorder = Recorder(build_operators(Path(name)))
        rows = [(case, rows_of(case, recorder(case.call), compiled[case.stem])) for case in cases()]
    lines = list(table(rows))
    print("\n".join(lines))
    if options.out:
        about = "Written by `python -m benchmarks.cuda_roofline`, whose first lines say what it means; nothing was run."
        options.out.write_text(
            "\n".join([f"# The CUDA kernels on an H100, from their compiled code\n\n{about}\n", *lines, ""])
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
