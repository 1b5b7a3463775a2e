"""The harnesses that judge the CPU kernels by plain loops, run on the CUDA kernels under the sanitizers.

ThreadSanitizer sees races between the threads of a block and between blocks; AddressSanitizer sees reads and writes
beyond shared memory, and beyond tensors and scratch, which have exactly the size that was asked for.
"""

import os

import pytest

from tests.cuda_emulation.build import HERE, REPOSITORY, build, needs_compiler, run

pytestmark = [needs_compiler, pytest.mark.slow, pytest.mark.timeout(1200)]

# A part of the cases, each n-th: a fiber of ThreadSanitizer's costs tens of microseconds, and a block has 256.
EVERY = {
    "norm_act": {"address": 1, "thread": 14},  # two of which have a large channel's kernels
    "gan_loss": {"address": 1, "thread": 20},
    "attention": {"address": 1, "thread": 8},
    "attention, second order": {"address": 4, "thread": 16},
}


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("harness", EVERY)
def test_a_harness_reports_nothing(tmp_path, harness, sanitizer):
    stem, _, second = harness.partition(", ")
    sources = sorted((REPOSITORY / "csrc" / stem).glob("*.cu"))
    flags = ["-DFASTGAN_ISA=emulated", "-DHARNESS_SECOND_ORDER" if second else "-DHARNESS_FIRST_ORDER"]
    if stem == "attention":
        flags += ["-include", str(HERE / "attention_narrow.h")]
    program = build(
        tmp_path,
        stem,
        [
            REPOSITORY / "tests" / "kernel_harness" / f"{stem}_harness.cpp",
            # Each harness asks for a part of attention's kernels, which take long to compile.
            *(p for p in sources if second or "second" not in p.name),
            HERE / f"{stem}_isa.cpp",
        ],
        sanitizer=sanitizer,
        flags=[*flags, "-include", str(HERE / "isa.h")],
    )
    every = EVERY[harness][sanitizer]
    runs = {"80": every}
    if harness == "attention":
        runs["90"] = 3 * every  # by warpgroups where there are such kernels: of 16 bits
    if harness == "norm_act":
        runs["90"] = every  # by clusters where a channel is large
    for gpu, each in runs.items():
        own = {"HARNESS_EVERY": str(each), "HARNESS_THREADS": "1", "FASTGAN_EMULATED_GPU": gpu}
        done = run([program], timeout=600, env={**os.environ, **own})
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert done.stderr == ""
