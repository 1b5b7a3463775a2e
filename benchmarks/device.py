"""Everything that a GPU is needed to tell, in one run: ``python -m benchmarks.device [--json FILE] [SECTION ...]``.

Builds the CUDA kernels where that is not done, then goes through the sections, each in a process of its own, so that
one that fails takes none along:

tests      those of tests/cuda_emulation on the device, and the recorded training step
sanitizer  some of them under compute-sanitizer (memcheck, then racecheck), where it is installed
kernels    batch norm + activation, the last convolution + BCE, as replayed graphs and eagerly: share of the memory
           bandwidth that a copy reaches
attention  beside every backend of PyTorch's that takes the case, and FlexAttention compiled, in TFLOP/s of the products
           that have to be done
second     attention differentiated twice, beside PyTorch's formula
head       linear_cross_entropy beside PyTorch's, and what each takes in memory
gan        a DCGAN's training step beside PyTorch's eager, compiled and recorded as a CUDA graph
language   training steps of GPT-2 and BERT beside transformers with SDPA
profile    (only where it is asked for) what the recorded DCGAN steps and attention consist of, kernel by kernel
counters   (only where it is asked for) what limits the kernels, by Nsight Compute where it is installed

Times are medians of CUDA events after a warm-up, the cache flushed before every call. A wrong result makes the
command fail, and its row says WRONG. The tables are Markdown (benchmarks/device_tables.py prints them).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fastgan
from fastgan import _cuda

REPOSITORY = Path(__file__).resolve().parent.parent
TABLES = ("kernels", "attention", "second", "head", "gan", "language")
SECTIONS = ("tests", "sanitizer", *TABLES)
ON_REQUEST = ("profile", "counters")
# Small shapes, every kernel at least once.
SANITIZED = (
    "device and (test_plain or test_grouped_heads or test_everything_at_once or test_dropout_with_everything "
    "or test_masks_and_bias or test_first_order or test_losses_and_gradients or test_training or test_many_logits) "
    "and not float64"
)


def card() -> dict[str, Any]:
    """The GPU, its driver and its clocks as they are."""
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "fastgan": fastgan.__version__,
    }
    if shutil.which("nvidia-smi"):
        asked = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem")
        command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "--id=0"]
        said = subprocess.run(command, capture_output=True, text=True).stdout.strip().split(", ")
        about |= dict(zip(asked, said, strict=False))
    return about


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-W", "ignore", *arguments]


def run_tests() -> int:
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if _has("xdist") else []
    chosen = ["-k", "device", "tests/cuda_emulation", "tests/training/test_step_graph.py"]
    return subprocess.run(pytest_command(*workers, *chosen), cwd=REPOSITORY).returncode


def run_sanitizer() -> int:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not installed: left out")
        return 0
    failed = 0
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        done = subprocess.run(
            [*command, *pytest_command("-x", "-k", SANITIZED, "tests/cuda_emulation")],
            cwd=REPOSITORY,
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # blocks side by side would hide an overrun
            capture_output=True,
            text=True,
        )
        said = [line for line in done.stdout.splitlines() if "=========" in line or "passed" in line]
        print(f"{tool}: exit code {done.returncode}", *said[:40], sep="\n")
        failed = failed or done.returncode
    return failed


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    some = f"some of {', '.join(SECTIONS)}, all of these if none; {', '.join(ON_REQUEST)}"
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=some)
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--no-compile", action="store_true", help="without what torch.compile has to make first")
    options = parser.parse_args()
    unknown = set(options.sections) - {*SECTIONS, *ON_REQUEST}
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}: there are {', '.join((*SECTIONS, *ON_REQUEST))}")
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return 2
    begin = time.perf_counter()
    if not _cuda.has_kernel("norm_act"):
        print(_cuda.status())
        return 1
    about = card()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"kernels ready after {time.perf_counter() - begin:.0f} s", flush=True)
    failed, tables = [], {}
    for section in options.sections or SECTIONS:
        begin = time.perf_counter()
        print(f"\n### {section}\n", flush=True)
        if section == "tests":
            code = run_tests()
        elif section == "sanitizer":
            code = run_sanitizer()
        else:
            with tempfile.TemporaryDirectory() as folder:
                rows = Path(folder) / "rows.json"
                command = [sys.executable, "-m", "benchmarks.device_tables", section, str(rows), str(options.rounds)]
                command += ["--no-compile"] * options.no_compile
                if section == "counters":
                    command = [sys.executable, "-m", "benchmarks.device_counters", str(rows)]
                code = subprocess.run(command, cwd=REPOSITORY).returncode
                if rows.exists():
                    tables[section] = json.loads(rows.read_text())
        if code:
            failed.append(section)
        print(f"\n{section}: {time.perf_counter() - begin:.0f} s{', FAILED' if code else ''}", flush=True)
        if options.json:
            options.json.write_text(json.dumps({**about, **tables}, indent=1))
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
