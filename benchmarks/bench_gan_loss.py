"""conv_bce_with_logits beside torch's conv2d and binary_cross_entropy_with_logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers import compare
from fastgan.nn.functional import conv_bce_with_logits

# name: N, C, H = W, kernel, stride, padding
SHAPES = {
    "DCGAN 64x512x4x4": (64, 512, 4, 4, 1, 0),
    "DCGAN 64x512x8x8": (64, 512, 8, 4, 1, 0),
    "PatchGAN 16x512x31x31": (16, 512, 31, 4, 1, 1),
}


def _torch(input, weight, stride, padding):
    logits = F.conv2d(input, weight, None, stride, padding)
    return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits)), logits


def _ours(input, weight, stride, padding):
    return conv_bce_with_logits(input, weight, None, 1.0, stride=stride, padding=padding)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("step", ["forward", "both", "penalty"])
@pytest.mark.parametrize("name", SHAPES)
def test_gan_loss(benchmark, name, step, layout):
    n, c, size, kernel, stride, padding = SHAPES[name]
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    input = torch.randn(n, c, size, size).contiguous(memory_format=memory_format).requires_grad_(step != "forward")
    weight = (torch.randn(1, c, kernel, kernel) * 0.02).contiguous(memory_format=memory_format).requires_grad_()

    def call(function):
        if step == "forward":
            return lambda: torch.no_grad()(function)(input, weight, stride, padding)
        wanted = (input, weight) if step == "both" else (input,)  # a penalty's first derivative wants no weight's
        return lambda: torch.autograd.grad(function(input, weight, stride, padding)[0], wanted)

    passes = {"forward": 1, "both": 3, "penalty": 2}[step]
    out = (size + 2 * padding - kernel) // stride + 1
    gflop = 2e-9 * passes * n * c * kernel**2 * out**2
    compare(benchmark, {"fastgan": call(_ours), "torch": call(_torch)}, case=f"{name} {layout} {step}", gflop=gflop)
