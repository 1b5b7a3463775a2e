"""fastgan: adversarial training for PyTorch, made fast.

``import fastgan`` imports torch alone; what needs transformers, matplotlib or Pillow (``fastgan.hf``,
``fastgan.training``, ``fastgan.data``, ...) is loaded when it is first named.
"""

from __future__ import annotations

import importlib
import sys

import torch  # noqa: F401  first: fastgan._C finds torch's libraries already in the process

from fastgan import _impl
from fastgan._impl import use
from fastgan._version import __version__

_impl.load_extension()

from fastgan import nn, ops  # noqa: E402  the kernels are registered first
from fastgan._info import info  # noqa: E402
from fastgan.fold import fold_norms  # noqa: E402
from fastgan.ops._output import empty_cache  # noqa: E402
from fastgan.ops.attention_precision import get_attention_precision, set_attention_precision  # noqa: E402
from fastgan.ops.conv import get_conv_algorithm, set_conv_algorithm  # noqa: E402
from fastgan.replace import explain, replace_modules  # noqa: E402

_LAZY = ("adversarial", "cli", "data", "hf", "metrics", "models", "training")

__all__ = [
    "__version__",
    "empty_cache",
    "explain",
    "fold_norms",
    "get_attention_precision",
    "get_conv_algorithm",
    "info",
    "nn",
    "ops",
    "replace_modules",
    "set_attention_precision",
    "set_conv_algorithm",
    "use",
]


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f"fastgan.{name}")
    raise AttributeError(f"module 'fastgan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_LAZY])


def _register_with_transformers() -> None:
    # attn_implementation="fastgan" then works without a second import line. A version that is too old is told about at
    # `import fastgan.hf`, not here.
    import contextlib

    with contextlib.suppress(ImportError, AttributeError):
        importlib.import_module("fastgan.hf")


if "transformers" in sys.modules:
    _register_with_transformers()
