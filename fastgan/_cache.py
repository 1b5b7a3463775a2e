"""Where what took long to make is kept: decoded pictures, data sets of the hub, CUDA kernels that were built."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """``FASTGAN_CACHE``, else ``fastgan`` in ``XDG_CACHE_HOME`` or ``~/.cache``; None for a user without a home."""
    given = os.environ.get("FASTGAN_CACHE")
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        if given:
            return Path(given).expanduser()
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fastgan"
    except RuntimeError:
        return None
