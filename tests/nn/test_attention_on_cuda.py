"""Which operator a call on CUDA tensors reaches, by fake tensors: no GPU is needed. What it computes is tested in
tests/cuda_emulation. (autograd's engine wants the device itself, so that only forwards are called here.)"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan import _cuda
from fastgan.nn import _attention_inputs
from fastgan.nn import functional as F

pytestmark = pytest.mark.kernel


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastgan" or "attention" in func.name():
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_cuda(monkeypatch):
    """As on a machine with a GPU and the kernels."""
    monkeypatch.setattr(_cuda, "has_kernel", lambda name: name == "attention")
    with FakeTensorMode():
        yield lambda *size, **options: torch.empty(*size, device="cuda", **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_the_kernels_take_is_the_operator(on_cuda, dtype):
    query, key = on_cuda(2, 4, 5, 64, dtype=dtype), on_cuda(2, 2, 7, 64, dtype=dtype)
    value, mask = on_cuda(2, 2, 7, 256, dtype=dtype), on_cuda(2, 1, 1, 7, dtype=torch.bool)
    with _Calls() as calls:
        output = F.scaled_dot_product_attention(query, key, value, mask, 0.1, enable_gqa=True)
    assert output.shape == (2, 4, 5, 256)
    assert calls.names == ["fastgan::attention"]


def test_half_precision_without_gradients_is_torchs_own(on_cuda):
    """FlashAttention is at its best there; where a gradient is wanted it refuses the second."""
    query = on_cuda(1, 2, 3, 64, dtype=torch.float16)
    with _Calls() as calls:
        F.scaled_dot_product_attention(query, query, query)
    assert not [name for name in calls.names if name.startswith("fastgan")]
    assert not _attention_inputs.torch_takes(query.float(), query.float(), query.float(), None, None, None)
    assert not _attention_inputs.torch_takes(query.requires_grad_(), query, query, None, None, None)


@pytest.mark.parametrize(("width", "dtype"), [(257, torch.bfloat16), (257, torch.float32), (129, torch.float64)])
def test_wider_heads_are_torchs_own(on_cuda, width, dtype):
    for q, v in [(width, 8), (8, width)]:
        query, key, value = on_cuda(1, 1, 3, q, dtype=dtype), on_cuda(1, 1, 3, q, dtype=dtype), on_cuda(1, 1, 3, v)
        with _Calls() as calls:
            output = F.scaled_dot_product_attention(query, key, value.to(dtype))
        assert output.shape == (1, 1, 3, v)
        assert not [name for name in calls.names if name.startswith("fastgan")]


def test_without_kernels_it_is_torchs_own(on_cuda, monkeypatch):
    monkeypatch.setattr(_cuda, "has_kernel", lambda name: False)
    query = on_cuda(1, 1, 3, 8)
    with _Calls() as calls:
        F.scaled_dot_product_attention(query, query, query)
    assert not [name for name in calls.names if name.startswith("fastgan")]


def test_t5s_mask_and_bias_stay_apart(on_cuda, monkeypatch):
    """Joined they would be a tensor of all the scores."""
    hf = pytest.importorskip("fastgan.hf")
    query, bias = on_cuda(2, 4, 8, 64), on_cuda(1, 4, 8, 8)
    mask = on_cuda(2, 1, 1, 8, dtype=torch.bool)
    with _Calls() as calls:
        hf._attention(query, query, query, mask, bias, 0.0, False, 1.0)
    assert calls.names == ["fastgan::attention"]
    monkeypatch.setattr(_cuda, "has_kernel", lambda name: False)
    with _Calls() as calls:
        hf._attention(query, query, query, mask, bias, 0.0, False, 1.0)
    assert "fastgan::attention" not in calls.names
