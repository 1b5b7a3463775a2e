"""A DCGAN's convolutions. The arithmetic is torch's for now: the ratio shows what the checks around it cost."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers import compare
from fastgan.nn.functional import conv2d, conv_transpose2d

CASES = [(64, 64, 128, 32), (64, 128, 256, 16), (64, 256, 512, 8)]  # batch, channels in and out, pixels in


@pytest.mark.parametrize("transposed", [False, True], ids=["conv2d", "conv_transpose2d"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_stride_two(benchmark, case, transposed):
    batch, channels, outputs, pixels = case
    weight = torch.randn(outputs, channels, 4, 4)
    if transposed:
        x, peers = torch.randn(batch, outputs, pixels // 2, pixels // 2), (conv_transpose2d, F.conv_transpose2d)
    else:
        x, peers = torch.randn(batch, channels, pixels, pixels), (conv2d, F.conv2d)
    x = x.contiguous(memory_format=torch.channels_last)
    calls = {
        name: lambda f=f: f(x, weight, stride=2, padding=1) for name, f in zip(("fastgan", "torch"), peers, strict=True)
    }
    gflop = 2e-9 * batch * outputs * channels * 16 * (pixels // 2) ** 2
    name = "conv_transpose2d" if transposed else "conv2d"
    compare(benchmark, calls, case=f"{name} {batch} x {channels}-{outputs} @ {pixels}", gflop=gflop)
