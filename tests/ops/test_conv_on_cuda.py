"""What convolutions do on a GPU, as far as it is Python's, on the CPU: its tensors are taken for a GPU's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import fastgan
from fastgan.nn.functional import conv2d, conv_transpose2d
from fastgan.ops import conv_layer, gan_loss

pytestmark = pytest.mark.kernel

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def calls(monkeypatch):
    """How often conv_gan_loss is called; the CPU's own kernels are not."""
    made = []
    operator = gan_loss.conv_gan_loss

    def counted(*args):
        made.append(args)
        return operator(*args)

    monkeypatch.setattr(conv_layer, "_GPU", "cpu")
    monkeypatch.setattr(conv_layer, "_takes", lambda *tensors: False)
    monkeypatch.setattr(conv_layer._cuda, "has_kernel", lambda operator: True)
    monkeypatch.setattr(gan_loss, "conv_gan_loss", counted)
    return made


def _tensors(dtype, layout, biased, outputs=1, batch=3):
    x = torch.randn(batch, 6, 4, 3, dtype=dtype).to(memory_format=layout).requires_grad_()
    w = torch.randn(outputs, 6, 4, 3, dtype=dtype).to(memory_format=layout).requires_grad_()
    return x, w, torch.randn(outputs, dtype=dtype).requires_grad_() if biased else None


def _results(function, tensors, *settings):
    out = function(*tensors, *settings)
    given = [t for t in tensors if t is not None]
    return [out, *torch.autograd.grad(out, given, torch.ones_like(out) * 0.7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_one_logit_a_picture(calls, dtype, layout, biased):
    tensors = _tensors(dtype, layout, biased)
    rough = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for got, want in zip(_results(conv2d, tensors), _results(F.conv2d, tensors), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=rough, atol=rough)
    assert len(calls) == 1


def test_any_derivative_of_a_logit(calls):
    tensors = _tensors(torch.float64, torch.contiguous_format, True)
    assert gradcheck(conv2d, tensors)
    assert gradgradcheck(conv2d, tensors)
    assert calls


@pytest.mark.parametrize("biased", [False, True])
def test_autocast_lowers_a_logit_and_leaves_gradients_as_the_parameters_are(calls, biased):
    tensors = _tensors(torch.float32, torch.channels_last, biased)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = _results(conv2d, tensors), _results(F.conv2d, tensors)
    assert len(calls) == 1
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2)
    assert got[0].dtype == torch.bfloat16


def test_what_is_left_to_torch(calls, monkeypatch):
    x, w, _ = _tensors(torch.float64, torch.contiguous_format, False)
    others = [
        (x.to(memory_format=torch.channels_last), w),  # weights in another order
        (x, w, None, 1, 1),  # padding
        (x, torch.randn(2, 6, 4, 3, dtype=torch.float64)),  # two outputs
        (x, torch.randn(1, 6, 3, 3, dtype=torch.float64)),  # several logits a picture
        (x, torch.randn(1, 6, 2, 2, dtype=torch.float64), None, 1, 0, (3, 2)),  # dilated
        (x[:, :3].contiguous(), torch.randn(3, 1, 4, 3, dtype=torch.float64), None, 1, 0, 1, 3),  # groups
        (x[:0], w),
    ]
    for arguments in others:
        torch.testing.assert_close(conv2d(*arguments), F.conv2d(*arguments))
    torch.testing.assert_close(torch.vmap(lambda one: conv2d(one, w))(x[None]), F.conv2d(x, w)[None])
    torch.testing.assert_close(torch.compile(conv2d, backend="eager", fullgraph=True)(x, w), F.conv2d(x, w))
    with fastgan.use("reference"):
        conv2d(x, w)
    try:
        fastgan.set_conv_algorithm("exact")
        conv2d(x, w)
    finally:
        fastgan.set_conv_algorithm("auto")
    monkeypatch.setattr(conv_layer._cuda, "has_kernel", lambda operator: False)
    conv2d(x, w)
    assert not calls


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_a_generators_first_layer_is_a_product(calls, layout, biased, monkeypatch):
    x = torch.randn(3, 5, 1, 1).requires_grad_()
    w = torch.randn(5, 6, 4, 3).to(memory_format=layout).requires_grad_()
    tensors = (x, w, torch.randn(6).requires_grad_() if biased else None)
    want = _results(F.conv_transpose2d, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = _results(F.conv_transpose2d, tensors)
    monkeypatch.setattr(F, "conv_transpose2d", None)
    got = _results(conv_transpose2d, tensors)
    assert got[0].is_contiguous(memory_format=layout)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        got = _results(conv_transpose2d, tensors)
    for a, b in zip(got, lowered, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=3e-2, atol=5e-2)
