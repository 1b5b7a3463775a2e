"""``fastgan.keep_memory()``: freed memory stays in the process."""

from __future__ import annotations

import ctypes
import platform

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_memory() -> bool:
    """Lets this process keep the memory that it frees, for what it allocates next. Returns whether that could be set.

    glibc gives allocations of 32 MB and more back to the system at once, and the end of its heap when that is free.
    A training step allocates the same activations again and again: each time the system then has to find, clear and
    map their pages, 4 KB at a time, which on virtual machines can take longer than the arithmetic. This turns both
    habits off (``M_MMAP_MAX`` 0 and ``M_TRIM_THRESHOLD`` -1, see mallopt(3)), for the whole process and until it ends:
    its memory stays at the highest level that it had. ``GANTrainer`` calls it when it trains on a CPU, unless it is
    told ``keep_memory=False``. Without glibc nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
