"""One binary for every torch ≥ 2.10: built against one version, run under another, and the other way round."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pybind11
import pytest
import torch

from fastgan import _cuda
from tests.cuda_emulation.build import CXX
from tests.other_torch import OTHER_TORCH, QUICK_NVCC, REPOSITORY, build_wheel, run

OLDEST_TORCH = "2.10.0"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def oldest_headers(tmp_path_factory) -> Path:
    """A folder with ``torch/include`` of the oldest torch that is supported."""
    folder = tmp_path_factory.mktemp("oldest")
    # The headers are the same for every Python; the newest ones may have no wheel of so old a torch.
    run(
        sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version=3.11",
        "-d", folder, f"torch=={OLDEST_TORCH}",
    )  # fmt: skip
    (wheel,) = folder.glob("torch-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith("torch/include/")])
    wheel.unlink()
    (folder / "torch" / "__init__.py").touch()  # what CMake asks Python for
    return folder


def test_R71_the_sources_compile_with_the_oldest_torchs_headers(oldest_headers, tmp_path):
    """Whoever builds the package, or its CUDA kernels at first use, does so with the torch that is there."""
    run(
        shutil.which("cmake"), "-S", REPOSITORY, "-B", tmp_path, "-G", "Ninja", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        PYTHONPATH=str(oldest_headers),
    )  # fmt: skip
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    # The kernels include nothing of torch's.
    wanted = {each["file"]: each["command"].split(" -o ")[0] for each in commands if "/_C.dir/" in each["command"]}
    assert any(file.endswith("module.cpp") for file in wanted)
    compilers = [f"{command} -fsyntax-only {file}" for file, command in wanted.items()]
    include = oldest_headers / "torch" / "include"
    for source in sorted({o for cu in (REPOSITORY / "csrc").glob("*/*.cu") for o in cu.parent.glob("*_op.cpp")}):
        flags = " ".join(_cuda._FLAGS)
        compilers.append(f"{CXX} {flags} -I{REPOSITORY}/csrc -isystem {include} -fsyntax-only {source}")
    assert str(include) in compilers[0]
    for compiler in compilers:
        done = subprocess.run(compiler, shell=True, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), f"{compiler}\n{done.stderr[-3000:]}"


def test_R71_built_here_runs_under_the_other_torch(other_python, other_site):
    out = run(other_python, REPOSITORY / "tests" / "smoke.py", PYTHONPATH=str(other_site))
    assert f"under torch {OTHER_TORCH}" in out


def test_R71_built_with_the_other_torch_runs_here(other_python, tmp_path):
    # PATH: a build without isolation takes cmake and ninja from the environment that it runs in. CUDAARCHS: where that
    # torch has CUDA and a compiler is here, the package comes with one GPU's kernels; all of them take minutes more.
    path = f"{other_python.parent}{os.pathsep}{os.environ['PATH']}"
    quick = "cmake.define.CMAKE_CXX_FLAGS_RELEASE=-O0"
    wheel = build_wheel(other_python, tmp_path, quick, PATH=path, CUDAARCHS="80-real", **QUICK_NVCC)
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel)
    # -S and an explicit path keep the editable install of this environment out of the way.
    site = Path(torch.__file__).parent.parent
    out = run(
        sys.executable, "-S", REPOSITORY / "tests" / "smoke.py", PYTHONPATH=f"{tmp_path / 'site'}{os.pathsep}{site}"
    )
    assert f"under torch {torch.__version__}" in out
