"""What limits each CUDA kernel, by the GPU's own counters: ``python -m benchmarks.device counters``.

Runs its cases under Nsight Compute (``ncu``), where that is installed and may read the counters, and prints a row for
each kernel: its time, the share of what memory, caches and multiprocessors can do, how many warps were there, and what
Nsight Compute remarks of the busiest pipe and of what warps waited for. A counted kernel runs alone and several times;
clocks are left as they are.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats",
    "Occupancy", "LaunchStats",
)  # fmt: skip
#: Nsight Compute's name of a number, and ours
NUMBERS = {
    "Duration": "us",
    "DRAM Throughput": "memory %",
    "L2 Cache Throughput": "L2 %",
    "L1/TEX Cache Throughput": "L1 %",
    "Compute (SM) Throughput": "SM %",
    "Issue Slots Busy": "issue %",
    "Achieved Occupancy": "occupancy %",
    "Registers Per Thread": "registers",
}
SHAPES = ("64x64x32x32", "128x256x8x8", "128x512x4x4", "64x256x64x64", "16x512x31x31")
#: of a kernel that no case has, and of the lines that name the cases
MARK, CASE = "erfinv", "counted: "
PIPE = re.compile(r"(\w[\w/ ]*?) is the highest-utilized pipeline \(([\d.]+)%\)")
STALL = re.compile(r"spends ([\d.]+) cycles being stalled (.*?)[.,;]")


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Attention forward and backward, batch norm and the last convolution, as benchmarks.device times them."""
    import torch

    from benchmarks.device_tables import ATTENTION, attention_calls, kernel_cases

    wanted = ("plain", "BERT: padding, dropout", "T5: learned bias", "float32", "one query")
    for case in ATTENTION:
        if case[0] in wanted and not (case[0] == "plain" and case[4] == 128):
            calls = dict(attention_calls(case, False))
            yield "attention, {}, {}x{}x{}x{}".format(*case[:5]), calls.get("own", calls["fastgan"])
    for dtype, layout in ((torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)):
        for name, ours, _, make, *_ in kernel_cases(dtype, layout):
            if any(shape in name for shape in SHAPES):
                tensors, grad = make()
                yield (
                    f"{name}, {str(dtype)[6:]}, {str(layout)[6:]}",
                    lambda f=ours, t=tensors, g=grad: torch.autograd.grad(f(*t), t, g),
                )


def run_cases(only: str) -> None:
    """What is run under ``ncu``: the names of the cases, and before the kernels of each one that marks it."""
    import torch

    one = torch.ones(1, device="cuda")
    for name, call in cases():
        if only not in name:
            continue
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.erfinv(one)
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        print(f"{CASE}{name}", flush=True)


def short_name(kernel: str) -> str:
    """fastgan's kernel and its template arguments, without namespaces."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|fastgan::|^void ", "", kernel)
    return re.sub(r"\(\w*Args\b.*$", "", name)[:80]


def read(lines: Iterable[str], names: list[str]) -> list[dict[str, Any]]:
    """Rows of ``ncu --csv --page details``, one for each kernel of fastgan's, in the order in which they ran."""
    found: dict[str, dict[str, Any]] = {}
    marks: set[str] = set()
    for line in csv.DictReader(line for line in lines if line.startswith('"')):
        if MARK in line["Kernel Name"]:
            marks.add(line["ID"])
        if "fastgan" not in line["Kernel Name"]:
            continue
        row = found.setdefault(line["ID"], {"case": names[len(marks) - 1], "kernel": short_name(line["Kernel Name"])})
        if (ours := NUMBERS.get(line["Metric Name"])) is not None:
            value = float(line["Metric Value"].replace(",", ""))
            unit = line["Metric Unit"]
            row[ours] = value * {"ns": 1e-3, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3}.get(unit, 1.0)
        said = line.get("Rule Description") or ""
        if (pipe := PIPE.search(said)) is not None:
            row["pipe"] = f"{pipe[1]} {float(pipe[2]):.0f} %"
        if (stall := STALL.search(said)) is not None:
            what = re.sub("waiting (for|on) (a scoreboard dependency on )?", "", stall[2])
            row["waits"] = f"{float(stall[1]):.1f} cycles {what}"
    return list(found.values())


def main(out: str, only: str) -> int:
    ncu = shutil.which("ncu")
    if ncu is None:
        print("Nsight Compute (ncu) is not installed: left out")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        sections = [part for section in SECTIONS for part in ("--section", section)]
        command = [
            ncu, "--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "details",
            "--kernel-name-base", "demangled", "--kernel-name", f"regex:fastgan|{MARK}", "--log-file", str(log),
            *sections, sys.executable, "-m", "benchmarks.device_counters", "--only", only,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        lines = log.read_text().splitlines() if log.exists() else []
        (Path(out).with_suffix(".csv")).write_text("\n".join(lines))
    rows = read(lines, [line.removeprefix(CASE) for line in done.stdout.splitlines() if line.startswith(CASE)])
    if not rows:
        print("Nsight Compute counted nothing:", *lines[:20], done.stdout[-2000:], done.stderr[-2000:], sep="\n")
        return 1
    columns = [*NUMBERS.values(), "pipe", "waits"]
    print(f"| case | kernel | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 2)}")
    for row in rows:
        shown = [f"{row[c]:.1f}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns]
        print(f"| {row['case']} | `{row['kernel']}` | {' | '.join(shown)} |")
    Path(out).write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", help="a file for the rows; without it the cases run, and nothing counts them")
    parser.add_argument("--only", default="", metavar="WORD", help="cases with this in their name")
    options = parser.parse_args()
    if options.out:
        raise SystemExit(main(options.out, options.only))
    run_cases(options.only)
