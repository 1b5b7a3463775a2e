"""Convolutions of a DCGAN and of 3 x 3 networks, each pass beside torch's in the faster of its two layouts.

    make bench PYTEST_ARGS="benchmarks/bench_conv.py"

Ours is given channels_last, as in GANTrainer. GFLOP/s and "share" (of the rate of a float32 matrix product of 1,024³ in
the same rounds) count the products of the algorithm that runs; Winograd's transforms are time, not work. The megabytes
are those of the tensors themselves, which bound the time from below where memory is slower than the products.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers import compare, fastest
from fastgan.ops import conv as ops

# kernel, stride, channels in and out, pixels in
STRIDED = [(4, 2, 64, 128, 32), (4, 2, 128, 256, 16), (4, 2, 256, 512, 8)]
FEW = [(4, 2, 3, 64, 64), (4, 2, 1, 32, 32), (3, 1, 3, 64, 32), (3, 1, 64, 3, 32)]
PLAIN = [(3, 1, 64, 64, 32), (3, 1, 128, 128, 16), (3, 1, 256, 256, 8), (3, 1, 256, 256, 16), (3, 1, 512, 512, 8)]
PASSES = ["forward", "input gradient", "weight gradient"]
BATCH = 64
SGEMM_GFLOP = 2 * 1024**3 / 1e9


def _calls(shapes, layout, stride, kind):
    x, w, y = (torch.randn(shape).contiguous(memory_format=layout) for shape in shapes)
    s, p, last = [stride, stride], [1, 1], layout == torch.channels_last
    mask = [kind == "input gradient", kind == "weight gradient", False]

    def direct():
        return torch.ops.aten.convolution_backward(y, x, w, None, s, p, [1, 1], False, [0, 0], 1, mask)

    return {
        "forward": (lambda: ops.conv(x, w, None, s, p, last), lambda: F.conv2d(x, w, None, s, p)),
        "input gradient": (lambda: ops.conv_input_gradient(y, w, None, list(x.shape[2:]), s, p, last), direct),
        "weight gradient": (lambda: ops.conv_weight_gradient(y, x, list(w.shape[2:]), s, p, last), direct),
    }[kind]


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("layer", STRIDED + FEW + PLAIN, ids=lambda layer: "-".join(map(str, layer)))
def test_layer(benchmark, layer, kind):
    kernel, stride, channels, outputs, pixels = layer
    small = pixels // stride
    shapes = (BATCH, channels, pixels, pixels), (outputs, channels, kernel, kernel), (BATCH, outputs, small, small)
    ours, _ = _calls(shapes, torch.channels_last, stride, kind)
    layouts = (torch.channels_last, torch.contiguous_format)
    theirs = fastest([_calls(shapes, layout, stride, kind)[1] for layout in layouts])
    a, b = torch.randn(2, 1024, 1024)
    fewer = 1 if layer in FEW else 2.56 if kernel == 4 else 4
    megabytes = sum(torch.Size(shape).numel() for shape in shapes) * 4e-6
    must, goal = {4: (1.8, 2.5), 3: (1.5, 2.2)}[kernel] if layer not in FEW else (1.0, 1.5)
    compare(
        benchmark,
        {"fastgan": ours, "torch": theirs, "sgemm": lambda: torch.mm(a, b)},
        case=f"{kernel}x{kernel}/{stride} {channels}-{outputs} @ {pixels} {kind}, {megabytes:.0f} MB",
        gflop=2e-9 * BATCH * outputs * channels * kernel**2 * small**2 / fewer,
        seconds=1.5,
        must=must,
        goal=goal,
        yardstick=("sgemm", SGEMM_GFLOP, float("inf")),
    )
