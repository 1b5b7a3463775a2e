"""The order of a picture's numbers in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(tensor: Tensor) -> bool:
    """Whether torch's convolutions would take this layout for their result.

    By strides: under vmap a tensor cannot be asked whether it is contiguous in another format.
    """
    if tensor.dim() != 4 or tensor.is_contiguous():
        return False
    expected = 1
    for dimension in (1, 3, 2, 0):
        if tensor.shape[dimension] != 1:
            if tensor.stride(dimension) != expected:
                return False
            expected *= tensor.shape[dimension]
    return True


def format_like(tensor: Tensor) -> torch.memory_format:
    """The format that keeps the layout of ``tensor``."""
    return format_of(is_channels_last(tensor))


def format_of(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format
