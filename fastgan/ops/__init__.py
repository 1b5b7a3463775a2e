"""The operators, one file a kernel: schema, fake kernel, derivatives and a reference in pure PyTorch.

Importing this package registers all of them as ``torch.ops.fastgan.*``. The public functions are in
``fastgan.nn.functional``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from fastgan import _version


def _tag_compile_caches() -> None:
    # torch.compile's caches on disk do not know the Python formulas of these files: after a change the old gradient
    # came back. Their hash becomes part of the key.
    digest = hashlib.sha256(_version.__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    tag = f"fastgan-{digest.hexdigest()[:16]}"
    config = torch.compiler.config
    if tag not in config.cache_key_tag:
        config.cache_key_tag += tag


_tag_compile_caches()

from fastgan.ops import attention, attention_varlen, conv, fused_attention  # noqa: E402, F401  importing them registers their operators
