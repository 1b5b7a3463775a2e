"""Bias and GELU as one operator: reference, schema and derivatives.

::

    output = torch.ops.fastgan.bias_gelu(input, bias, by_tanh)

With x = input + bias (over the last dimension; None: input), ``output`` is x · Φ(x), Φ the normal distribution's, or by
tanh x · (1 + tanh(√(2/π) · (x + 0.044715 x³))) / 2. The backward keeps input and bias, and sums bias's gradient on its
way. Φ(x) is taken as erfc(−x/√2) / 2, exact also where torch's 1 + erf(x/√2) is a difference of ones.

Source: Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgan.ops._autograd import define

#: elements from which on the call's own cost is less than what is gained
SMALLEST = 1 << 14


def _wide(input: Tensor, bias: Tensor | None) -> Tensor:
    x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
    return x if bias is None else x + bias.to(x.dtype)


def gelu_reference(input: Tensor, bias: Tensor | None, by_tanh: bool) -> Tensor:
    x = _wide(input, bias)
    if by_tanh:
        output = x * torch.sigmoid(math.sqrt(8 / math.pi) * x * (1 + 0.044715 * x * x))
    else:
        output = x * (0.5 * torch.erfc(x * -math.sqrt(0.5)))
    return output.to(input.dtype).contiguous()


def gelu_backward_reference(grad_output, input, bias, by_tanh, wants_bias):
    x = _wide(input, bias)
    if by_tanh:
        s = torch.sigmoid(math.sqrt(8 / math.pi) * x * (1 + 0.044715 * x * x))
        slope = s + x * s * (1 - s) * math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * x * x)
    else:
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        slope = 0.5 * torch.erfc(x * -math.sqrt(0.5)) + x * density
    grad = grad_output.to(x.dtype) * slope
    to_bias = x.new_empty(0)
    if wants_bias:
        to_bias = (grad[None] if grad.dim() == 1 else grad).flatten(0, -2).sum(0)
    return grad.to(input.dtype).contiguous(), to_bias


def _fake(input, bias, by_tanh):
    return input.new_empty(input.shape)


def _fake_backward(grad_output, input, bias, by_tanh, wants_bias):
    wide = torch.float32 if input.dtype in (torch.bfloat16, torch.float16) else input.dtype
    return input.new_empty(input.shape), input.new_empty(input.shape[-1] if wants_bias else 0, dtype=wide)


def _backward(args, saved, grads, needs):
    input, bias, by_tanh = args
    to_input, to_bias = gelu_backward(grads[0], input, bias, by_tanh, bias is not None and needs[1])
    return to_input, to_bias.to(bias.dtype) if bias is not None and needs[1] else None, None


def _jvp(args, saved, tangents):
    input, bias, by_tanh = args
    moved = [each for each in tangents[:2] if each is not None]
    direction = moved[0] if len(moved) == 1 else moved[0] + moved[1]
    direction = direction.to(input.dtype).expand(input.shape)
    return (gelu_backward(direction, input, bias, by_tanh, False)[0],)


gelu_backward = define(
    "bias_gelu_backward(Tensor grad_output, Tensor input, Tensor? bias, bool by_tanh, bool wants_bias) "
    "-> (Tensor, Tensor)",
    reference=gelu_backward_reference,
    fake=_fake_backward,
)

bias_gelu = define(
    "bias_gelu(Tensor input, Tensor? bias, bool by_tanh) -> Tensor",
    reference=gelu_reference,
    fake=_fake,
    backward=_backward,
    jvp=_jvp,
)
