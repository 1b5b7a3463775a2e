"""The harnesses that judge the CPU kernels by plain loops, run on the CUDA kernels under the sanitizers.

ThreadSanitizer sees races between the threads of a block and between blocks; AddressSanitizer sees reads and writes
beyond shared memory, and beyond tensors and scratch, which have exactly the size that was asked for.
"""

import os

import pytest

from tests.cuda_emulation.build import HERE, REPOSITORY, build, needs_compiler, run

pytestmark = [needs_compiler, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("stem", ["norm_act", "gan_loss", "attention"])
def test_a_harness_reports_nothing(tmp_path, stem, sanitizer):
    program = build(
        tmp_path,
        stem,
        [
            REPOSITORY / "tests" / "kernel_harness" / f"{stem}_harness.cpp",
            # The harness asks for first derivatives alone, and the second's file takes minutes to compile.
            *(p for p in sorted((REPOSITORY / "csrc" / stem).glob("*.cu")) if "second" not in p.name),
            HERE / f"{stem}_isa.cpp",
        ],
        sanitizer=sanitizer,
        flags=["-DFASTGAN_ISA=emulated", "-DHARNESS_FIRST_ORDER", "-include", str(HERE / "isa.h")],
    )
    # A part of the cases: a fiber of ThreadSanitizer's costs tens of microseconds, and a block has 256.
    every = "1" if sanitizer == "address" else {"norm_act": "23", "gan_loss": "10", "attention": "3"}[stem]
    done = run([program], timeout=600, env={**os.environ, "HARNESS_EVERY": every, "HARNESS_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stderr == ""
