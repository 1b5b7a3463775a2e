"""Batch norm and leaky ReLU in one pass against torch's two functions, on a DCGAN's shapes in both layouts.

One shape is also a row with a bound: a training pass, ours and torch's each in the faster of its layouts.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers import compare, fastest
from fastgan.nn.functional import batch_norm_act

SHAPES = [(64, 64, 32, 32), (64, 128, 16, 16), (64, 256, 8, 8), (64, 512, 4, 4)]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("kind", ["forward", "forward+backward", "evaluation"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_leaky_relu(benchmark, shape, layout, kind):
    channels = shape[1]
    x, grad = (torch.randn(shape).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    weight, bias = torch.ones(channels), torch.zeros(channels)
    running = torch.zeros(channels), torch.ones(channels)
    training = kind != "evaluation"

    def ours():
        return batch_norm_act(x, *running, weight, bias, training, act="leaky_relu", negative_slope=0.2)

    def theirs():
        return F.leaky_relu(F.batch_norm(x, *running, weight, bias, training), 0.2)

    calls = {"fastgan": ours, "torch": theirs}
    if kind == "forward+backward":
        leaves = tuple(t.requires_grad_() for t in (x, weight, bias))
        calls = {name: lambda call=call: torch.autograd.grad(call(), leaves, grad) for name, call in calls.items()}
    compare(benchmark, calls, case=f"{'x'.join(map(str, shape))} {layout} {kind}")


def test_batch_norm_leaky_relu_in_the_better_layout(benchmark):
    channels = 128
    weight, bias = torch.ones(channels, requires_grad=True), torch.zeros(channels, requires_grad=True)
    running = torch.zeros(channels), torch.ones(channels)

    def ours(x):
        return batch_norm_act(x, *running, weight, bias, True, act="leaky_relu", negative_slope=0.2)

    def theirs(x):
        return F.leaky_relu(F.batch_norm(x, *running, weight, bias, True), 0.2)

    def trained(function, layout):
        x, grad = (torch.randn(64, channels, 16, 16).contiguous(memory_format=layout) for _ in range(2))
        leaves = x.requires_grad_(), weight, bias
        return lambda: torch.autograd.grad(function(x), leaves, grad)

    calls = {
        name: fastest([trained(function, layout) for layout in LAYOUTS.values()])
        for name, function in (("fastgan", ours), ("torch", theirs))
    }
    compare(benchmark, calls, case="64x128x16x16 better layout forward+backward", must=1.7, goal=2.0)
