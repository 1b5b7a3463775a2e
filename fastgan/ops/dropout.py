"""Dropout whose mask is a function of two numbers, so that it is drawn in parallel, and again in the backward.

    output = torch.ops.fastgan.dropout(input, philox, p)

``output[i]`` is ``input[i] / (1 - p)`` where word i % 4 of Philox4x32-10(counter = (offset, 0, i / 4 >> 32, i / 4),
key = seed) is at least p · 2³², and 0 elsewhere, also where the input is not finite; i counts as in contiguous memory.
``philox`` = (seed, offset), int64, as for attention. The same bits whatever the number of threads.

Dropout is linear, so that every derivative is the operator itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.ops._autograd import define
from fastgan.ops.attention import dropout_threshold, philox4x32

_WORD = 0xFFFFFFFF
#: elements from which on the call's own cost, 0.1 ms with its backward, is less than what is gained
SMALLEST = 1 << 13


def dropout_reference(input: Tensor, philox: Tensor, p: float) -> Tensor:
    count = input.numel()
    index = torch.arange((count + 3) // 4, device=input.device, dtype=torch.int64)
    words = philox4x32(philox[0], philox[1] & _WORD, torch.zeros_like(index), index >> 32, index & _WORD)
    kept = torch.stack([word.expand(index.shape) for word in words], -1).reshape(-1)[:count] >= dropout_threshold(p)
    wide = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
    scaled = (wide * (1.0 / (1.0 - p))).to(input.dtype)
    return scaled.masked_fill(~kept.reshape(input.shape), 0.0).contiguous()


def _fake(input: Tensor, philox: Tensor, p: float) -> Tensor:
    return input.new_empty(input.shape)


def _backward(args, saved, grads, needs):
    _, philox, p = args
    return dropout(grads[0], philox, p) if needs[0] else None, None, None


def _jvp(args, saved, tangents):
    return (dropout(tangents[0], *args[1:]),)


dropout = define(
    "dropout(Tensor input, Tensor philox, float p) -> Tensor",
    reference=dropout_reference,
    fake=_fake,
    backward=_backward,
    jvp=_jvp,
    unsaved=(0,),
)
