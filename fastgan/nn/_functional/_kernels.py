"""Whether a call runs a kernel, or torch's own function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan import _cuda, _impl
from fastgan.ops._autograd import in_functorch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def has_kernel(input: Tensor, operator: str) -> bool:
    """True where ``operator`` has a kernel (or only shapes are asked for)."""
    device = input.device.type
    return device in ("cpu", "meta") or (device == "cuda" and _cuda.has_kernel(operator))


def pays_on_cpu(tensors: Sequence[Tensor], smallest: int) -> bool:
    """Of what has a kernel on the CPU alone, into which ``torch.compile`` would not see: plain tensors of one dtype,
    the first of at least ``smallest`` elements, called eagerly and outside ``torch.func``."""
    first = tensors[0]
    return (
        all(type(each) in (Tensor, torch.nn.Parameter) for each in tensors)
        and all(each.device.type == "cpu" and each.layout == torch.strided for each in tensors)
        and first.dtype in DTYPES
        and all(each.dtype == first.dtype for each in tensors)
        and first.numel() >= smallest
        and not torch.compiler.is_compiling()
        and not in_functorch()
        and _impl.kernels_run()
    )
