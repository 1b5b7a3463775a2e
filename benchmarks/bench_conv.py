"""Convolutions of a DCGAN and of 3 x 3 networks, each pass beside torch's in both layouts, with a roofline a row.

The extra columns: GFLOP/s of the direct convolution's work; the share of the sgemm rate that the
products of the fast algorithm reach, transforms counted as time but not as work; and the bytes of the tensors themselves,
which bound the time from below where memory is slower than the products.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers import ROWS, compare, sgemm_gflops
from fastgan.ops import conv as ops

# kernel, stride, channels in and out, pixels in
LAYERS = [
    (4, 2, 64, 128, 32),
    (4, 2, 128, 256, 16),
    (4, 2, 256, 512, 8),
    (3, 1, 64, 64, 32),
    (3, 1, 128, 128, 16),
    (3, 1, 256, 256, 8),
]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
PASSES = ["forward", "input gradient", "weight gradient"]
BATCH = 64


def _calls(x, w, y, stride, kind):
    s, p, last = [stride, stride], [1, 1], ops.is_channels_last(x)
    mask = [kind == "input gradient", kind == "weight gradient", False]

    def direct():
        return torch.ops.aten.convolution_backward(y, x, w, None, s, p, [1, 1], False, [0, 0], 1, mask)

    return {
        "forward": (lambda: ops.conv(x, w, None, s, p, last), lambda: F.conv2d(x, w, None, s, p)),
        "input gradient": (lambda: ops.conv_input_gradient(y, w, None, list(x.shape[2:]), s, p, last), direct),
        "weight gradient": (lambda: ops.conv_weight_gradient(y, x, list(w.shape[2:]), s, p, last), direct),
    }[kind]


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: "-".join(map(str, layer)))
def test_layer(benchmark, layer, kind):
    kernel, stride, channels, outputs, pixels = layer
    small = pixels // stride
    shapes = (BATCH, channels, pixels, pixels), (outputs, channels, kernel, kernel), (BATCH, outputs, small, small)
    calls = {}
    for name, layout in LAYOUTS.items():
        tensors = [torch.randn(shape).contiguous(memory_format=layout) for shape in shapes]
        ours, theirs = _calls(*tensors, stride, kind)
        calls |= {"fastgan" if name == "NCHW" else f"fastgan {name}": ours, f"torch {name}": theirs}
    gflop = 2e-9 * BATCH * outputs * channels * kernel**2 * small**2
    case = f"{kernel}x{kernel}/{stride} {channels}-{outputs} @ {pixels} {kind}"
    compare(benchmark, calls, case=case, gflop=gflop, seconds=3.0)
    if benchmark.stats is None:
        return
    fewer = 16 * kernel**2 / 25 / stride**2 if kernel == 4 else 4
    seconds = ROWS[-1]["medians"]["fastgan"]
    share = gflop / fewer / seconds / sgemm_gflops()
    megabytes = sum(torch.Size(shape).numel() for shape in shapes) * 4e-6
    ROWS[-1]["case"] = f"{case} ({gflop / fewer:.2f} GFLOP, {megabytes:.0f} MB, {share:.0%} of sgemm)"
    benchmark.extra_info.update(products_gflop=gflop / fewer, megabytes=megabytes, share_of_sgemm=share)
