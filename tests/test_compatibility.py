"""One binary for every torch ≥ 2.10: built against one version, run under another, and the other way round."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
OTHER_TORCH = os.environ.get("FASTGAN_OTHER_TORCH", "2.14.1")
BUILD_TOOLS = ["scikit-build-core>=0.10", "pybind11>=2.13", "cmake>=3.25", "ninja>=1.11"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=tempfile.gettempdir(),
        timeout=1500,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def build_wheel(python: str | Path, folder: Path) -> Path:
    run(
        python, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder,
        f"--config-settings=build-dir={folder}/build", REPOSITORY,
    )  # fmt: skip
    return next(folder.glob("fastgan-*.whl"))


@pytest.fixture(scope="module")
def other_python(tmp_path_factory) -> Path:
    """An environment with another torch; FASTGAN_OTHER_PYTHON names one that is there already."""
    if "FASTGAN_OTHER_PYTHON" in os.environ:
        return Path(os.environ["FASTGAN_OTHER_PYTHON"])
    folder = tmp_path_factory.mktemp("other")
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", f"torch=={OTHER_TORCH}", "numpy", *BUILD_TOOLS)
    return python


def test_R71_built_here_runs_under_the_other_torch(other_python, tmp_path):
    # FASTGAN_WHEEL names one that was built here already.
    wheel = (
        Path(os.environ["FASTGAN_WHEEL"]) if "FASTGAN_WHEEL" in os.environ else build_wheel(sys.executable, tmp_path)
    )
    run(other_python, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel)
    out = run(other_python, REPOSITORY / "tests" / "smoke.py", PYTHONPATH=str(tmp_path / "site"))
    assert f"under torch {OTHER_TORCH}" in out


def test_R71_built_with_the_other_torch_runs_here(other_python, tmp_path):
    # PATH: a build without isolation takes cmake and ninja from the environment that it runs in.
    path = f"{other_python.parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["PATH"], before = path, os.environ["PATH"]
    try:
        wheel = build_wheel(other_python, tmp_path)
    finally:
        os.environ["PATH"] = before
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel)
    # -S and an explicit path keep the editable install of this environment out of the way.
    site = Path(torch.__file__).parent.parent
    out = run(
        sys.executable, "-S", REPOSITORY / "tests" / "smoke.py", PYTHONPATH=f"{tmp_path / 'site'}{os.pathsep}{site}"
    )
    assert f"under torch {torch.__version__}" in out
