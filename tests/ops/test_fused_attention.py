"""PyTorch's attention with a second derivative of ours: by the CPU's kernel, which has the same two results.

Of the GPU's two kernels the calls are made on fake tensors; what these compute is compared there, before they are used.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgan import _impl
from fastgan.nn import _attention_inputs
from fastgan.nn import functional as F
from fastgan.ops import fused_attention as ops
from tests.nn.test_attention_on_cuda import _Calls

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(_impl.reference_selected(), reason="the reference is selected"),
    pytest.mark.skipif(_impl.extension_error is not None, reason="no compiled extension in this build"),
]

FLASH = ops.SDPBackend.FLASH_ATTENTION.value
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def _cpu_forward(query, key, value, is_causal, scale):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)


def _cpu_backward(grad, query, key, value, output, logsumexp, is_causal, scale):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, output, logsumexp, 0.0, is_causal, scale=scale,
    )  # fmt: skip


@pytest.fixture
def theirs(monkeypatch):
    """The CPU's kernel among ``KERNELS``; the calls that reach it."""
    calls = []

    def noted(name, function):
        return lambda *args: calls.append(name) or function(*args)

    kernel = ops.Kernel("the CPU's", noted("forward", _cpu_forward), noted("backward", _cpu_backward))
    monkeypatch.setitem(ops.KERNELS, ("cpu", FLASH), kernel)
    monkeypatch.setattr(ops, "_trusted", {})
    return calls


def _tensors(dtype, count=3, rows=37, width=16, inside=True, **options):
    made = [torch.randn(2, *((rows, 3) if inside else (3, rows)), width, dtype=dtype) for _ in range(count)]
    made = [each.transpose(1, 2) if inside else each for each in made]
    return [each.requires_grad_(**options) if options else each for each in made]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("inside", [True, False])
def test_results_and_layouts_are_attentions_own(theirs, dtype, is_causal, inside):
    query, key, value, grad = _tensors(dtype, 4, inside=inside)
    got = torch.ops.fastgan.fused_attention(query, key, value, is_causal, 0.2)
    gradients = torch.ops.fastgan.fused_attention_backward(grad, query, key, value, *got, is_causal, 0.2)
    assert theirs[-2:] == ["forward", "backward"]
    rest = (0.0, is_causal, 0.2)
    expected = torch.ops.fastgan.attention(query, key, value, None, None, None, *rest)
    own = torch.ops.fastgan.attention_backward(grad, query, key, value, None, None, None, *expected, *rest, False)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for one, other in zip((*got, *gradients), (*expected, *own[:3]), strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other, **tolerance)


def test_each_kernel_goes_on_where_the_other_stopped(theirs, monkeypatch):
    """The forward's choice need not be the backward's."""
    query, key, value, grad = _tensors(torch.float64, 4)
    whole = torch.ops.fastgan.fused_attention(query, key, value, True, 0.2)
    monkeypatch.setattr(ops, "KERNELS", {})
    ours = torch.ops.fastgan.fused_attention_backward(grad, query, key, value, *whole, True, 0.2)
    forward = torch.ops.fastgan.fused_attention(query, key, value, True, 0.2)
    monkeypatch.undo()
    monkeypatch.setitem(ops.KERNELS, ("cpu", FLASH), ops.Kernel("the CPU's", _cpu_forward, _cpu_backward))
    theirs_ = torch.ops.fastgan.fused_attention_backward(grad, query, key, value, *forward, True, 0.2)
    for one, other in zip(ours, theirs_, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("is_causal", [False, True])
def test_both_derivatives_by_finite_differences(theirs, is_causal):
    tensors = _tensors(torch.float64, rows=5, width=8, requires_grad=True)

    def attention(query, key, value):
        return torch.ops.fastgan.fused_attention(query, key, value, is_causal, 0.3)[0]

    assert torch.autograd.gradcheck(attention, tensors)
    assert torch.autograd.gradgradcheck(attention, tensors)
    assert "backward" in theirs


@pytest.mark.parametrize("inside", [True, False])
def test_opcheck_and_compile(theirs, inside):
    tensors = _tensors(torch.float32, inside=inside, requires_grad=True)
    torch.library.opcheck(torch.ops.fastgan.fused_attention.default, (*tensors, True, 0.3))
    grad, query, key, value = _tensors(torch.float32, 4, inside=inside)
    saved = torch.ops.fastgan.fused_attention(query, key, value, False, 0.3)
    arguments = (grad, query, key, value, *saved, False, 0.3)
    torch.library.opcheck(torch.ops.fastgan.fused_attention_backward.default, arguments)

    def loss(query, key, value):
        return torch.ops.fastgan.fused_attention(query, key, value, True, 0.3)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*tensors), tensors)
    torch.testing.assert_close(torch.autograd.grad(compiled(*tensors), tensors), expected)


@pytest.mark.parametrize("fault", ["logsumexp in base 2", "a gradient", "raises"])
def test_a_kernel_that_does_not_agree_is_not_used_and_that_is_said_once(theirs, monkeypatch, fault):
    def forward(*args):
        if fault == "raises":
            raise RuntimeError("no engine\nmore lines")
        output, logsumexp = _cpu_forward(*args)
        return output, logsumexp / 0.6931 if fault == "logsumexp in base 2" else logsumexp

    def backward(*args):
        gradients = _cpu_backward(*args)
        return (gradients[0] * 1.05, *gradients[1:]) if fault == "a gradient" else gradients

    monkeypatch.setitem(ops.KERNELS, ("cpu", FLASH), ops.Kernel("wrong", forward, backward))
    query, key, value = _tensors(torch.float32)
    expected = torch.ops.fastgan.attention(query, key, value, None, None, None, 0.0, False, 0.2)
    reason = "no engine$" if fault == "raises" else "its results are off by 0"
    with pytest.warns(RuntimeWarning, match=f"attention does not use wrong, which is faster: {reason}"):
        got = torch.ops.fastgan.fused_attention(query, key, value, False, 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = torch.ops.fastgan.fused_attention(query, key, value, False, 0.2)
    for one in (got, again):
        assert torch.equal(one[0], expected[0])
        assert torch.equal(one[1], expected[1])


def test_it_is_tried_once_for_a_dtype_a_width_and_causality(theirs):
    for dtype, width, is_causal in [(torch.float32, 16, False), (torch.float32, 8, False), (torch.float32, 16, True)]:
        for rows in (5, 37):
            query, key, value = _tensors(dtype, rows=rows, width=width)
            torch.ops.fastgan.fused_attention(query, key, value, is_causal, 0.2)
    assert len(theirs) == 3 * (2 + 2)  # a trial, forward and backward, and two calls


# ---- on a GPU, by fake tensors ----


@pytest.fixture
def on_cuda(monkeypatch):
    monkeypatch.setattr("fastgan._cuda.has_kernel", lambda name: True)
    with FakeTensorMode():
        yield lambda *size, **options: torch.empty(*size, device="cuda", **{"dtype": torch.bfloat16, **options})


@pytest.mark.parametrize("backend", [ops.SDPBackend.FLASH_ATTENTION, ops.SDPBackend.CUDNN_ATTENTION])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_gpus_kernels_take_these_calls(on_cuda, backend, is_causal):
    kernel = ops.KERNELS["cuda", backend.value]
    query, grad = (on_cuda(2, 33, 4, 64).transpose(1, 2) for _ in range(2))
    key, value = (on_cuda(2, 40, 4, 64).transpose(1, 2) for _ in range(2))
    output, logsumexp = kernel.forward(query, key, value, is_causal, 0.1)
    assert output.shape == query.shape
    assert (logsumexp.shape, logsumexp.dtype) == (query.shape[:3], torch.float32)
    gradients = kernel.backward(grad, query, key, value, output, logsumexp, is_causal, 0.1)
    assert [each.shape for each in gradients] == [query.shape, key.shape, value.shape]


def test_a_call_that_wants_gradients_reaches_it(on_cuda, monkeypatch):
    monkeypatch.setattr(_attention_inputs, "_gradients_wanted", lambda *_: True)  # autograd's engine wants a device
    query, key, value = (on_cuda(2, 4, 33, 64) for _ in range(3))
    with _Calls() as calls:
        F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert calls.names == ["fastgan::fused_attention"]
    with _Calls() as calls:
        F.scaled_dot_product_attention(query, key, value, torch.ones(33, 33, dtype=torch.bool, device="cuda"))
        F.scaled_dot_product_attention(query, key, value, dropout_p=0.1)
        F.scaled_dot_product_attention(query.float(), key.float(), value.float())
        F.scaled_dot_product_attention(query, *(on_cuda(2, 2, 33, 64) for _ in range(2)), enable_gqa=True)
        F.scaled_dot_product_attention(*(on_cuda(2, 4, 33, 20) for _ in range(3)))
        F.scaled_dot_product_attention(query, key, on_cuda(2, 4, 33, 32))
    assert [name for name in calls.names if name.startswith("fastgan")] == ["fastgan::attention"] * 6


def test_determinism_and_transformed_calls_keep_ours(on_cuda, monkeypatch):
    arguments = [on_cuda(2, 4, 33, 64) for _ in range(3)] + [None] * 3
    assert not _attention_inputs.fused_takes(*arguments)
    monkeypatch.setattr(_attention_inputs, "_gradients_wanted", lambda *_: True)
    assert _attention_inputs.fused_takes(*arguments)
    torch.use_deterministic_algorithms(True)
    try:
        assert not _attention_inputs.fused_takes(*arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.autograd.forward_ad.dual_level():
        assert not _attention_inputs.fused_takes(*arguments)


def test_nothing_is_compared_while_a_stream_records(theirs, monkeypatch):
    monkeypatch.setitem(ops.KERNELS, ("cuda", FLASH), ops.KERNELS["cpu", FLASH])
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: FLASH)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():
        query = torch.empty(1, 1, 4, 8, device="cuda")
        assert ops._kernel_for(query, query, query, False, 0.3) is None
    assert ops._trusted == {}
