"""CUDA's kernels as operators on the CPU's tensors: ``torch.ops.fastgan_emulated``, built once for a run of tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastgan
from tests.cuda_emulation.build import CXX, REPOSITORY, build

STEMS = {
    "norm_act": ["norm_act", "norm_act_backward", "norm_act_eval", "norm_act_eval_backward", "norm_act_move"],
    "gan_loss": ["conv_gan_loss", "conv_gan_loss_backward"],
}
_library: list[torch.library.Library] = []


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """``torch.ops.fastgan_emulated``: the operators' own checks, and the .cu kernels run by the emulator."""
    if fastgan._impl.extension_error is not None:
        pytest.skip("no compiled extension in this build to compare with")
    import shutil

    if shutil.which(CXX) is None:
        pytest.skip(f"no C++ compiler ({CXX}) on this machine")
    torch_folder = Path(torch.__file__).parent
    csrc = REPOSITORY / "csrc"
    sources = [csrc / stem / f"{stem}{end}" for stem in STEMS for end in ("_op.cpp", ".cu")]
    flags = [
        "-DFASTGAN_CUDA", "-DFASTGAN_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-isystem", str(torch_folder / "include"),
    ]  # fmt: skip
    library = build(
        tmp_path_factory.mktemp("emulated"), "fastgan_emulated", sources, shared=True, flags=flags,
        libraries=[torch_folder / "lib" / "libtorch_cpu.so"],
    )  # fmt: skip
    definitions = torch.library.Library("fastgan_emulated", "DEF")
    _library.append(definitions)  # an operator lives as long as its library
    for names in STEMS.values():
        for name in names:
            schema = str(getattr(torch.ops.fastgan, name).default._schema)
            definitions.define(schema.removeprefix("fastgan::"))
    torch.ops.load_library(library)
    return torch.ops.fastgan_emulated
