"""``fastgan._C_cuda``, the library of the CUDA kernels: found beside the package, or built at first use.

A wheel may come without it: it is built for one version of CUDA, and the machine that makes a wheel need not have any.
The first call on a CUDA tensor then builds it from the sources that every wheel has, for the GPUs that are there, says
so, and keeps it in a cache; the key is a hash of the sources, torch's and CUDA's versions and the GPUs. Where it cannot
be built, one warning says why and what to do, and the reference in PyTorch runs.

Two processes that start at once build once: an fcntl lock, which dies with its process, is held around the build, whose
folder is private until it is whole (torch's own lock is a file that a killed build leaves behind, and then waits for
ever). ``FASTGAN_CACHE`` names the cache's folder (default: ``$XDG_CACHE_HOME/fastgan`` or ``~/.cache/fastgan``),
``TORCH_CUDA_ARCH_LIST`` other GPUs than those that are there; ``FASTGAN_CUDA=off`` leaves CUDA to the reference.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastgan import _impl
from fastgan._cache import cache_folder

_LIBRARY = "_C_cuda.so"
_FLAGS = ["-O3", "-std=c++20", "-DUSE_CUDA", "-DFASTGAN_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]

_lock = threading.RLock()
#: the loaded library's path
_loaded: Path | None = None
#: why there is none, once that was tried
_failure: str | None = None


class _Unavailable(Exception):
    """Why the library cannot be had, in words for a user."""


def has_kernel(operator: str) -> bool:
    """True if ``operator`` has a CUDA kernel; the first call on a machine with a GPU loads or builds the library."""
    if _loaded is None and not _try_to_load():
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastgan::{operator}", "CUDA")


# As torch.compiler.assume_constant_result does, which would import all of Dynamo here: compiled code asks once.
has_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


def status() -> str:
    """What there is of the CUDA kernels, in words; loads and builds nothing."""
    if _loaded is not None:
        return f"loaded ({_loaded})"
    reason = _failure or _not_wanted()
    if reason is not None:
        return f"not loaded: {reason}"
    found = _beside_the_package()
    return f"loaded at first use ({found})" if found else "built at first use on a CUDA tensor"


def _not_wanted() -> str | None:
    """Why nothing is tried at all."""
    if os.environ.get("FASTGAN_CUDA", "") == "off":
        return "FASTGAN_CUDA=off"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None


def _try_to_load() -> bool:
    global _loaded, _failure
    if _failure is not None or _impl.reference_selected() or _not_wanted() is not None:
        return False
    with _lock:
        if _loaded is None and _failure is None:
            try:
                _loaded = _load()
            except _Unavailable as error:
                _failure = str(error)
                warnings.warn(
                    f"fastgan's CUDA kernels are not available: {_failure}. The slower reference in PyTorch runs on "
                    "CUDA tensors instead.",
                    RuntimeWarning,
                    stacklevel=4,
                )
    return _loaded is not None


def _load() -> Path:
    path = _beside_the_package()
    if path is not None:
        try:
            torch.ops.load_library(path)
            return path
        except OSError as error:  # made for another major version of CUDA, as a rule
            print(f"fastgan: {path} does not load ({error}); building it for this torch", file=sys.stderr)
    sources = _sources()
    architectures = _architectures()
    folder = _cache() / _key(sources, architectures)
    if not (folder / _LIBRARY).exists():
        _build(sources, architectures, folder)
        if _registered():
            return folder / _LIBRARY
    try:
        torch.ops.load_library(folder / _LIBRARY)
    except OSError as error:
        raise _Unavailable(
            f"{folder / _LIBRARY} does not load ({error}); delete that folder to build it anew"
        ) from error
    return folder / _LIBRARY


def _registered() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("fastgan::norm_act", "CUDA")


def _package_folders() -> list[Path]:
    """Where the package's files are; an editable install has the compiled ones elsewhere."""
    folders = [Path(__file__).parent]
    if _impl.extension_error is None:
        from fastgan import _C

        folders.append(Path(_C.__file__).parent)
    return folders


def _beside_the_package() -> Path | None:
    return next((f / _LIBRARY for f in _package_folders() if (f / _LIBRARY).exists()), None)


def _sources() -> Path:
    """The folder of csrc/: in a wheel ``_csrc`` beside the package."""
    folders = [f / "_csrc" for f in _package_folders()] + [Path(__file__).parent.parent / "csrc"]
    for folder in folders:
        if any(folder.glob("*/*.cu")):
            return folder
    raise _Unavailable(f"their sources are missing (looked in {', '.join(map(str, folders))}): reinstall fastgan")


def _architectures() -> str:
    """The GPUs to build for, as in TORCH_CUDA_ARCH_LIST: 8.0;9.0a."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if given:
        return given
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    least = min(found, default=(0, 0))
    if least < (8, 0):
        raise _Unavailable(f"a GPU of compute capability 8.0 or later is needed, got {least[0]}.{least[1]}")
    return ";".join(f"{a}.{b}{'a' if (a, b) == (9, 0) else ''}" for a, b in sorted(found))


def _cache() -> Path:
    folder = cache_folder()
    if folder is None:
        raise _Unavailable("there is no home folder to keep them in; FASTGAN_CACHE names a folder")
    return folder


def _key(sources: Path, architectures: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in sources.rglob("*") if p.suffix in (".cu", ".h", ".cpp")):
        digest.update(f"{path.relative_to(sources)}\0".encode() + path.read_bytes())
    digest.update(repr((torch.__version__, torch.version.cuda, architectures, _FLAGS)).encode())
    return f"cuda-{digest.hexdigest()[:20]}"


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Holds the lock of a file, which the kernel lets go of when this process ends, however it ends."""
    import fcntl  # of Unix alone, and so are the builds; elsewhere `import fastgan` must work

    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("fastgan: another process is building the CUDA kernels; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(sources: Path, architectures: str, folder: Path) -> None:
    """Builds the library into ``folder``, unless another process does so first; it may be loaded afterwards."""
    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(cache / f"{folder.name}.lock"):
            if (folder / _LIBRARY).exists():
                return
            for left_over in cache.glob(f"{folder.name}.part-*"):  # of a build that was killed: we have the lock
                shutil.rmtree(left_over, ignore_errors=True)
            private = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=cache))
            try:
                _compile(sources, architectures, private)
                private.rename(folder)
            finally:
                shutil.rmtree(private, ignore_errors=True)
    except OSError as error:
        raise _Unavailable(
            f"the cache {cache} cannot be written ({error.strerror or error}); FASTGAN_CACHE names another folder"
        ) from error


def _compile(sources: Path, architectures: str, folder: Path) -> None:
    from torch.utils import cpp_extension

    _check_compiler(cpp_extension.CUDA_HOME)
    print(f"fastgan: building its CUDA kernels for {architectures}, once; this takes a minute or two",
          file=sys.stderr, flush=True)  # fmt: skip
    begin = time.perf_counter()
    before = os.environ.get("TORCH_CUDA_ARCH_LIST")
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    kernels = sorted(sources.glob("*/*.cu"))
    operators = sorted({path for cu in kernels for path in cu.parent.glob("*_op.cpp")})
    try:
        cpp_extension.load(
            "fastgan_C_cuda",
            [str(path) for path in (*kernels, *operators)],
            extra_cflags=_FLAGS,
            extra_cuda_cflags=_FLAGS,
            extra_include_paths=[str(sources)],
            build_directory=str(folder),
            with_cuda=True,
            is_python_module=False,
        )
    except (RuntimeError, ImportError, subprocess.CalledProcessError) as error:
        raise _Unavailable(f"building them failed: {_last_words(error)}") from error
    except OSError as error:
        if not (folder / "fastgan_C_cuda.so").exists():
            raise  # the folder's: _build says so
        raise _Unavailable(f"they were built, and do not load: {error.__cause__ or error}") from error
    finally:
        if before is None:
            del os.environ["TORCH_CUDA_ARCH_LIST"]
        else:
            os.environ["TORCH_CUDA_ARCH_LIST"] = before
    (folder / "fastgan_C_cuda.so").rename(folder / _LIBRARY)
    for left_over in folder.glob("*.o"):
        left_over.unlink()
    print(
        f"fastgan: built in {time.perf_counter() - begin:.0f} s and kept in {folder.parent}",
        file=sys.stderr,
        flush=True,
    )


def _check_compiler(cuda_home: str | None) -> None:
    want = torch.version.cuda
    nvcc = Path(cuda_home or "") / "bin" / "nvcc"
    if cuda_home is None or not nvcc.exists():
        raise _Unavailable(
            "building them needs the CUDA compiler, and there is no nvcc"
            f"{f' in {cuda_home}/bin' if cuda_home else ''}: install the CUDA toolkit {want} and set CUDA_HOME to its "
            "folder"
        )
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is not None and want is not None and release.group(1) != want.split(".")[0]:
        raise _Unavailable(
            f"torch is built with CUDA {want}, and {nvcc} is of CUDA {release.group(1)}.{release.group(2)}: install "
            f"the toolkit of CUDA {want.split('.')[0]} and set CUDA_HOME to its folder"
        )
    if shutil.which("ninja") is None:
        raise _Unavailable("building them needs ninja: pip install ninja")


def _last_words(error: BaseException) -> str:
    """The lines of a compiler's output that tell what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|No space left|cannot|not found", line)]
    return " | ".join((telling or lines)[:3])[:600]
