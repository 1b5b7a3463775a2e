"""A matrix product of bfloat16 into float32, on the tiles of a CPU that has AMX.

    torch.ops.fastgan.product_into(out, a, b, add)      out = a b, or out + a b

    a (M, K), b (K, N)   bfloat16, any strides   out (M, N)   float32 or bfloat16, rows without gaps

Products are exact and sums are float32, rounded once where ``out`` is bfloat16; numbers below the least normal one
count as 0. torch's product of bfloat16 rounds its result to bfloat16, which a loss of 50,000 classes should not have to
start from. Called by other operators, beneath autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan import _impl
from fastgan.ops._autograd import LIBRARY

LIBRARY.define("product_into(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()")
product_into = torch.ops.fastgan.product_into.default


def tiles_are_used() -> bool:
    """Whether the operator is there: AMX is, and nothing has turned it off."""
    if not _impl.kernels_run():
        return False
    from fastgan import _C

    return _C.capability() == "amx"


def tiles_multiply(*factors: Tensor) -> bool:
    """Whether the operator takes these."""
    return all(each.dtype == torch.bfloat16 and each.is_cpu for each in factors) and tiles_are_used()
