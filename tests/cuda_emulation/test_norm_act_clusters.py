"""Batch norm by clusters of blocks, which sm_90 and later have, emulated; the checks are test_norm_act's.

On a GPU that has them, the other files of this folder run these kernels.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.cuda_roofline import Recorder
from tests.cuda_emulation.build import needs_compiler
from tests.cuda_emulation.test_norm_act import EPS, SLOPE, _case, _check_training

pytestmark = [needs_compiler, pytest.mark.kernel, pytest.mark.timeout(600)]

# Shape, groups, and in float32 how many blocks a group has: a channel of planes has four or eight; a tile of channels
# of channels_last has eight and is half as wide as usual for more of them, or has eight or four.
PLANES = [((2, 2, 128, 132), 1, 8), ((4, 2, 256, 132), 2, 16), ((4, 1, 256, 132), 1, 8)]
LAST = [((4, 48, 32, 32), 1, 24), ((4, 24, 40, 28), 2, 8), ((2, 96, 25, 24), 1, 12)]


@pytest.fixture
def clusters(emulated, monkeypatch):
    """The emulated operators, on a GPU of compute capability 9.0."""
    monkeypatch.setenv("FASTGAN_EMULATED_GPU", "90")
    return emulated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_training(clusters, dtype, channels_last):
    for shape, groups, _ in LAST if channels_last else PLANES:
        _check_training(clusters, shape, dtype, channels_last, "leaky_relu", groups)


@pytest.mark.parametrize("channels_last", [False, True])
def test_double(clusters, channels_last):
    """Beside the CPU's kernel: of sums that nearly cancel either may be the better in the last digits."""
    for shape, groups, _ in LAST if channels_last else PLANES:
        x, dy, weight, bias = _case(shape, torch.float64, channels_last)
        settings = (EPS, "leaky_relu", SLOPE, groups)
        forward = [each.norm_act(x, weight, bias, *settings) for each in (clusters, torch.ops.fastgan)]
        arguments = (dy, x, weight, bias, *forward[1][1:], *settings, [True] * 3)
        backward = [each.norm_act_backward(*arguments) for each in (clusters, torch.ops.fastgan)]
        for got, expected in (forward, backward):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("channels_last", [False, True])
def test_some_gradients(clusters, channels_last):
    shape, groups, _ = (LAST if channels_last else PLANES)[1]
    for needs in [(True, False, False), (False, True, True), (False, False, True)]:
        _check_training(clusters, shape, torch.float32, channels_last, "relu", groups, needs)


@pytest.mark.parametrize("channels_last", [False, True])
def test_one_launch_of_clusters(emulated, emulated_library, monkeypatch, channels_last):
    record = Recorder(emulated_library)
    for shape, groups, blocks in LAST if channels_last else PLANES:
        x, dy, weight, bias = _case(shape, torch.float32, channels_last)
        settings = (EPS, "relu", SLOPE, groups)
        moments = torch.ones(2, groups, shape[1], dtype=torch.float64)

        def launches(of=(x, dy, weight, bias, moments, settings)):
            x, dy, weight, bias, moments, settings = of
            forward = record(lambda: emulated.norm_act(x, weight, bias, *settings))
            arguments = (dy, x, weight, bias, *moments, *settings, [True] * 3)
            return forward, record(lambda: emulated.norm_act_backward(*arguments))

        monkeypatch.setenv("FASTGAN_EMULATED_GPU", "80")
        for made in launches():
            assert [each.name for each in made] == ["sums_kernel", "prepare_kernel", "values_kernel"]
        monkeypatch.setenv("FASTGAN_EMULATED_GPU", "90")
        (forward,), (backward,) = launches()
        assert (forward.name, backward.name) == ("forward_kernel", "backward_kernel")
        # a cluster of the backward goes through the groups
        assert (forward.grid, backward.grid) == (groups * blocks, blocks)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_large_mean_keeps_its_digits(clusters, channels_last):
    shape = (LAST if channels_last else PLANES)[0][0]
    x = torch.randn(shape) - 3e5
    x[0, :, 0, 0] = 0.0
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    _, mean, var = clusters.norm_act(x, None, None, EPS, "none", SLOPE, 1)
    wide = x.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(mean[0], wide.mean(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(var[0], wide.var(1, correction=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_nan_stays_in_its_channel(clusters, channels_last):
    shape, groups, _ = (LAST if channels_last else PLANES)[1]
    x, dy, weight, bias = _case(shape, torch.float32, channels_last)
    x[-1, 1, 3, 3] = float("nan")  # in the last group
    output, mean, var = clusters.norm_act(x, weight, bias, EPS, "relu", SLOPE, groups)
    gradients = clusters.norm_act_backward(dy, x, weight, bias, mean, var, EPS, "relu", SLOPE, groups, [True] * 3)
    half = shape[0] // groups
    for each in (output, gradients[0]):
        assert each[-half:, 1].isnan().all()
        assert each.isnan().sum() == each[-half:, 1].numel()
    assert gradients[1].isnan().nonzero().tolist() == [[1]]
