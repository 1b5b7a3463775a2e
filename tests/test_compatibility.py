"""One binary for every torch ≥ 2.10: built against one version, run under another, and the other way round."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from tests.other_torch import OTHER_TORCH, REPOSITORY, build_wheel, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_R71_built_here_runs_under_the_other_torch(other_python, other_site):
    out = run(other_python, REPOSITORY / "tests" / "smoke.py", PYTHONPATH=str(other_site))
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
