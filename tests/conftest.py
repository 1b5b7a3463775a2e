"""Settings that hold for every test, and the fixtures that several files share."""

import contextlib
import os
import signal
from pathlib import Path

# The compile caches on disk do not know our Python formulas: an old gradient would come back after a change.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Thread pools that spin while they wait would take the other worker's cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell without job control starts what is in its background with SIGINT ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from hypothesis import settings

from tests.other_torch import other_python, other_site  # noqa: F401, which are fixtures

# The same examples in every run; HYPOTHESIS_PROFILE=explore draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_runtest_setup(item):
    if os.environ.get("FASTGAN_IMPL") == "reference" and item.get_closest_marker("kernel"):
        pytest.skip("FASTGAN_IMPL=reference: this is about the compiled kernel")


REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _same_start():
    """Each test draws the same random numbers whatever ran before it, and leaves torch's settings alone."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


@pytest.fixture
def one_thread():
    """For small models, which wait for each other's threads longer than they compute."""
    torch.set_num_threads(1)


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data sets; the test is skipped where it is absent."""
    folder = Path(os.environ.get("FASTGAN_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder} (FASTGAN_DATA names the folder)")
    return folder


def _capabilities() -> tuple[str, ...]:
    from fastgan import _impl

    if _impl.extension_error is not None:
        return ()
    from fastgan import _C

    return _C.available_capabilities()


@contextlib.contextmanager
def _computing_with(capability: str):
    from fastgan import _C

    before = _C.capability()
    _C.set_capability(capability)
    yield
    _C.set_capability(before)


@pytest.fixture(params=["baseline", "avx2", "avx512", "amx", "neon"])
def capability(request):
    """Runs the test once for each instruction set; those that this machine lacks are skipped, and say so."""
    if request.param not in _capabilities():
        pytest.skip(f"this machine and build have {', '.join(_capabilities()) or 'no kernels'}, not {request.param}")
    with _computing_with(request.param):
        yield request.param


@pytest.fixture
def without_tiles():
    """Whatever the machine has: bfloat16 is multiplied as float32."""
    if not _capabilities():
        yield
        return
    from fastgan import _C

    with _computing_with("avx512") if _C.capability() == "amx" else contextlib.nullcontext():
        yield
