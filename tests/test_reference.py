"""The pure-PyTorch reference alone: what runs where the extension is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_R69_the_reference_passes_the_cases_of_the_kernels():
    """Whatever is tested of operators and modules, second derivatives included, but for what is about the kernel."""
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-m", "not slow"]
    done = subprocess.run(
        [*command, "tests/ops", "tests/nn", "tests/test_replace.py"],
        cwd=REPOSITORY,
        env={**os.environ, "FASTGAN_IMPL": "reference"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "RuntimeWarning: fastgan" not in done.stdout
