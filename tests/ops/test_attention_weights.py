"""The weights of attention, looked at without leaving the fused path."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastgan import nn as fnn
from fastgan.nn import attention as nn_attention
from fastgan.ops.attention import attention_weights_reference
from tests.ops.test_attention import tensors
from tests.ops.test_attention_second import in_float64

OPS = torch.ops.fastgan


def call(shape, dtype, masks, average):
    batch, heads, kv_heads, rows, columns, width = shape
    query, key, _, _ = tensors((batch, heads), rows, columns, width, dtype=dtype)
    key = key[:, :kv_heads]
    mask = bias = None
    if masks in ("bias", "all"):
        bias = torch.randn(batch, 1, rows, columns, dtype=torch.float64).to(dtype)
    if masks in ("mask", "all"):
        mask = torch.rand(1, heads, rows, columns) > 0.3
        mask[..., 0, :] = False  # a dead row
        mask[..., : columns // 3] = False  # padding, on the left
    is_causal = masks in ("causal", "all")
    _, logsumexp = OPS.attention(query, key, key, mask, bias, None, 0.0, is_causal, 0.3)
    return query, key, mask, bias, logsumexp, is_causal, 0.3, average


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masks", ["none", "causal", "mask", "bias", "all"])
@pytest.mark.parametrize("average", [True, False], ids=["averaged", "per-head"])
def test_distance_to_float64(capability, dtype, masks, average):
    for shape in ((2, 4, 2, 100, 530, 24), (1, 3, 3, 7, 5, 3)):
        args = call(shape, dtype, masks, average)
        exact, theirs = attention_weights_reference(*in_float64(args)), attention_weights_reference(*args)
        ours = OPS.attention_weights(*args)
        assert ours.dtype == dtype
        assert ours.shape == theirs.shape
        error = (ours.double() - exact).abs().max()
        slack = 4 if dtype != torch.float64 else 32  # where the judge rounds as we do
        bound = 2 * (theirs.double() - exact).abs().max() + slack * torch.finfo(dtype).eps * exact.max()
        assert error <= bound
        if masks in ("mask", "all"):
            assert not ours[..., 0, :].any()


@pytest.mark.parametrize("average", [True, False], ids=["averaged", "per-head"])
def test_derivatives(average):
    query, key, mask, bias, logsumexp, *rest = call((2, 2, 1, 3, 5, 4), torch.float64, "all", average)

    def function(q, k, b):  # with the log-sum-exp of these inputs: the kernel's weights are right for no other
        return OPS.attention_weights(q, k, mask, b, OPS.attention(q, k, k, mask, b, None, 0.0, *rest[:2])[1], *rest)

    inputs = [x.requires_grad_() for x in (query, key.contiguous(), bias)]
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)
    torch.library.opcheck(OPS.attention_weights, (inputs[0], inputs[1], mask, inputs[2], logsumexp, *rest))


@pytest.mark.parametrize("size", range(6))
@pytest.mark.parametrize("average", [True, False], ids=["averaged", "per-head"])
def test_R16_empty_in_every_dimension(size, average):
    shape = [2, 2, 2, 3, 4, 5]
    shape[size] = 0
    shape[1] = min(shape[1:3])
    args = call(shape, torch.float32, "none", average)
    torch.testing.assert_close(
        OPS.attention_weights(*args), attention_weights_reference(*args), equal_nan=True, rtol=1e-5, atol=1e-6
    )


@pytest.mark.kernel
def test_same_bits_for_every_number_of_threads(capability):
    for average in (True, False):
        args = call((2, 4, 2, 300, 270, 16), torch.float32, "all", average)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(OPS.attention_weights(*args))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.kernel
def test_the_module_never_stores_scores(monkeypatch):
    def fail(*args):
        raise AssertionError("the scores were stored")

    monkeypatch.setattr(nn_attention, "_attention_weights", fail)
    monkeypatch.setattr("fastgan.ops.attention._probabilities", fail)
    module = fnn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 6, 16, requires_grad=True)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[:, 4:] = True
    for average in (True, False):
        output, weights = module(x, x, x, padding, need_weights=True, average_attn_weights=average)
        output.sum().backward()  # the loss has no use for the weights: the backward is the kernel's
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    with pytest.raises(AssertionError, match="stored"):
        weights.square().sum().backward()


_MEMORY = """
import torch
from fastgan.nn import MultiheadAttention

def status(name):  # kilobytes
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

def run(length):
    module = MultiheadAttention(128, 16, batch_first=True)
    x = torch.randn(1, length, 128)
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
    before = status("VmRSS")
    output, weights = module(x, x, x, need_weights=True)
    return status("VmHWM") - before - weights.numel() * 4 // 1024

run(64)
print(run(2048))
"""


@pytest.mark.kernel
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_averaged_weights_do_not_need_those_of_all_heads():
    """Above the 16 MB that are returned: 256 MB by way of all heads' weights, a few for projections and tiles."""
    done = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 24 * 1024, f"{int(done.stdout) / 1024:.0f} MB above the weights"
