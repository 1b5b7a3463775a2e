"""A linear layer on few rows: what generation does for each token, one row a sequence.

    output = torch.ops.fastgan.linear(input, weight, bias, by_depth)      input weightᵀ + bias

    input (..., K)   weight (N, K), or (K, N) with by_depth   bias (N,) or None   ->   output (..., N)

float32 or float64, at most ``MOST_ROWS`` rows. Such a product takes as long as reading the weight from memory; a
general matrix product takes up to four times that. A row's result is the same bits whatever the other rows and the
number of threads are. Derivatives come from the reference: training has more rows, and torch's product is right for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan import _impl
from fastgan.ops._autograd import define, is_plain

MOST_ROWS = 32
#: numbers of a weight from which on reading it is what a product costs: 256 KB
SMALLEST = 1 << 16


def linear_reference(input: Tensor, weight: Tensor, bias: Tensor | None, by_depth: bool) -> Tensor:
    output = input @ (weight if by_depth else weight.transpose(0, 1))
    return output if bias is None else output + bias


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, by_depth: bool) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[1 if by_depth else 0]))


linear = define(
    "linear(Tensor input, Tensor weight, Tensor? bias, bool by_depth) -> Tensor",
    reference=linear_reference,
    fake=_fake,
)


def few_rows(input: Tensor, weight: Tensor, bias: Tensor | None, by_depth: bool) -> Tensor | None:
    """The product where the kernel is faster than torch's own and nothing asks for a derivative; else None."""
    if not is_plain((input, weight, bias)) or not _impl.kernels_run():
        return None
    if type(input) is not Tensor or not input.is_cpu or not weight.is_cpu or weight.dim() != 2 or input.dim() < 1:
        return None
    depth, size = weight.shape[0 if by_depth else 1], weight.numel()
    if size < SMALLEST or input.shape[-1] != depth or not 0 < input.numel() <= MOST_ROWS * depth:
        return None
    kinds = input.dtype, weight.dtype, torch.float32 if bias is None else bias.dtype
    if kinds != (torch.float32,) * 3 or weight.stride(1) != 1 or weight.layout != torch.strided:
        return None
    if bias is not None and (bias.shape != (size // depth,) or not bias.is_cpu):
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    with torch._C._AutoDispatchBelowAutograd():
        return linear(input, weight, bias, by_depth)
