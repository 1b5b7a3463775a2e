"""gan_loss.cu, emulated and on a GPU where there is one: judged by float64 and by the CPU kernel's own error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import cuda_roofline as roofline
from fastgan.ops import gan_loss as reference
from tests.cuda_emulation.build import needs_compiler

pytestmark = [needs_compiler, pytest.mark.kernel, pytest.mark.timeout(600)]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# N, C, H, W, K, kernel, stride, padding: DCGAN's last layer, several logits an image, patches, odd sizes of everything
SHAPES = [
    (5, 40, 4, 4, 1, (4, 4), (1, 1), (0, 0)),
    (2, 33, 9, 7, 1, (4, 4), (1, 1), (1, 1)),
    (2, 20, 9, 11, 3, (3, 2), (2, 3), (1, 2)),
    (2, 3, 5, 6, 4, (1, 1), (1, 1), (0, 0)),
    (9, 65, 1, 1, 2, (1, 1), (1, 1), (0, 0)),
    (2, 8, 3, 20, 1, (5, 3), (4, 1), (2, 2)),
    (0, 8, 4, 4, 1, (4, 4), (1, 1), (0, 0)),
]


def _error(got, exact):
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def _wide(arguments):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]


def _check(
    cuda_kernels, shape, dtype, channels_last, loss, reduction, *, smoothing=0.1, float32_loss=False, whole=True
):
    n, c, h, w, k, kernel, stride, padding = shape
    x = torch.randn(n, c, h, w).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(k, c, *kernel) * (c * kernel[0] * kernel[1]) ** -0.5).to(dtype)
    if channels_last and k == 1:
        weight = weight.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(k).to(dtype) if whole else None
    accumulate = reference.accumulate_dtype(dtype)
    target = torch.rand(n, 1, 1, 1, dtype=accumulate) if whole else None
    sample = torch.rand(n, k, 1, 1, dtype=accumulate) if whole else None
    positive = torch.rand(k, 1, 1, dtype=accumulate) + 0.5 if whole else None
    settings = (target, 0.9, sample, positive, loss, stride, padding, smoothing, reduction)
    arguments = (x, weight, bias, *settings, float32_loss)
    cpu, got = torch.ops.fastgan.conv_gan_loss(*arguments), cuda_kernels.conv_gan_loss(*arguments)
    exact = reference.reference(*_wide(arguments))
    ulp = torch.finfo(dtype).eps
    for a, b, want, name in zip(got, cpu, exact, ("loss", "logits"), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if want.numel() and not want.isnan().any():
            assert _error(a, want) <= 1.5 * _error(b, want) + 4 * ulp, name
        else:
            assert torch.equal(a.isnan(), b.isnan()), name
    grad_loss = torch.randn(cpu[0].shape, dtype=accumulate)
    grad_logits = torch.randn_like(cpu[1])
    backward = (grad_loss, grad_logits, x, weight, bias, cpu[1], *settings)
    # The judge of float64 is float64 as well: where the CPU adds in its order, its error is exactly 0.
    bound = 4 * ulp * (max(1, cpu[1].numel()) ** 0.5 if dtype == torch.float64 else 1)
    needs = [True, True, whole]
    cpu = torch.ops.fastgan.conv_gan_loss_backward(*backward, needs)
    got = cuda_kernels.conv_gan_loss_backward(*backward, needs)
    if loss == 1 and dtype != torch.float64:
        exact = [each.double() for each in cpu]  # a hinge's corner is where the rounded logit is
    else:
        exact = reference.backward_reference(*_wide(backward), needs)
    for a, b, want, name in zip(got, cpu, exact, ("grad_input", "grad_weight", "grad_bias"), strict=True):
        assert a.shape == b.shape
        assert a.stride() == b.stride(), name
        if want.numel():
            assert _error(a, want) <= 1.5 * _error(b, want) + bound, (name, _error(a, want), _error(b, want))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_shape_and_loss(cuda_kernels, dtype, channels_last):
    for i, shape in enumerate(SHAPES):
        _check(cuda_kernels, shape, dtype, channels_last, i % 4, i % 3)
        _check(cuda_kernels, shape, dtype, channels_last, (i + 1) % 4, (i + 1) % 3, whole=False, smoothing=0.0)
    _check(cuda_kernels, SHAPES[0], dtype, channels_last, 0, 1, float32_loss=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_taps_that_cover_the_picture(cuda_kernels, dtype, channels_last):
    """Pictures as vectors: more of them than a block has threads, and a length that does not fill the last block."""
    for i, (n, c, h, w) in enumerate([(3, 33, 4, 4), (261, 10, 4, 2), (1, 8, 1, 1), (17, 24, 3, 5)]):
        shape = (n, c, h, w, 1, (h, w), (1, 1), (0, 0))
        _check(cuda_kernels, shape, dtype, channels_last, i % 4, (i + 1) % 3)
        _check(cuda_kernels, shape, dtype, channels_last, 0, i % 3, whole=False)


def test_what_covers_the_picture_goes_by_vectors(emulated, emulated_library):
    def kernels(x, weight):
        settings = (None, 1.0, None, None, 0, (1, 1), (0, 0), 0.0, 1)
        made = roofline.Recorder(emulated_library)(lambda: emulated.conv_gan_loss(x, weight, None, *settings, False))
        return made[0].name

    x, weight = torch.zeros(2, 16, 4, 4, dtype=torch.bfloat16), torch.zeros(1, 16, 4, 4, dtype=torch.bfloat16)
    last = torch.channels_last
    assert kernels(x, weight) == "covering_logits_kernel"
    assert kernels(x.to(memory_format=last), weight.to(memory_format=last)) == "covering_logits_kernel"
    assert kernels(x.to(memory_format=last), weight) == "logits_kernel"  # in another order
    assert kernels(torch.zeros(2, 17, 4, 4, dtype=torch.bfloat16)[:, 1:], weight) == "covering_logits_kernel"
    odd = torch.zeros(2 * 16 * 16 + 1, dtype=torch.bfloat16)[1:].view(2, 16, 4, 4)
    assert kernels(odd, weight) == "logits_kernel"  # not at a multiple of 16 bytes


def test_many_logits_have_a_warp_each(cuda_kernels):
    _check(cuda_kernels, (2, 5, 68, 40, 1, (3, 3), (1, 1), (0, 0)), torch.float32, False, 0, 1)
    _check(cuda_kernels, (2, 5, 68, 40, 1, (3, 3), (1, 1), (0, 0)), torch.float32, True, 2, 1)


# Many logits a picture, J = outputs * taps <= 16 and 2 J channels or more: sums of all pixels with all taps. Pixels and
# channels of several blocks, splits of both, a stage's rest, strides and paddings, windows that no pixel fills.
PATCHES = [
    (2, 33, 9, 8, 1, (4, 4), (1, 1), (0, 0)),
    (1, 130, 8, 7, 1, (4, 4), (1, 1), (1, 1)),
    (3, 32, 5, 11, 1, (3, 4), (1, 1), (2, 0)),
    (2, 40, 9, 9, 2, (3, 2), (2, 1), (1, 2)),
    (5, 70, 6, 6, 3, (1, 1), (1, 1), (0, 0)),
    (2, 36, 13, 7, 4, (2, 2), (1, 2), (3, 1)),
    (0, 40, 8, 8, 1, (4, 4), (1, 1), (0, 0)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_many_logits_a_picture(cuda_kernels, dtype, channels_last):
    for i, shape in enumerate(PATCHES):
        _check(
            cuda_kernels, shape, dtype, channels_last, i % 3, (i + 1) % 3, whole=i % 2 == 0
        )  # sums that do not cancel


def test_more_stages_than_blocks(cuda_kernels):
    """A block goes through several stages: of channels where pixels alone fill the GPU, and of pixels."""
    for channels_last in (False, True):
        _check(cuda_kernels, (1, 66, 130, 131, 1, (1, 1), (1, 1), (0, 0)), torch.float32, channels_last, 0, 1)


def test_many_logits_of_a_view(cuda_kernels):
    """Strides that are neither layout's: every other channel of a wider tensor, and images a margin apart."""
    weight, settings = torch.randn(1, 32, 4, 4) / 20, (None, None, 1.0, None, None, 0, (1, 1), (1, 1), 0.0, 1, False)
    x = torch.randn(2, 64, 10, 9)[:, ::2, 1:, :-1]
    for got, cpu in zip(
        cuda_kernels.conv_gan_loss(x, weight, *settings), torch.ops.fastgan.conv_gan_loss(x, weight, *settings),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, cpu, rtol=1e-5, atol=1e-5)
    one, logits = torch.ones(()), torch.ops.fastgan.conv_gan_loss(x, weight, *settings)[1]
    arguments = (one, None, x, weight, None, logits, *settings[1:-1])
    for needs in ([True, True, False], [True, False, False], [False, True, False]):
        pairs = zip(
            cuda_kernels.conv_gan_loss_backward(*arguments, needs),
            torch.ops.fastgan.conv_gan_loss_backward(*arguments, needs),
            strict=True,
        )
        for got, cpu in pairs:
            torch.testing.assert_close(got, cpu, rtol=1e-5, atol=1e-6)


def test_confident_logits_lose_no_digits_and_nan_stays(cuda_kernels):
    x = torch.tensor([-200.0, -40.0, -1e-4, 0.0, 1e-4, 40.0, 200.0]).view(-1, 1, 1, 1)
    weight = torch.ones(1, 1, 1, 1)
    arguments = (None, None, 1.0, None, None, 0, (1, 1), (0, 0), 0.0, 0, False)
    got = cuda_kernels.conv_gan_loss(x, weight, *arguments)[0]
    exact = torch.nn.functional.softplus(-x.double())
    torch.testing.assert_close(got, exact.float(), rtol=3e-7, atol=0)
    x[2] = float("nan")
    got = cuda_kernels.conv_gan_loss(x, weight, *arguments)[0]
    assert got.isnan().flatten().tolist() == [False, False, True, False, False, False, False]


def test_gradients_that_nobody_wants_are_not_made(cuda_kernels):
    x, weight = torch.randn(2, 3, 4, 4), torch.randn(1, 3, 4, 4)
    loss, logits = cuda_kernels.conv_gan_loss(x, weight, None, None, 1.0, None, None, 0, (1, 1), (0, 0), 0.0, 1, False)
    for needs in ([True, False, False], [False, True, False]):
        got = cuda_kernels.conv_gan_loss_backward(
            torch.ones_like(loss),
            None,
            x,
            weight,
            None,
            logits,
            None,
            1.0,
            None,
            None,
            0,
            (1, 1),
            (0, 0),
            0.0,
            1,
            needs,
        )
        assert [each.numel() > 0 for each in got] == needs


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 35), st.integers(1, 7), st.integers(1, 7), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    loss=st.integers(0, 3),
    reduction=st.integers(0, 2),
    channels_last=st.booleans(),
)
def test_any_small_shape(cuda_kernels, sizes, kernel, stride, padding, loss, reduction, channels_last):
    n, c, h, w, k = sizes
    if kernel[0] <= h + 2 * padding[0] and kernel[1] <= w + 2 * padding[1]:
        _check(cuda_kernels, (n, c, h, w, k, kernel, stride, padding), torch.float64, channels_last, loss, reduction)
