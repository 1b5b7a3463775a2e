"""What all public functions have in common: meta tensors, and arguments of a wrong type refused by name."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

import fastgan
from fastgan import nn
from fastgan.nn import functional as F


def zeros(*shape, device="meta", dtype=torch.float32):
    return torch.zeros(*shape, device=device, dtype=dtype)


CALLS = {
    "scaled_dot_product_attention": {"query": (2, 2, 5, 8), "key": (2, 2, 7, 8), "value": (2, 2, 7, 8)},
    "conv2d": {"input": (2, 4, 8, 8), "weight": (6, 4, 4, 4), "stride": 2, "padding": 1},
    "conv_transpose2d": {"input": (2, 4, 8, 8), "weight": (4, 6, 4, 4), "stride": 2, "padding": 1},
    "batch_norm_act": {"input": (2, 4, 8, 8), "running_mean": (4,), "running_var": (4,), "training": True},
    "conv_bce_with_logits": {"input": (2, 4, 4, 4), "weight": (1, 4, 4, 4), "bias": (1,), "target": 1.0},
    "gan_loss_with_logits": {"logits": (2, 3), "target": 1.0},
    "linear_cross_entropy": {"input": (5, 6), "weight": (9, 6), "target": (5,)},
}
SHAPES = {
    "scaled_dot_product_attention": (2, 2, 5, 8),
    "conv2d": (2, 6, 4, 4),
    "conv_transpose2d": (2, 6, 16, 16),
    "batch_norm_act": (2, 4, 8, 8),
}


def arguments(name, device="meta"):
    def made(key, value):
        classes = key == "target" and isinstance(value, tuple)
        shape = isinstance(value, tuple)
        return zeros(*value, device=device, dtype=torch.int64 if classes else torch.float32) if shape else value

    return {key: made(key, value) for key, value in CALLS[name].items()}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("implementation", ["kernel", "reference"])
@pytest.mark.parametrize("autocast", [False, True])
def test_meta_tensors(name, implementation, autocast):
    given = arguments(name)
    leaf = next(iter(given.values())).requires_grad_()
    use = fastgan.use("reference") if implementation == "reference" else contextlib.nullcontext()
    with use, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = getattr(F, name)(**given)
        output = result[0] if isinstance(result, tuple) else result
        output.sum().backward()
    assert output.is_meta
    assert output.shape == SHAPES.get(name, ())
    assert leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("need_weights", [False, True])
def test_meta_multihead_attention(need_weights):
    attention = nn.MultiheadAttention(8, 2, batch_first=True, device="meta")
    x = zeros(2, 5, 8)
    output, weights = attention(x, x, x, need_weights=need_weights, key_padding_mask=zeros(2, 5, dtype=torch.bool))
    assert output.shape == (2, 5, 8)
    assert (weights.shape == (2, 5, 5)) if need_weights else weights is None


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_a_mask_of_multihead_attention_that_is_no_tensor(name):
    x = torch.zeros(2, 5, 8)
    with pytest.raises(TypeError, match=f"{name} must be a Tensor or None, got list"):
        nn.MultiheadAttention(8, 2)(x, x, x, **{name: [True]})


OPTIONAL = ("bias", "running_mean", "running_var")


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        (name, key, value)
        for name, given in CALLS.items()
        for key, shape in given.items()
        for value in (None, [1.0], "x")
        if isinstance(shape, tuple) and not (value is None and key in OPTIONAL)
    ],
)
def test_what_is_no_tensor_is_refused_by_name(name, argument, value):
    given = arguments(name, "cpu")
    with pytest.raises(TypeError, match=rf"{argument} must be .*ensor.*got {type(value).__name__}"):
        getattr(F, name)(**{**given, argument: value})


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("scaled_dot_product_attention", "scale", "x"),
        ("conv2d", "stride", 1.5),
        ("conv2d", "dilation", None),
        ("conv2d", "padding", 0.5),
        ("conv_transpose2d", "padding", "same"),
        ("conv_transpose2d", "output_padding", (0.5, 0)),
        ("batch_norm_act", "momentum", None),
        ("batch_norm_act", "groups", 1.5),
        ("batch_norm_act", "negative_slope", "x"),
        ("conv_bce_with_logits", "stride", "x"),
        ("conv_bce_with_logits", "label_smoothing", None),
        ("linear_cross_entropy", "label_smoothing", "x"),
        ("linear_cross_entropy", "ignore_index", 1.5),
    ],
)
def test_what_is_no_number_is_refused_by_name(name, argument, value):
    with pytest.raises(TypeError, match=f"{argument} must be"):
        getattr(F, name)(**{**arguments(name, "cpu"), argument: value})


@pytest.mark.parametrize("two", [np.int64(2), torch.tensor(2), [2], (np.int32(2), 2), torch.Size([2, 2])])
def test_what_counts_as_integers(two):
    x, w = torch.randn(1, 4, 8, 8), torch.randn(6, 4, 4, 4)
    torch.testing.assert_close(F.conv2d(x, w, stride=two), torch.nn.functional.conv2d(x, w, stride=2))
    y = torch.nn.functional.conv_transpose2d(x, w.transpose(0, 1), stride=2)
    torch.testing.assert_close(F.conv_transpose2d(x, w.transpose(0, 1), stride=two), y)
