"""Convolutions: the arithmetic is torch's own, and so are derivatives, fakes and autocast.

There is no operator here. ``fastgan.nn.functional.conv2d`` and ``conv_transpose2d`` refuse what cannot be computed and
call ``convolution`` and ``transposed_convolution``, where a kernel of ours takes the shapes that it is made for and
torch keeps the rest; the references below are what such a kernel is held to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def convolution_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> Tensor:
    """torch's convolution: input (N, C, H, W) or (C, H, W), weight (K, C / groups, R, S)."""
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def transposed_convolution_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
    groups: int,
    dilation: int | Sequence[int],
) -> Tensor:
    """torch's transposed convolution: input (N, C, H, W) or (C, H, W), weight (C, K / groups, R, S)."""
    return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)


convolution = convolution_reference
transposed_convolution = transposed_convolution_reference


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Height and width that a convolution gives."""
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


def transposed_output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Height and width that a transposed convolution gives."""
    return [
        (n - 1) * s - 2 * p + d * (k - 1) + o + 1
        for n, k, s, p, o, d in zip(size, kernel, stride, padding, output_padding, dilation, strict=True)
    ]
