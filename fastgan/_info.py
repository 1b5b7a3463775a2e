"""``fastgan.info()``: versions, instruction set, what is built, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from typing import Any

import torch

from fastgan import _cuda, _impl
from fastgan._version import __version__

_OPTIONAL = {
    "transformers": "text",
    "tokenizers": "text",
    "accelerate": "text",
    "scikit-learn": "data",
    "datasets": "data",
    "bm25s": "retrieval",
    "tensorboard": "tensorboard",
}


class Info(dict[str, Any]):
    """A plain dict whose text is a table, one line a fact."""

    def __str__(self) -> str:
        rows = []
        for key, value in self.items():
            if isinstance(value, dict):
                rows += [(f"{key}: {name}", str(each)) for name, each in value.items()]
            else:
                rows.append((key, ", ".join(value) if isinstance(value, (list, tuple)) else str(value)))
        width = max(len(key) for key, _ in rows)
        return "\n".join(f"{key:<{width}}  {value}" for key, value in rows)

    __repr__ = __str__


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _operators() -> dict[str, str]:
    """The path that each operator takes on the CPU: asked of torch's dispatcher, not of a list of versions."""
    paths = {}
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        if name.startswith("fastgan::"):
            if _impl.reference_selected():
                path = "reference (selected)"
            elif torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
                path = "kernel"
            else:
                path = "reference"
            paths[name.removeprefix("fastgan::")] = path
    return paths


def info() -> Info:
    """Versions, capability, what is built and what is missing, as a dict that prints as a table.

    Keys: ``fastgan``, ``python``, ``torch``, ``cpu`` (the processor's name), ``threads`` (torch's), ``capability`` (the
    instruction set in use, or None without the extension), ``capabilities`` (those built that this machine can run),
    ``extension`` ("loaded" or why not and what to do), ``cuda`` (the device's name), ``cuda_kernels`` (whether they are
    loaded, will be built at first use, or why not), ``operators`` (the path each takes on the CPU) and ``optional``
    (version of each optional package, or how to install it).
    """
    out = Info(fastgan=__version__, python=sys.version.split()[0], torch=torch.__version__, cpu=_cpu_name())
    out["threads"] = torch.get_num_threads()
    if _impl.extension_error is None:
        from fastgan import _C

        out["capability"] = _C.capability()
        out["capabilities"] = _C.available_capabilities()
        out["extension"] = "loaded"
    else:
        out["capability"] = None
        out["capabilities"] = ()
        out["extension"] = (
            f"missing ({_impl.extension_error}); build it with `pip install . --no-build-isolation` from the sources, "
            "which needs a C++20 compiler"
        )
    out["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    out["cuda_kernels"] = _cuda.status()
    out["operators"] = _operators()
    optional = {}
    for package, extra in _OPTIONAL.items():
        try:
            optional[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            optional[package] = f"missing: pip install 'fastgan[{extra}]'"
    out["optional"] = optional
    return out
