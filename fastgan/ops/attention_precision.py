"""How the CUDA kernels of attention multiply float32.

On tensor cores each factor is two numbers of TF32, 11 bits, and their product three (csrc/attention/
attention_cuda_tf32.h): as exact as float32's own arithmetic, whose error is measured beside it in
tests/cuda_emulation/test_attention_precision.py. Heads wider than 128 are always multiplied in float32.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fastgan import _cuda
from fastgan.ops._autograd import LIBRARY

Precision = Literal["auto", "exact", "tf32"]

#: Float32Products of csrc/attention/attention.h
EXACT, ONE_TERM, THREE_TERMS = range(3)

# `beside`, a tensor of the device, chooses the library; there is one setting, which is the process's.
LIBRARY.define("attention_products(Tensor beside, int products) -> ()")

_precision: Precision = "auto"
#: what the library has been told last; it begins with three terms
_told = THREE_TERMS


def set_attention_precision(precision: Precision) -> None:
    """Choose how attention multiplies float32 on CUDA; the CPU and other dtypes are not concerned.

    Args:
        precision: "auto" (default): tensor cores, three products of TF32 for one, with float32's error; one product
            where ``torch.backends.cuda.matmul.fp32_precision`` is "tf32", with errors of up to 2⁻¹⁰ in a factor.
            "tf32": one everywhere. "exact": fused multiply-adds of float32, slower. An infinite factor gives NaN but
            for "exact". Process-wide, as torch's own flags are; read at each call of attention, in compiled code when
            it is compiled.

    Raises:
        ValueError: another name.
    """
    global _precision
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be 'auto', 'exact' or 'tf32', got {precision!r}")
    _precision = precision


def get_attention_precision() -> Precision:
    """What ``set_attention_precision`` chose."""
    return _precision


def _wanted() -> int:
    if _precision == "exact":
        return EXACT
    if _precision == "tf32" or torch.backends.cuda.matmul.fp32_precision == "tf32":
        return ONE_TERM
    return THREE_TERMS


def has_kernel(operator: str, query: Tensor) -> bool:
    """``_cuda.has_kernel``; the library is told first what float32's products shall be."""
    if not _cuda.has_kernel(operator):
        return False
    if query.dtype == torch.float32:
        _tell()
    return True


def _tell() -> None:
    global _told
    wanted = _wanted()
    if wanted != _told:
        torch.ops.fastgan.attention_products(torch.empty(0, device="cuda"), wanted)
        _told = wanted


_tell._dynamo_marked_constant = True  # type: ignore[attr-defined]
