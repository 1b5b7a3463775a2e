"""CUDA's kernels as operators on the CPU's tensors: by the emulator, and on a GPU where there is one."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest
import torch

import fastgan
from tests.cuda_emulation.build import CXX, REPOSITORY, build

STEMS = {
    "norm_act": ["norm_act", "norm_act_backward", "norm_act_eval", "norm_act_eval_backward", "norm_act_move"],
    "gan_loss": ["conv_gan_loss", "conv_gan_loss_backward"],
    "linear_cross_entropy": ["linear_cross_entropy_rows"],
    "attention": ["attention", "attention_backward", "attention_jvp", "attention_double_backward"],
}
_library: list[torch.library.Library] = []


class _OnDevice:
    """``torch.ops.fastgan`` on a GPU, for tensors of the CPU."""

    def __getattr__(self, name: str):
        operator = getattr(torch.ops.fastgan, name)

        def call(*args):
            moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
            out = operator(*moved)
            for argument, before, after in zip(operator.default._schema.arguments, args, moved, strict=True):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    before.copy_(after)
            return tuple(each.cpu() for each in out) if isinstance(out, tuple) else None if out is None else out.cpu()

        return call


@pytest.fixture(scope="session", params=["emulator", "device"])
def cuda_kernels(request):
    """The operators with their own checks and the .cu kernels, called with the CPU's tensors."""
    if request.param == "emulator":
        return request.getfixturevalue("emulated")
    if not fastgan._cuda.has_kernel("norm_act"):
        pytest.skip(f"no CUDA kernels on a device: {fastgan._cuda.status()}")
    return _OnDevice()


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """``torch.ops.fastgan_emulated``."""
    if fastgan._impl.extension_error is not None:
        pytest.skip("no compiled extension in this build to compare with")
    if shutil.which(CXX) is None:
        pytest.skip(f"no C++ compiler ({CXX}) on this machine")
    torch_folder = Path(torch.__file__).parent
    csrc = REPOSITORY / "csrc"
    sources = [p for stem in STEMS for p in (csrc / stem / f"{stem}_op.cpp", *sorted((csrc / stem).glob("*.cu")))]
    flags = [
        "-DFASTGAN_CUDA", "-DFASTGAN_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-isystem", str(torch_folder / "include"),
    ]  # fmt: skip
    # Workers of pytest-xdist share the folder above their own: the first builds, the others wait.
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "fastgan_emulated"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / "libfastgan_emulated.so"
        if not library.exists():
            link = [torch_folder / "lib" / "libtorch_cpu.so"]
            library = build(folder, "fastgan_emulated", sources, shared=True, flags=flags, libraries=link)
    definitions = torch.library.Library("fastgan_emulated", "DEF")
    _library.append(definitions)  # an operator lives as long as its library
    for names in STEMS.values():
        for name in names:
            schema = str(getattr(torch.ops.fastgan, name).default._schema)
            definitions.define(schema.removeprefix("fastgan::"))
    torch.ops.load_library(library)
    return torch.ops.fastgan_emulated
