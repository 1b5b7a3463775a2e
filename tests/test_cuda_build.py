"""``fastgan._C_cuda``: what is said where it cannot be had, and what names a build. No GPU is needed, nor a CUDA torch:
a process pretends to have both. ``test_cuda_torch`` builds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from fastgan import _cuda, _impl

REPOSITORY = Path(__file__).resolve().parent.parent
CUDA_HOME = next(
    (Path(p) for p in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if p and (Path(p) / "bin" / "nvcc").exists()),
    None,
)
needs_nvcc = pytest.mark.skipif(CUDA_HOME is None, reason="no CUDA compiler (nvcc) on this machine")
pytestmark = pytest.mark.skipif(_impl.extension_error is not None, reason="no compiled extension in this build")

PRETEND = """
import os, sys, warnings, torch, torch.utils.cpp_extension as e
torch.version.cuda = os.environ.get("PRETEND_CUDA", "13.0")
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_name = lambda *_: "a pretended GPU"
torch.cuda.get_device_capability = lambda i=0: tuple(int(x) for x in os.environ.get("PRETEND_GPU", "9.0").split("."))
e.CUDA_HOME = os.environ.get("PRETEND_CUDA_HOME")
import fastgan
from fastgan import _cuda
"""
ASK = """
print(*[_cuda.has_kernel(name) for name in ("norm_act", "conv_gan_loss", "attention")])
print(_cuda.status())
"""


def start(code: str, *before: str | Path, **environment: str | Path | None) -> subprocess.Popen[str]:
    """Python with the code, where ``before`` is given as the last arguments of that command."""
    given = {k: str(v) for k, v in environment.items() if v is not None}
    env = {k: v for k, v in os.environ.items() if k not in ("TORCH_CUDA_ARCH_LIST", "FASTGAN_CUDA", "FASTGAN_CACHE")}
    return subprocess.Popen(
        [*before, sys.executable, "-c", PRETEND + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**env, **given},
        cwd=sysconfig.get_path("stdlib"),
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


def run(code: str, **environment) -> tuple[str, str]:
    return finish(start(code, **environment))


# ---- what is said; nothing is built ----


def test_without_a_gpu_nothing_is_tried_and_status_says_why():
    if torch.version.cuda is not None and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert not _cuda.has_kernel("norm_act")
    assert "torch is built without CUDA" in _cuda.status() or "no CUDA device" in _cuda.status()


def test_no_compiler_is_one_warning_that_says_what_to_install(tmp_path):
    code = ASK + "\nprint(_cuda.has_kernel('norm_act'))"
    out, err = run(code, FASTGAN_CACHE=tmp_path, PRETEND_CUDA_HOME=tmp_path)
    assert out.startswith("False False False\nnot loaded: building them needs the CUDA compiler")
    assert err.count("RuntimeWarning") == 1
    assert "install the CUDA toolkit 13.0" in err


def test_a_toolkit_of_another_major_version_is_said(tmp_path):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    _, err = run(ASK, FASTGAN_CACHE=tmp_path / "cache", PRETEND_CUDA_HOME=tmp_path)
    assert "torch is built with CUDA 13.0" in err
    assert "CUDA 12.4" in err


def test_a_cache_that_cannot_be_written_is_said_by_its_name(tmp_path):
    (tmp_path / "file").write_text("")  # a folder cannot be made below it, even by root
    _, err = run(ASK, FASTGAN_CACHE=tmp_path / "file" / "cache", PRETEND_CUDA_HOME=CUDA_HOME or tmp_path)
    assert str(tmp_path / "file" / "cache") in err
    assert "FASTGAN_CACHE names another folder" in err


def test_an_old_gpu_and_switching_off(tmp_path):
    _, err = run(ASK, FASTGAN_CACHE=tmp_path, PRETEND_GPU="7.5")
    assert "compute capability 8.0 or later is needed, got 7.5" in err
    out, err = run(ASK, FASTGAN_CACHE=tmp_path, FASTGAN_CUDA="off")
    assert "FASTGAN_CUDA=off" in out
    assert err == ""


def test_a_failed_build_leaves_nothing_and_says_the_compilers_error(tmp_path):
    (tmp_path / "home" / "bin").mkdir(parents=True)
    nvcc = tmp_path / "home" / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\ncase $* in *--version*) echo 'release 13.0, V13.0';; *) echo 'error: No space left on device' >&2; "
        "exit 1;; esac\n"
    )
    nvcc.chmod(0o755)
    # The compiler of the .cpp files fails as well: the build ends at once.
    _, err = run(ASK, FASTGAN_CACHE=tmp_path / "cache", PRETEND_CUDA_HOME=tmp_path / "home", CXX="false")
    assert err.count("RuntimeWarning") == 1
    assert "building them failed" in err
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def on_a_disk(kilobytes: int, code: str, where: Path, **environment) -> str:
    """What is said on stderr where ``where`` is a disk of its own, of that size."""
    where.mkdir()
    command = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]
    mount = f'mount -t tmpfs -o size={kilobytes}k tmpfs "$0"'
    if subprocess.run([*command, mount, where], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a disk of their own")
    on_it = (*command, f'{mount}; df "$0" >&2; exec "$@"', where)
    _, err = finish(start(code, *on_it, FASTGAN_CACHE=where, **environment))
    assert f"{kilobytes}" in err  # df's
    return err


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare on this machine")
def test_a_disk_that_is_full_is_said_and_nothing_stays_on_it(tmp_path):
    fill = """
import pathlib
cache = pathlib.Path(os.environ["FASTGAN_CACHE"])
with open(cache / "all of it", "wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError as error:
        assert error.errno == 28
"""
    left = "\nprint(sorted(p.suffix for p in cache.iterdir()), file=sys.stderr)"
    err = on_a_disk(64, fill + ASK + left, tmp_path / "disk", PRETEND_CUDA_HOME=CUDA_HOME or tmp_path)
    assert err.count("RuntimeWarning") == 1
    assert "No space left on device" in err or CUDA_HOME is None
    assert "['', '.lock']" in err


@needs_nvcc
@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare on this machine")
def test_a_disk_that_fills_up_during_the_build_is_said_and_nothing_stays_on_it(tmp_path):
    (tmp_path / "csrc" / "large").mkdir(parents=True)
    (tmp_path / "csrc" / "large" / "large.cu").write_text("__device__ int large[1 << 20] = {1};\n")
    code = f"""
import pathlib
_cuda._sources = lambda: pathlib.Path({str(tmp_path / "csrc")!r})
print(_cuda.has_kernel("norm_act"))
print([p.suffix for p in pathlib.Path(os.environ["FASTGAN_CACHE"]).iterdir()], file=sys.stderr)
"""
    err = on_a_disk(1024, code, tmp_path / "disk", PRETEND_CUDA_HOME=CUDA_HOME, MAX_JOBS="1")
    assert err.count("RuntimeWarning") == 1
    assert "building them failed" in err
    assert "No space left on device" in err
    assert "['.lock']" in err


def test_the_key_follows_sources_and_gpus(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.cu").write_text("1")
    before = _cuda._key(tmp_path, "8.0")
    assert _cuda._key(tmp_path, "8.0") == before
    assert _cuda._key(tmp_path, "9.0a") != before
    (tmp_path / "a" / "a.cu").write_text("2")
    assert _cuda._key(tmp_path, "8.0") != before


def test_the_wheels_sources_are_there():
    sources = _cuda._sources()
    for stem in ("norm_act", "gan_loss", "attention"):
        assert (sources / stem / f"{stem}.cu").exists()
        assert (sources / stem / f"{stem}_op.cpp").exists()
    assert (sources / "attention" / "attention_varlen_op.cpp").exists()
