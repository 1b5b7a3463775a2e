"""Memory for the results of operators that are written in Python; see csrc/common/pool.h."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan import _impl
from fastgan.ops._autograd import LIBRARY

LIBRARY.define("new_output(Tensor beside, int[] size, *, ScalarType? dtype=None, bool channels_last=False) -> Tensor")
LARGE = 2**20  # bytes, from which on the pool serves; below, torch is quicker


def new_output(
    beside: Tensor, size: Sequence[int], *, dtype: torch.dtype | None = None, channels_last: bool = False
) -> Tensor:
    """Uninitialised, on the device and of the dtype of ``beside`` unless another is given; large ones on the CPU in the
    pool's memory."""
    dtype = beside.dtype if dtype is None else dtype
    is_pooled = beside.device.type == "cpu" and math.prod(size) * dtype.itemsize >= LARGE
    if not is_pooled or _impl.extension_error is not None:
        format = torch.channels_last if channels_last else torch.contiguous_format
        return torch.empty(size, dtype=dtype, device=beside.device, memory_format=format)
    return torch.ops.fastgan.new_output(beside, size, dtype=dtype, channels_last=channels_last)


def empty_cache() -> None:
    """Gives the memory that fastgan keeps for coming results on the CPU back to the system.

    Results of 1 MB and more are made in memory kept from call to call, less whatever went unused for 512 results.
    Tensors in use are not touched, nor the rest of the pages (2 MB) that they lie in.
    """
    if _impl.extension_error is None:
        from fastgan import _C

        _C.empty_pool()
