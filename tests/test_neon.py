"""The kernels for Arm on a machine that is none: right results under qemu-user, from the same harnesses."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parent / "kernel_harness" / "run.sh"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stem", sorted(path.name[: -len("_harness.cpp")] for path in RUN.parent.glob("*_harness.cpp")))
def test_neon(stem, tmp_path):
    if platform.machine() != "aarch64" and not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")):
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user, or an Arm")
    environment = {**os.environ, "BUILD": str(tmp_path)}
    done = subprocess.run(["bash", str(RUN), "neon", stem], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"== {stem}, neon" in done.stdout
