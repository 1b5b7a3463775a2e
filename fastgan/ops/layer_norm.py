"""Dropout, residual and layer norm as one operator: reference, schema and derivatives.

::

    sum    = residual + dropout(input, philox, p)        as fastgan::dropout draws it; philox None: no dropout
    output = (sum - mean) * rstd * weight + bias         over the last dimension; rstd = 1 / sqrt(biased variance + eps)

    output, sum, mean, rstd = torch.ops.fastgan.dropout_add_layer_norm(input, residual, weight, bias, philox, p, eps)

What a Transformer does around each of its layers: ``output`` feeds the next layer where the norm comes last (BERT),
``sum`` is what goes on beside it where the norm comes first (GPT-2). Both have gradients; the statistics, float64 and
of input's shape without its last dimension, have none. The backward keeps ``sum`` alone, neither input nor a mask.

Source: Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.ops._autograd import define
from fastgan.ops.dropout import dropout, dropout_reference

#: elements from which on the call's own cost is less than what is gained
SMALLEST = 1 << 13


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _statistics(sum: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    exact = sum.double()
    mean = exact.mean(-1)
    # The variance about the mean once more, so that its own rounding costs nothing.
    return mean, torch.rsqrt((exact - mean[..., None]).square().mean(-1) + eps)


def _normalised(sum: Tensor, eps: float) -> Tensor:
    mean, rstd = _statistics(sum, eps)
    return ((sum.double() - mean[..., None]) * rstd[..., None]).to(_wide(sum.dtype))


def layer_norm_reference(input, residual, weight, bias, philox, p, eps):
    dropped = input if philox is None else dropout_reference(input, philox, p)
    if input.dtype in (torch.bfloat16, torch.float16) and philox is not None:
        kept = dropout_reference(torch.ones_like(input, dtype=torch.float32), philox, p)
        dropped = input.float() * kept
        dropped = dropped.masked_fill(kept == 0, 0.0)
    sum = (residual.to(dropped.dtype) + dropped).to(input.dtype).contiguous()
    mean, rstd = _statistics(sum, eps)
    wide = _wide(input.dtype)
    output = _normalised(sum, eps) * weight.to(wide) + bias.to(wide)
    return output.to(input.dtype).contiguous(), sum, mean.detach(), rstd.detach()


def layer_norm_backward_reference(grad_output, grad_sum, sum, mean, rstd, weight, philox, p, eps, parameters):
    wide = _wide(sum.dtype)
    z, rstd = _normalised(sum, eps), _statistics(sum, eps)[1].to(wide)[..., None]
    grad = grad_output.to(wide)
    scaled = grad * weight.to(wide)
    along = scaled - scaled.mean(-1, keepdim=True) - z * (scaled * z).mean(-1, keepdim=True)
    residual = along * rstd
    if grad_sum is not None:
        residual = residual + grad_sum.to(wide)
    residual = residual.to(sum.dtype).contiguous()
    nothing = sum.new_empty(0)
    input = nothing if philox is None else dropout_reference(residual, philox, p)
    if not parameters:
        return residual, input, sum.new_empty(0, dtype=wide), sum.new_empty(0, dtype=wide)
    to_weight, to_bias = ((each[None] if each.dim() == 1 else each).flatten(0, -2).sum(0) for each in (grad * z, grad))
    return residual, input, to_weight, to_bias


def _fake(input, residual, weight, bias, philox, p, eps):
    shape = input.shape[:-1]
    return (input.new_empty(input.shape), input.new_empty(input.shape),
            input.new_empty(shape, dtype=torch.float64), input.new_empty(shape, dtype=torch.float64))  # fmt: skip


def _fake_backward(grad_output, grad_sum, sum, mean, rstd, weight, philox, p, eps, parameters):
    count = sum.shape[-1] if parameters else 0
    vectors = [sum.new_empty(count, dtype=_wide(sum.dtype)) for _ in range(2)]
    return sum.new_empty(sum.shape), sum.new_empty(sum.shape if philox is not None else 0), *vectors


def _backward(args, saved, grads, needs):
    _, _, weight, _, philox, p, eps = args
    grad_output, grad_sum = grads[:2]
    if grad_output is None:
        dropped = grad_sum if philox is None or not needs[0] else dropout(grad_sum, philox, p)
        return dropped, grad_sum, None, None, None, None, None
    residual, input, *vectors = layer_norm_backward(
        grad_output, grad_sum, *saved, weight, philox, p, eps, needs[2] or needs[3]
    )
    to_weight, to_bias = [vector.to(weight.dtype) if needs[2 + i] else None for i, vector in enumerate(vectors)]
    return (residual if philox is None else input) if needs[0] else None, residual, to_weight, to_bias, None, None, None


def _jvp(args, saved, tangents):
    _, _, weight, _, philox, p, eps = args
    sum = saved[0]
    to_input, to_residual, to_weight, to_bias = tangents[:4]
    if to_input is not None and philox is not None:
        to_input = dropout(to_input, philox, p)
    moved = [each for each in (to_input, to_residual) if each is not None]
    to_sum = moved[0] + moved[1] if len(moved) == 2 else moved[0] if moved else torch.zeros_like(sum)
    wide = _wide(sum.dtype)
    z, rstd = _normalised(sum, eps), _statistics(sum, eps)[1].to(wide)[..., None]
    along = to_sum.to(wide)
    along = (along - along.mean(-1, keepdim=True) - z * (along * z).mean(-1, keepdim=True)) * rstd
    to_output = along * weight.to(wide)
    if to_weight is not None:
        to_output = to_output + z * to_weight.to(wide)
    if to_bias is not None:
        to_output = to_output + to_bias.to(wide)
    return to_output.to(sum.dtype).contiguous(), to_sum.contiguous(), None, None


layer_norm_backward = define(
    "dropout_add_layer_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor sum, Tensor mean, Tensor rstd, "
    "Tensor weight, Tensor? philox, float p, float eps, bool parameters) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=layer_norm_backward_reference,
    fake=_fake_backward,
)

dropout_add_layer_norm = define(
    "dropout_add_layer_norm(Tensor input, Tensor residual, Tensor weight, Tensor bias, Tensor? philox, float p, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=layer_norm_reference,
    fake=_fake,
    backward=_backward,
    jvp=_jvp,
    save_outputs=(1, 2, 3),
    unsaved=(0, 1, 3),
    nondifferentiable_outputs=(2, 3),
)
