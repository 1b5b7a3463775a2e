"""Killed with SIGKILL at any moment and resumed, a run ends with the same weights, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def kill(folder, kills, seed):
    script = Path(__file__).with_name("kill.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    got = subprocess.run(
        [sys.executable, script, folder, str(kills), str(seed)], capture_output=True, text=True, env=environment
    )
    assert got.returncode == 0, got.stdout + got.stderr
    assert f"{kills} kills" in got.stdout
    print(got.stdout)


def test_R65_a_few_kills(tmp_path):
    kill(tmp_path, 3, 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_R65_many_kills(tmp_path):
    """FASTGAN_KILLS says how many; 50 by default."""
    kill(tmp_path, int(os.environ.get("FASTGAN_KILLS", "50")), 2)
