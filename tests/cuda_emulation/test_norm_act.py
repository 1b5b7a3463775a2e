"""norm_act.cu, emulated and on a GPU where there is one: judged by float64 and by the CPU kernel's own error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgan.ops import norm_act as reference
from tests.cuda_emulation.build import needs_compiler

pytestmark = [needs_compiler, pytest.mark.kernel, pytest.mark.timeout(600)]

EPS, SLOPE = 1e-5, 0.2
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _error(got, exact):
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def _no_worse(got, cpu, exact, dtype, what):
    assert got.dtype == cpu.dtype
    assert got.stride() == cpu.stride()
    ulp = torch.finfo(dtype).eps
    assert _error(got, exact) <= 1.5 * _error(cpu, exact) + 2 * ulp, (what, _error(got, exact), _error(cpu, exact))


def _case(shape, dtype, channels_last, mean=3.0):
    x = (torch.randn(shape) * 2 + mean).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = torch.randn(shape[1], dtype=parameter), torch.randn(shape[1], dtype=parameter)
    return x, torch.randn_like(x), weight, bias


def _check_training(cuda_kernels, shape, dtype, channels_last, act, groups, needs=(True, True, True), mean=3.0):
    x, dy, weight, bias = _case(shape, dtype, channels_last, mean)
    settings = (EPS, act, SLOPE, groups)
    cpu = torch.ops.fastgan.norm_act(x, weight, bias, *settings)
    got = cuda_kernels.norm_act(x, weight, bias, *settings)
    exact = reference.norm_act_reference(x.double(), weight.double(), bias.double(), *settings)
    _no_worse(got[0], cpu[0], exact[0], dtype, "output")
    for i, name in ((1, "mean"), (2, "var")):  # float64 each: a few float ulp
        torch.testing.assert_close(got[i], exact[i], rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    arguments = (x, weight, bias, cpu[1], cpu[2], *settings, list(needs))
    cpu = torch.ops.fastgan.norm_act_backward(dy, *arguments)
    got = cuda_kernels.norm_act_backward(dy, *arguments)
    # The mask is the kernels': where float64 sees the other side of the corner, the gradient is another.
    z = torch.ops.fastgan.norm_act(x, weight, bias, EPS, "none", SLOPE, groups)[0]
    wide = reference.norm_act_reference(x.double(), weight.double(), bias.double(), EPS, "none", SLOPE, groups)[0]
    if ((z.double() > 0) != (wide > 0)).any() and act != "none":
        exact = [each.double() for each in cpu]
    else:
        exact = reference.norm_act_backward_reference(
            dy.double(), x.double(), weight.double(), bias.double(), exact[1], exact[2], *settings, [True] * 3
        )
    for i, name in enumerate(("grad_input", "grad_weight", "grad_bias")):
        if needs[i]:
            _no_worse(got[i], cpu[i], exact[i], dtype, name)
        else:
            assert got[i].numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_training_in_one_launch(cuda_kernels, dtype, channels_last):
    # odd widths, whole vectors, several tiles of channels, two groups
    for shape, groups in [((4, 3, 5, 5), 2), ((2, 8, 4, 4), 1), ((6, 40, 2, 2), 3), ((2, 33, 3, 1), 1)]:
        for act in reference.ACTIVATIONS:
            _check_training(cuda_kernels, shape, dtype, channels_last, act, groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_training_in_two_launches(cuda_kernels, dtype, channels_last):
    """Channels of more items than one block takes: sums of splits, joined again by every block."""
    shapes = (
        [((2, 2, 131, 129), 1), ((4, 2, 96, 96), 2)]
        if not channels_last
        else [((2, 5, 41, 40), 1), ((4, 8, 32, 48), 2)]
    )
    for shape, groups in shapes:
        _check_training(cuda_kernels, shape, dtype, channels_last, "leaky_relu", groups)
    for needs in [(True, False, False), (False, True, True), (False, False, True)]:
        _check_training(cuda_kernels, shapes[0][0], dtype, channels_last, "relu", 1, needs)


@pytest.mark.parametrize("channels_last", [False, True])
def test_statistics_of_a_large_mean_keep_their_digits(cuda_kernels, channels_last):
    for mean in (1e4, -3e5):
        x, _, weight, bias = _case((4, 8, 12, 12), torch.float32, channels_last, mean)
        x[0, :, 0, 0] = 0.0  # the first value is far from all others
        output, got_mean, got_var = cuda_kernels.norm_act(x, weight, bias, EPS, "none", SLOPE, 1)
        wide = x.double().movedim(1, 0).reshape(8, -1)
        torch.testing.assert_close(got_mean[0], wide.mean(1), rtol=1e-7, atol=0)
        torch.testing.assert_close(got_var[0], wide.var(1, correction=0), rtol=1e-6, atol=0)
        exact = reference.norm_act_reference(x.double(), weight.double(), bias.double(), EPS, "none", SLOPE, 1)[0]
        assert _error(output, exact) < 5e-7


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_pivot_may_be_any_of_the_values(cuda_kernels, channels_last):
    """Sums are about each channel's first value: alone far from the others, beside one that is, or equal to all."""
    for shape in [(2, 4, 7, 6), (2, 4, 96, 96)]:  # one launch and two
        x, _, weight, bias = _case(shape, torch.float32, channels_last, 0.1)
        x[0, 0, 0, 0], x[1, 1, 2, 3], x[:, 2] = 1e4, -1e4, 3.3
        _, mean, var = cuda_kernels.norm_act(x, weight, bias, EPS, "none", SLOPE, 1)
        wide = x.double().movedim(1, 0).reshape(4, -1)
        torch.testing.assert_close(mean[0], wide.mean(1), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(var[0], wide.var(1, correction=0), rtol=1e-6, atol=0)
        assert var[0, 2] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_evaluation(cuda_kernels, dtype, channels_last):
    for shape in [(3, 5, 7, 3), (2, 16, 8, 8), (2, 6, 80, 64)]:
        x, dy, weight, bias = _case(shape, dtype, channels_last)
        mean, var = torch.randn(shape[1], dtype=weight.dtype) + 3, torch.rand(shape[1], dtype=weight.dtype) + 0.5
        arguments = (x, mean, var, weight, bias, EPS, "leaky_relu", SLOPE)
        wide = tuple(a.double() if isinstance(a, torch.Tensor) else a for a in arguments)
        exact = reference.norm_act_eval_reference(*wide)
        cpu, got = torch.ops.fastgan.norm_act_eval(*arguments), cuda_kernels.norm_act_eval(*arguments)
        _no_worse(got, cpu, exact, dtype, "output")
        for needs in ([True, True, True], [True, False, False], [False, True, False]):
            cpu = torch.ops.fastgan.norm_act_eval_backward(dy, *arguments, needs)
            got = cuda_kernels.norm_act_eval_backward(dy, *arguments, needs)
            for a, b, need in zip(got, cpu, needs, strict=True):
                assert a.shape == b.shape
                if need:
                    assert _error(a, b.double()) <= 16 * torch.finfo(dtype).eps


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(DTYPES),
    channels_last=st.booleans(),
    act=st.sampled_from(reference.ACTIVATIONS),
)
def test_any_small_shape(cuda_kernels, shape, dtype, channels_last, act):
    if shape[0] * shape[2] * shape[3] > 1:
        _check_training(cuda_kernels, shape, dtype, channels_last, act, 1)


def test_absent_parameters_rank_two_and_unaligned_memory(cuda_kernels):
    settings = (EPS, "relu", SLOPE, 2)
    x = torch.randn(6, 7)
    torch.testing.assert_close(
        cuda_kernels.norm_act(x, None, None, *settings), torch.ops.fastgan.norm_act(x, None, None, *settings)
    )
    x = torch.randn(4 * 8 * 16 + 1)[1:].view(4, 8, 4, 4)  # four bytes beyond a multiple of sixteen
    torch.testing.assert_close(
        cuda_kernels.norm_act(x, None, None, *settings), torch.ops.fastgan.norm_act(x, None, None, *settings)
    )


@pytest.mark.parametrize("channels_last", [False, True])
def test_nan_goes_where_it_belongs(cuda_kernels, channels_last):
    x, dy, weight, bias = _case((2, 6, 4, 4), torch.float32, channels_last)
    x[1, 2, 3, 3] = float("nan")
    for act in reference.ACTIVATIONS:
        output, mean, var = cuda_kernels.norm_act(x, weight, bias, EPS, act, SLOPE, 1)
        assert output[:, 2].isnan().all()
        assert not output[:, [0, 1, 3, 4, 5]].isnan().any()
        gradients = cuda_kernels.norm_act_backward(dy, x, weight, bias, mean, var, EPS, act, SLOPE, 1, [True] * 3)
        assert gradients[0][:, 2].isnan().all()
        assert not gradients[0][:, [0, 1, 3, 4, 5]].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_running_statistics_move_as_on_the_cpu(cuda_kernels, dtype):
    mean, var = torch.randn(2, 300, dtype=torch.float64), torch.rand(2, 300, dtype=torch.float64)
    ours, cpu = ([torch.ones(600, dtype=dtype)[::2], torch.zeros(300, dtype=dtype)] for _ in range(2))
    cuda_kernels.norm_act_move(*ours, mean, var, 0.1, 1.25)
    torch.ops.fastgan.norm_act_move(*cpu, mean, var, 0.1, 1.25)
    for a, b in zip(ours, cpu, strict=True):
        torch.testing.assert_close(a, b, rtol=torch.finfo(dtype).eps, atol=0)
