"""Batch norm with an activation, and what stands around a Transformer's layers."""

from __future__ import annotations

import torch
import torch.nn.functional as _F
from torch import Tensor

from fastgan import _impl
from fastgan.nn._functional._kernels import DTYPES, has_kernel, pays_on_cpu
from fastgan.nn._functional.layers import dropout
from fastgan.nn._inputs import check_tensors, number
from fastgan.ops import layer_norm as _layer_norm
from fastgan.ops import norm_act as _norm_act
from fastgan.ops.attention import draw_philox

# ---- norm_act ----


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "none",
    negative_slope: float = 0.01,
    groups: int = 1,
) -> Tensor:
    """Batch norm and activation in one pass: ``act(torch.nn.functional.batch_norm(input, ...))``.

    Args:
        input: (N, C, ...), any rank >= 2 and any strides; float32, float64, bfloat16 or float16.
        running_mean, running_var: (C,), both or neither; training moves them in place (the unbiased variance), and
            evaluation normalises by them.
        weight, bias: (C,) or None. These four have input's dtype, or are all float32 beside a half-precision input.
        training: normalise by the batch's own statistics.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance; positive, or zero in evaluation.
        act: "none", "relu" or "leaky_relu", with ``negative_slope`` for the last.
        groups: in training, cuts the batch into so many equal parts with statistics of their own: a batch of real and
            fake (``groups=2``) equals two calls, the running statistics moving for the first half, then for the second.

    Returns:
        Of input's shape and dtype; channels_last if input is, contiguous otherwise.

    Raises:
        ValueError: one value a channel in training, eps out of range, an unknown act, groups that do not divide the
            batch, or one of the running statistics without the other.
        RuntimeError: sizes, dtypes or devices that do not fit.
        TypeError: an argument of another type.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    optional = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    check_tensors(*optional, input=input, **optional)
    momentum, eps = number(momentum, "momentum"), number(eps, "eps")
    negative_slope = number(negative_slope, "negative_slope")
    if input.dim() != 1 or input.shape[0] > 0:  # torch lets an empty vector through
        _check_batch_norm(input, running_mean, running_var, weight, bias, training, eps, act, groups)
    groups = groups if training else 1
    if not has_kernel(input, "norm_act") or input.dtype not in DTYPES or input.dim() < 2:
        return _composed_batch_norm_act(
            input, running_mean, running_var, weight, bias, training, momentum, eps, act, negative_slope, groups
        )
    reference = _impl.reference_selected()
    if not training:
        evaluate = _norm_act.norm_act_eval_reference if reference else _norm_act.norm_act_eval
        assert running_mean is not None
        assert running_var is not None
        return evaluate(input, running_mean.detach(), running_var.detach(), weight, bias, eps, act, negative_slope)
    train = _norm_act.norm_act_reference if reference else _norm_act.norm_act
    output, mean, var = train(input, weight, bias, eps, act, negative_slope, groups)
    if running_mean is not None and running_var is not None and input.numel() > 0:
        count = input.numel() // (input.shape[1] * groups)
        move = _norm_act.move_reference if reference else _norm_act.move_running_statistics
        move(running_mean, running_var, mean, var, momentum, count / (count - 1))
    return output


def _composed_batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    act: str,
    negative_slope: float,
    groups: int,
) -> Tensor:
    """torch's own functions, for what the operators do not take."""
    parts = [
        _F.batch_norm(part, running_mean, running_var, weight, bias, training, momentum, eps)
        for part in input.chunk(groups)
    ]
    output = parts[0] if groups == 1 else torch.cat(parts)
    if act == "relu":
        return _F.relu(output)
    return _F.leaky_relu(output, negative_slope) if act == "leaky_relu" else output


def _check_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    act: str,
    groups: int,
) -> None:
    if act not in _norm_act.ACTIVATIONS:
        raise ValueError(f"act must be one of {_norm_act.ACTIVATIONS}, got {act!r}")
    if input.dim() < 2:
        raise RuntimeError(f"input must have at least 2 dimensions (N, C, ...), got shape {tuple(input.shape)}")
    if not input.is_floating_point():
        raise NotImplementedError(f"input must be float32, float64, bfloat16 or float16, got {input.dtype}")
    if not isinstance(groups, int):
        raise TypeError(f"groups must be an integer, got {groups!r}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be both given or both None, got one of them")
    channels = input.shape[1]
    if training:
        if groups < 1 or input.shape[0] % groups != 0:
            raise ValueError(
                f"groups must be positive and divide the batch, got groups={groups} and a batch of {input.shape[0]} "
                f"(input of shape {tuple(input.shape)})"
            )
        if eps <= 0:
            raise ValueError(f"eps must be positive in training, got {eps}")
        if input.numel() > 0 and input.numel() == channels * groups:
            of = "" if groups == 1 else f" in {groups} groups"
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}{of}")
    elif eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    elif running_mean is None:
        raise RuntimeError("running_mean and running_var must be given in evaluation (training=False), got None")
    given = [
        (name, tensor)
        for name, tensor in (
            ("running_mean", running_mean),
            ("running_var", running_var),
            ("weight", weight),
            ("bias", bias),
        )
        if tensor is not None
    ]
    half = input.dtype in (torch.bfloat16, torch.float16)
    mixed = half and len(given) > 0 and given[0][1].dtype == torch.float32
    expected = torch.float32 if mixed else input.dtype
    for name, tensor in given:
        if tensor.dim() != 1 or tensor.shape[0] != channels:
            raise RuntimeError(
                f"{name} must have shape ({channels},) for input of shape {tuple(input.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.dtype != expected:
            also = ", or all of running_mean, running_var, weight and bias float32" if half else ""
            raise RuntimeError(f"{name} must have input's dtype {input.dtype}{also}, got {tensor.dtype}")
        if tensor.device != input.device:
            raise RuntimeError(f"{name} must be on input's device {input.device}, got {tensor.device}")


# ---- layer norm ----


def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    p: float = 0.0,
    eps: float = 1e-5,
    *,
    training: bool = True,
    prenorm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``layer_norm(dropout(input, p) + residual, weight, bias)``, what stands around each layer of a Transformer.

    On the CPU one pass forward and one backward, which keeps the sum alone, no mask. Twice differentiable. Where it
    pays: eager, outside ``torch.func`` and autocast, with weight and bias, 8,192 elements and more; everything else is
    torch's own three operations.

    Args:
        input: float32, float64, bfloat16 or float16, (..., features).
        residual: the same shape and dtype.
        weight, bias: (features), or None.
        p: the share of input that is dropped, in [0, 1].
        eps: what is added to the variance.
        training: False: nothing is dropped.
        prenorm: return the sum as well, for the next residual.

    Returns:
        input's shape and dtype; with ``prenorm`` (output, sum).

    Raises:
        ValueError: p outside [0, 1]. RuntimeError: shapes, dtypes or devices that do not fit.

    Source: Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must be in [0, 1], got {p}")
    if input.shape != residual.shape:
        raise RuntimeError(
            f"residual must have input's shape, got {tuple(residual.shape)} and an input of {tuple(input.shape)}"
        )
    p = p if training else 0.0
    given = [each for each in (input, residual, weight, bias) if each is not None]
    ours = (
        p < 1.0
        and weight is not None
        and bias is not None
        and pays_on_cpu(given, _layer_norm.SMALLEST)
        and weight.shape == bias.shape == input.shape[-1:]
        and input.numel() <= 1 << 34
        and not torch.is_autocast_enabled("cpu")
    )
    if not ours:
        sum = dropout(input, p) + residual
        output = _F.layer_norm(sum, input.shape[-1:], weight, bias, eps)
        return (output, sum) if prenorm else output
    philox = draw_philox(input.device) if p > 0.0 else None
    output, sum, _, _ = _layer_norm.dropout_add_layer_norm(input, residual, weight, bias, philox, float(p), eps)
    return (output, sum) if prenorm else output
