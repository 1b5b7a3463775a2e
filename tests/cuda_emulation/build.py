"""Compiles .cu sources with the host's compiler on the emulator's headers."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
CXX = os.environ.get("CXX", "g++")

# The emulator's headers are found before those of csrc/; -fno-strict-aliasing because CUDA's vector accesses need it.
_FLAGS = [
    "-std=gnu++20", "-O1", "-Wall", "-Wextra", "-Wno-unused-function", "-Wno-unknown-pragmas", "-Wno-psabi",
    "-fno-strict-aliasing", "-ffp-contract=off", "-fno-omit-frame-pointer",
    f"-I{HERE}", f"-I{REPOSITORY / 'csrc'}", f"-I{REPOSITORY / 'tests' / 'kernel_harness'}",
]  # fmt: skip
SANITIZERS = {
    "none": [],
    "address": ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-g1", "-fsanitize=thread"],
}

#: the operators that have a .cu, by their stems
STEMS = {
    "norm_act": ["norm_act", "norm_act_backward", "norm_act_eval", "norm_act_eval_backward", "norm_act_move"],
    "gan_loss": ["conv_gan_loss", "conv_gan_loss_backward"],
    "linear_cross_entropy": [
        "linear_cross_entropy_rows",
        "linear_cross_entropy_statistics",
        "linear_cross_entropy_gradient",
    ],
    "attention": [
        "attention",
        "attention_backward",
        "attention_weights",
        "attention_jvp",
        "attention_double_backward",
        "attention_products",
        "varlen_attention",
        "varlen_attention_backward",
        "varlen_attention_jvp",
        "varlen_attention_double_backward",
    ],
}

needs_compiler = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler ({CXX}) on this machine")


def run(command: Sequence[str | Path], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)


def _compile(command: Sequence[str | Path]) -> None:
    done = run(command, timeout=560)
    if done.returncode != 0 and "cannot find -l" in done.stderr + done.stdout:
        pytest.skip(f"the compiler lacks a sanitizer's library: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-4000:]


def build(
    folder: Path,
    name: str,
    sources: Sequence[Path],
    *,
    sanitizer: str = "none",
    shared: bool = False,
    flags: Sequence[str] = (),
    libraries: Sequence[str | Path] = (),
) -> Path:
    """An executable, or a shared library, of .cu and .cpp sources and the emulator; returns its path."""
    pic = ["-fPIC"] if shared else []
    extra = [*_FLAGS, *pic]
    if sanitizer == "thread":
        # The runtime is told of fibers and barriers by hand; instrumented, the emulator's own tables would be races.
        own = ["-DEMULATOR_TSAN", "-fno-tree-loop-distribute-patterns"]
    else:
        own = SANITIZERS[sanitizer]
    emulator = folder / f"emulator_{sanitizer}_{'pic' if shared else 'exe'}.o"
    if not emulator.exists():
        _compile([CXX, *extra, *own, "-c", HERE / "emulator.cpp", "-o", emulator])
    objects = [folder / f"{name}_{sanitizer}_{i}.o" for i in range(len(sources))]
    commands = [
        [CXX, *extra, *SANITIZERS[sanitizer], *flags, "-x", "c++", "-c", source, "-o", out]
        for source, out in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compilers are processes; threads wait for them
        list(pool.map(_compile, commands))
    objects.append(emulator)
    out = folder / (f"lib{name}.so" if shared else f"{name}_{sanitizer}")
    _compile([CXX, *SANITIZERS[sanitizer], *(["-shared"] if shared else []), *objects, *libraries, "-o", out])
    return out


_definitions: list[Any] = []


def build_operators(folder: Path) -> Path:
    """``torch.ops.fastgan_emulated``: the library of the operators' files and the .cu, built once and loaded."""
    import torch

    import fastgan  # noqa: F401, which defines the operators

    library = folder / "libfastgan_emulated.so"
    torch_folder = Path(torch.__file__).parent
    csrc = REPOSITORY / "csrc"
    folders = [csrc / stem for stem in STEMS]
    sources = [p for folder in folders for p in (*sorted(folder.glob("*_op.cpp")), *sorted(folder.glob("*.cu")))]
    flags = [
        "-DFASTGAN_CUDA", "-DFASTGAN_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-isystem", str(torch_folder / "include"),
    ]  # fmt: skip
    if not library.exists():
        link = [torch_folder / "lib" / "libtorch_cpu.so"]
        library = build(folder, "fastgan_emulated", sources, shared=True, flags=flags, libraries=link)
    definitions = torch.library.Library("fastgan_emulated", "DEF")
    _definitions.append(definitions)  # an operator lives as long as its library
    for names in STEMS.values():
        for name in names:
            schema = str(getattr(torch.ops.fastgan, name).default._schema)
            definitions.define(schema.removeprefix("fastgan::"))
    torch.ops.load_library(library)
    return library
