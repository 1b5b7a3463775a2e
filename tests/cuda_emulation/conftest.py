"""CUDA's kernels as operators on the CPU's tensors: by the emulator, and on a GPU where there is one."""

from __future__ import annotations

import shutil

import pytest
import torch

import fastgan
from tests.cuda_emulation.build import CXX, build_operators
from tests.shared_folder import shared_folder


class _OnDevice:
    """``torch.ops.fastgan`` on a GPU, for tensors of the CPU."""

    def __getattr__(self, name: str):
        operator = getattr(torch.ops.fastgan, name)

        def call(*args):
            moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
            out = operator(*moved)
            for argument, before, after in zip(operator.default._schema.arguments, args, moved, strict=True):
                if before is not None and argument.alias_info is not None and argument.alias_info.is_write:
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
def emulated(emulated_library):
    """``torch.ops.fastgan_emulated``."""
    return torch.ops.fastgan_emulated


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory):
    """The path of their library."""
    if fastgan._impl.extension_error is not None:
        pytest.skip("no compiled extension in this build to compare with")
    if shutil.which(CXX) is None:
        pytest.skip(f"no C++ compiler ({CXX}) on this machine")
    with shared_folder(tmp_path_factory, "fastgan_emulated") as folder:
        return build_operators(folder)
