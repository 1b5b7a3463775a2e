"""The CUDA kernels built at first use against a CUDA build of torch, as on a user's machine; only the GPU is pretended.

``test_cuda_build`` has the rest of what can go wrong.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.other_torch import QUICK_NVCC, run
from tests.test_cuda_build import CUDA_HOME, needs_nvcc

pytestmark = [needs_nvcc, pytest.mark.slow, pytest.mark.timeout(1800)]

# The kernels are linked, loaded and registered; a launch is what it takes a GPU for.
ASK = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_name = lambda *_: "a pretended GPU"
torch.cuda.get_device_capability = lambda *_: (9, 0)
import fastgan
from fastgan import _cuda
print(*[_cuda.has_kernel(name) for name in ("norm_act", "conv_gan_loss", "attention", "linear_cross_entropy_rows")])
print(_cuda.status())
print(fastgan.info()["cuda_kernels"])
"""
ALL = "True True True True\nloaded ("


class Torch:
    """Processes under a CUDA torch."""

    def __init__(self, python: Path, site: Path, cache: Path) -> None:
        self.python, self.cache = python, cache
        left_out = ("TORCH_CUDA_ARCH_LIST", "FASTGAN_CUDA")
        self.environment = {name: value for name, value in os.environ.items() if name not in left_out} | {
            "PYTHONPATH": str(site),
            "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",  # its ninja
            **QUICK_NVCC,
            "CUDA_HOME": str(CUDA_HOME),
            "FASTGAN_CACHE": str(cache),
            "MAX_JOBS": str(os.cpu_count()),
        }

    def start(self, *prefix: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*prefix, str(self.python), "-c", ASK],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment | environment,
            cwd=self.cache.parent,
            start_new_session=True,  # so that a killed build takes its compilers along
        )

    def ask(self, *prefix: str, **environment: str) -> tuple[str, str]:
        return finish(self.start(*prefix, **environment), 120)


def finish(process: subprocess.Popen[str], timeout: float) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def under_cuda_torch(request, tmp_path_factory) -> Torch:
    try:
        python = request.getfixturevalue("other_python")
    except AssertionError as error:
        pytest.skip(f"another torch cannot be had: {str(error).splitlines()[-1][:200]}")
    version = run(python, "-c", "import torch; print(torch.version.cuda)").strip()
    if version == "None":
        pytest.skip("that torch is built without CUDA")
    toolkit = run(CUDA_HOME / "bin" / "nvcc", "--version")
    if f"release {version.split('.')[0]}." not in toolkit:
        pytest.skip(f"that torch is built with CUDA {version}, and the toolkit is another: {toolkit.splitlines()[-1]}")
    return Torch(python, request.getfixturevalue("other_site"), tmp_path_factory.mktemp("cuda") / "cache")


def _without_roots_privilege() -> list[str]:
    """A command's prefix under which root may not write where its permissions forbid it."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root writes everywhere, and there is no setpriv to forbid it")
    without = "-dac_override,-dac_read_search"
    return ["setpriv", f"--bounding-set={without}", f"--inh-caps={without}"]


def test_first_use_is_killed_then_two_at_once_then_read_only(under_cuda_torch):
    cache = under_cuda_torch.cache
    limited = _without_roots_privilege()
    cache.mkdir(mode=0o555)
    out, err = under_cuda_torch.ask(*limited)
    assert out.startswith("False False False False\nnot loaded: the cache")
    assert err.count("RuntimeWarning") == 1
    assert f"{cache} cannot be written (Permission denied); FASTGAN_CACHE names another folder" in err

    cache.chmod(0o755)
    killed = under_cuda_torch.start()
    deadline = time.monotonic() + 120
    while not list(cache.glob("*.part-*/build.ninja")) and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.1)
    time.sleep(2)  # into the compilers
    assert list(cache.glob("*.part-*/build.ninja"))
    assert killed.poll() is None
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert list(cache.glob("*.part-*/lock")), "torch's own lock file, which hangs whoever waits for it"

    pair = [under_cuda_torch.start() for _ in range(2)]
    results = [finish(each, 900) for each in pair]
    for out, _ in results:
        assert out.startswith(ALL)
    said = "".join(err for _, err in results)
    assert said.count("building its CUDA kernels for 9.0a") == 1
    assert said.count("fastgan: built in") == 1
    assert "waiting for it" in said
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]

    out, err = under_cuda_torch.ask()
    assert out.startswith(ALL)
    assert out.count("loaded (") == 2
    assert err == ""

    whole = next(path for path in cache.iterdir() if path.is_dir())
    elsewhere = cache.parent / "elsewhere"
    shutil.copytree(whole, elsewhere / whole.name)  # no lock file, which a read-only cache would not let be made
    out, err = under_cuda_torch.ask(FASTGAN_CACHE=str(elsewhere))
    assert out.startswith(ALL)
    assert err == ""
    assert [path.name for path in elsewhere.iterdir()] == [whole.name]

    for path in (*cache.rglob("*"), cache):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        out, err = under_cuda_torch.ask(*limited)
        assert out.startswith(ALL)
        assert err == ""
        # Other GPUs need another build, which that cache has no room for.
        out, err = under_cuda_torch.ask(*limited, TORCH_CUDA_ARCH_LIST="8.0")
        assert out.startswith("False")
        assert "cannot be written (Permission denied)" in err
    finally:
        for path in (cache, *cache.rglob("*")):
            path.chmod(0o755)
