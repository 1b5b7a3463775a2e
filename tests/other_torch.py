"""Another torch in an environment of its own, and the wheel installed beside it: gigabytes, made once a session."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.shared_folder import shared_folder

#: for nvcc, where it is about the build and the library is not run: half the time
QUICK_NVCC = {"NVCC_APPEND_FLAGS": "-Xcicc -O1 -Xptxas -O1"}

REPOSITORY = Path(__file__).resolve().parent.parent
OTHER_TORCH = os.environ.get("FASTGAN_OTHER_TORCH", "2.14.1")
BUILD_TOOLS = ["scikit-build-core>=0.10", "pybind11>=2.13", "cmake>=3.25", "ninja>=1.11"]


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


def build_wheel(python: str | Path, folder: Path, *settings: str, **environment: str) -> Path:
    run(
        python, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder,
        *(f"--config-settings={each}" for each in (f"build-dir={folder}/build", *settings)), REPOSITORY, **environment,
    )  # fmt: skip
    return next(folder.glob("fastgan-*.whl"))


@pytest.fixture(scope="session")
def other_python(tmp_path_factory) -> Path:
    """An environment with another torch; FASTGAN_OTHER_PYTHON names one that is there already."""
    if "FASTGAN_OTHER_PYTHON" in os.environ:
        return Path(os.environ["FASTGAN_OTHER_PYTHON"])
    with shared_folder(tmp_path_factory, "other") as folder:
        python, installed = folder / "bin" / "python", folder / "installed"
        if not installed.exists():
            run(sys.executable, "-m", "venv", folder)
            run(python, "-m", "pip", "install", "-q", "--no-compile", f"torch=={OTHER_TORCH}", "numpy", *BUILD_TOOLS)
            installed.touch()
    return python


@pytest.fixture(scope="session")
def other_site(other_python, tmp_path_factory) -> Path:
    """A folder with fastgan, built with this torch, for ``other_python``; FASTGAN_WHEEL names a wheel that is there."""
    folder = tmp_path_factory.mktemp("wheel")
    given = os.environ.get("FASTGAN_WHEEL")
    wheel = Path(given) if given else build_wheel(sys.executable, folder)
    run(other_python, "-m", "pip", "install", "-q", "--no-deps", "--target", folder / "site", wheel)
    return folder / "site"
