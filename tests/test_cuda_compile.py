"""Every .cu compiles for the GPUs that it is meant for: no spills, and no more registers than its header states.

With cuobjdump and nvdisasm (the toolkit's, or ``pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm``) the
instructions are looked at as well.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin")
_TOOLS = os.pathsep.join(
    [
        os.environ.get("PATH", ""),
        os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin",
        *map(str, Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin")),
    ]
)
CUOBJDUMP = shutil.which("nvdisasm", path=_TOOLS) and shutil.which("cuobjdump", path=_TOOLS)
SOURCES = sorted((REPOSITORY / "csrc").glob("*/*.cu"))

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no CUDA compiler (nvcc) on this machine")


def compile_for(architecture: str, source: Path, out: Path, *flags: str) -> str:
    """What ptxas says of the kernels of a source."""
    done = subprocess.run(
        [
            str(NVCC), "-std=c++20", "-O3", f"-I{REPOSITORY / 'csrc'}", "-Werror=all-warnings", "-Xptxas=-v",
            f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-c", source, "-o", out, *flags,
        ],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def stated_registers(source: Path) -> int:
    found = re.search(r"Registers: at most (\d+), no spills", source.read_text())
    assert found, f"{source.name} does not state its registers"
    return int(found.group(1))


def check(report: str, most: int) -> None:
    kernels = re.findall(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert kernels
    assert len(spills) >= len(kernels)
    assert max(map(int, kernels)) <= most
    assert not [pair for pair in spills if pair != ("0", "0")]


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    """(what ptxas said, the object) of a source for an architecture; those that this run's tests want side by side."""
    folder = tmp_path_factory.mktemp("objects")

    def compile_one(source: Path, architecture: str) -> tuple[str, Path]:
        out = folder / f"{source.stem}_{architecture}.o"
        return compile_for(architecture, source, out), out

    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    wanted = {(p["source"], p["architecture"]): None for p in parameters if {"source", "architecture"} <= p.keys()}
    pool = ThreadPoolExecutor(os.cpu_count())  # the compilers are processes; threads wait for them
    done = {pair: pool.submit(compile_one, *pair) for pair in wanted}
    yield lambda source, architecture: done[source, architecture].result()
    pool.shutdown(cancel_futures=True)


every_source_and_gpu = [
    needs_nvcc,
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # the first waits for those before it in the pool
    pytest.mark.parametrize("architecture", ["80", "90a", "100"]),
    pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem),
]


def _for_all(test):
    for mark in every_source_and_gpu:
        test = mark(test)
    return test


@_for_all
def test_no_spills_and_the_registers_that_the_header_states(source, architecture, compiled):
    report = compiled(source, architecture)[0]
    check(report, stated_registers(source))
    assert "wgmma" not in report  # products that ptxas makes one after the other, as it says


def instructions(cubin: Path) -> dict[str, Counter[str]]:
    """Of each kernel, by its mangled name, the instructions with their suffixes, and how many there are."""
    done = subprocess.run(
        [str(CUOBJDUMP), "-sass", cubin], capture_output=True, text=True, env={**os.environ, "PATH": _TOOLS}
    )
    assert done.returncode == 0, done.stderr
    functions = re.split(r"Function : (\S+)", done.stdout)[1:]
    return {
        name: Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9.]+)", body, re.MULTILINE))
        for name, body in zip(functions[::2], functions[1::2], strict=True)
    }


# of 16-bit elements these multiply matrices
PRODUCTS = (
    "forward_kernel",
    "parts_kernel",
    "queries_kernel",
    "keys_kernel",
    "delta_kernel",
    "bias_kernel",
    "weights_kernel",
)


@_for_all
@pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump and nvdisasm on this machine")
def test_no_local_memory_and_tensor_cores_where_they_belong(source, architecture, compiled):
    kernels = instructions(compiled(source, architecture)[1])
    assert kernels
    for name, whole in kernels.items():
        found = {each.split(".")[0] for each in whole}
        assert "EXIT" in found
        assert not found & {"LDL", "STL"}, name
        if source.parent.name == "attention" and any(kernel in name for kernel in PRODUCTS):
            by_warpgroups = "Warpgroups" in name
            halves = re.search(r"\d(forward|queries|keys)_kernelINS_\d+b?float16ELi(64|128)E", name)
            if halves is None or by_warpgroups == (architecture == "90a"):  # of two kernels the other is empty
                in_terms = "4tf32" in name
                assert ("HMMA" in found) == (("float16" in name and not by_warpgroups) or in_terms), name
                assert ("HMMA.1688.F32.TF32" in whole) == in_terms, name
                assert ("HGMMA" in found) == by_warpgroups, name
                assert "LDGSTS" in found, name  # cp.async
            else:
                assert found <= {"MOV", "LDC", "NOP", "EXIT", "BRA"}, name
        if source.parent.name == "norm_act" and re.search(r"(ward|values)_kernelI\w+?Li[248]E", name):
            # vectors, stored whole; the gradients of weight and bias are single floats
            assert whole["STG.E"] <= (2 if "backward_kernel" in name else 0), name
            assert not whole["STG.E.U16"], name
        if source.parent.name == "norm_act" and re.search(r"\d(for|back)ward_kernelI", name):
            clustered = re.search(r"kernelI.+?Lb[01]ELb1EE", name) is not None
            assert ("UCGABAR" in found) == (clustered and architecture != "80"), name
            assert not clustered or architecture != "80" or len(found) < 6, name  # empty there


@needs_nvcc
def test_a_kernel_that_spills_would_be_seen(tmp_path):
    source = tmp_path / "spills.cu"
    source.write_text(
        "// Registers: at most 32, no spills\n"
        "__global__ void spills(float* x) {\n"
        "  float v[96];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) v[i] = x[i * 256 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) x[i * 256 + threadIdx.x] = v[95 - i] * v[i];\n"
        "}\n"
    )
    assert stated_registers(source) == 32
    with pytest.raises(AssertionError):
        check(compile_for("80", source, tmp_path / "spills.o", "-maxrregcount=32"), 32)


@needs_nvcc
def test_the_tensor_core_header_compiles_to_the_instructions_that_it_names(tmp_path):
    source = tmp_path / "tensor_core.cu"
    source.write_text(
        """
#include "common/cuda_tensor_core.h"
using namespace fastgan;
template <class S>
__global__ void kernel(const S* x, float* y) {
  SharedMemory shared;
  S* tile = shared.take<S>(512);
  int lane = int(threadIdx.x);
  async_copy16(tile + lane * 8, x + lane * 8, lane != 3);
  async_commit();
  async_wait<0>();
  block_sync();
  uint32_t a[4], t[4];
  load_matrices(a, tile + lane * 8);
  load_matrices_transposed(t, tile + lane * 8);
  uint32_t b[2] = {t[0], t[1]};
  float c[4] = {};
  mma_m16n8k16<S>(c, a, b);
  mma_m16n8k8(c, a, b);
  y[lane] = c[0] + c[1] + c[2] + c[3];
}
template __global__ void kernel(const bfloat16*, float*);
template __global__ void kernel(const float16*, float*);
"""
    )
    check(compile_for("80", source, tmp_path / "kernel.o"), 40)
    ptx = tmp_path / "kernel.ptx"
    done = subprocess.run(
        [str(NVCC), "-std=c++20", f"-I{REPOSITORY / 'csrc'}", "-arch=compute_80", "-ptx", source, "-o", ptx],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    instructions = ptx.read_text()
    for name in (
        "m16n8k16.row.col.f32.bf16",
        "m16n8k16.row.col.f32.f16",
        "m16n8k8.row.col.f32.tf32",
        "ldmatrix",
        "x4.trans",
        "cp.async.cg",
        "wait_group",
    ):
        assert name in instructions


def test_every_source_states_its_registers():
    assert SOURCES
    for source in SOURCES:
        stated_registers(source)
