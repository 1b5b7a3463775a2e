"""Which implementation runs: the kernels, or the pure-PyTorch reference beside each of them.

``FASTGAN_IMPL=reference`` (read at import) or ``with fastgan.use("reference")`` selects the reference. Where the
compiled extension is missing or broken the reference runs by itself, after one warning.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Implementation = Literal["kernels", "reference"]

#: why ``fastgan._C`` could not be loaded, or None if it was
extension_error: str | None = None
_selected: Implementation = "kernels"


def _parse(name: str, where: str) -> Implementation:
    if name not in ("kernels", "reference"):
        raise ValueError(f"{where} must be 'kernels' or 'reference', got {name!r}")
    return name  # type: ignore[return-value]


def reference_selected() -> bool:
    """True if the pure-PyTorch references run instead of the kernels."""
    return _selected == "reference"


def kernels_run() -> bool:
    """True if the kernels are there and selected."""
    return extension_error is None and _selected == "kernels"


@contextmanager
def use(implementation: Implementation) -> Iterator[None]:
    """Run the enclosed code with ``"kernels"`` or with the ``"reference"`` in pure PyTorch.

    The choice is process-wide, as torch's own backend flags are. Raises ValueError for another name.
    """
    global _selected
    before, _selected = _selected, _parse(implementation, "implementation")
    try:
        yield
    finally:
        _selected = before


def load_extension() -> None:
    """Import ``fastgan._C``, which registers the CPU kernels; one warning if that fails."""
    global extension_error, _selected
    _selected = _parse(os.environ.get("FASTGAN_IMPL", "kernels"), "FASTGAN_IMPL")
    try:
        from fastgan import _C
    except ImportError as error:
        extension_error = str(error)
        if _selected != "reference":
            warnings.warn(
                f"fastgan's compiled kernels could not be loaded ({error}); the slower pure-PyTorch reference runs "
                "instead. `fastgan info` tells what is missing and how to get it.",
                RuntimeWarning,
                stacklevel=3,
            )
        return
    forced = os.environ.get("FASTGAN_CPU_CAPABILITY")
    if forced and forced != _C.capability():
        warnings.warn(
            f"FASTGAN_CPU_CAPABILITY={forced!r} is not among what this build and machine have "
            f"({', '.join(_C.available_capabilities())}); {_C.capability()!r} is used",
            RuntimeWarning,
            stacklevel=3,
        )
