"""conv_gan_loss: a discriminator's last convolution and its GAN loss, with the logits returned beside the loss.

With ``x`` a logit, ``t`` its (smoothed) target in [0, 1] and ``p`` the positive weight, a logit's loss is

===========  =======================================  ==============================================================
bce          ``p t softplus(-x) + (1-t) softplus(x)``  Goodfellow et al. 2014; two non-negative terms, so that nothing
                                                       cancels: exact for a confident discriminator
hinge        ``p t relu(1-x) + (1-t) relu(1+x)``       Lim & Ye 2017, Miyato et al. 2018
wasserstein  ``(1-t) x - p t x``                       Arjovsky et al. 2017
lsgan        ``(x - t)^2``                             Mao et al. 2017, without their factor 1/2
===========  =======================================  ==============================================================

The operators take ``target``, ``sample_weight`` and ``pos_weight`` in the accumulate type (float32, or float64 for
float64 inputs), broadcastable to the logits ``(N, K, H', W')``; without a target tensor ``target_value`` counts.
``loss`` indexes ``LOSSES``, ``reduction`` is 0 (none), 1 (mean) or 2 (sum). The loss comes in the logits' dtype, or
with ``float32_loss`` in the accumulate type (autocast).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.ops._autograd import define

LOSSES = ("bce", "hinge", "lsgan", "wasserstein")
REDUCTIONS = ("none", "mean", "sum")

# log1p(exp(x)) is x to the last bit beyond this, in float64 too (torch's default, 20, is made for float32).
_SOFTPLUS_THRESHOLD = 40.0


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What losses are computed in: float64 for float64, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, 1.0, _SOFTPLUS_THRESHOLD)


def _coefficients(
    target: Tensor | None, target_value: float, pos_weight: Tensor | None, label_smoothing: float
) -> tuple[Tensor | float, Tensor | float]:
    """The weights of the real and the fake term."""
    real = (target_value if target is None else target) * (1.0 - label_smoothing) + 0.5 * label_smoothing
    fake = 1.0 - real
    return (real if pos_weight is None else real * pos_weight), fake


def loss_of_logits(
    logits: Tensor,
    target: Tensor | None,
    target_value: float,
    sample_weight: Tensor | None,
    pos_weight: Tensor | None,
    loss: int,
    label_smoothing: float,
    reduction: int,
    float32_loss: bool,
) -> Tensor:
    """The loss alone, in plain PyTorch, for logits that come from elsewhere; arguments as the operator's."""
    x = logits.to(accumulate_dtype(logits.dtype))
    real, fake = _coefficients(target, target_value, pos_weight, label_smoothing)
    if LOSSES[loss] == "bce":
        each = real * _softplus(-x) + fake * _softplus(x)
    elif LOSSES[loss] == "hinge":
        each = real * torch.relu(1.0 - x) + fake * torch.relu(1.0 + x)
    elif LOSSES[loss] == "lsgan":
        each = (x - real) ** 2
    else:
        each = (fake - real) * x
    if sample_weight is not None:
        each = each * sample_weight
    if REDUCTIONS[reduction] == "mean":
        each = each.mean()
    elif REDUCTIONS[reduction] == "sum":
        each = each.sum()
    return each if float32_loss else each.to(logits.dtype)  # `each` is in the accumulate type


def _derivative(x: Tensor, real: Tensor | float, fake: Tensor | float, loss: int) -> Tensor:
    if LOSSES[loss] == "bce":
        return fake * torch.sigmoid(x) - real * torch.sigmoid(-x)
    if LOSSES[loss] == "hinge":
        one = torch.ones_like(x)
        zero = torch.zeros_like(x)
        return fake * torch.where(x <= -1.0, zero, one) - real * torch.where(x >= 1.0, zero, one)
    if LOSSES[loss] == "lsgan":
        return 2.0 * (x - real)
    return (fake - real) * torch.ones_like(x)


def reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    target_value: float,
    sample_weight: Tensor | None,
    pos_weight: Tensor | None,
    loss: int,
    stride: Sequence[int],
    padding: Sequence[int],
    label_smoothing: float,
    reduction: int,
    float32_loss: bool,
) -> tuple[Tensor, Tensor]:
    logits = torch.conv2d(input, weight, bias, list(stride), list(padding))
    value = loss_of_logits(
        logits, target, target_value, sample_weight, pos_weight, loss, label_smoothing, reduction, float32_loss
    )
    return value, logits


def output_shape(input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> list[int]:
    """(N, K, H', W') of the convolution."""
    n, _, height, width = input.shape
    k, _, kernel_height, kernel_width = weight.shape
    return [
        n,
        k,
        (height + 2 * padding[0] - kernel_height) // stride[0] + 1,
        (width + 2 * padding[1] - kernel_width) // stride[1] + 1,
    ]


def _fake(
    input,
    weight,
    bias,
    target,
    target_value,
    sample_weight,
    pos_weight,
    loss,
    stride,
    padding,
    smoothing,
    reduction,
    f32,
):
    logits = input.new_empty(output_shape(input, weight, stride, padding))
    shape = logits.shape if REDUCTIONS[reduction] == "none" else ()
    return input.new_empty(shape, dtype=torch.float32 if f32 and input.dtype != torch.float64 else None), logits


def backward_reference(
    grad_loss: Tensor | None,
    grad_logits: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor,
    target: Tensor | None,
    target_value: float,
    sample_weight: Tensor | None,
    pos_weight: Tensor | None,
    loss: int,
    stride: Sequence[int],
    padding: Sequence[int],
    label_smoothing: float,
    reduction: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    # The logits are recomputed: `logits` is what the kernel reads, and a constant to autograd.
    x = torch.conv2d(input, weight, bias, list(stride), list(padding))
    dtype = x.dtype
    x = x.to(accumulate_dtype(dtype))
    grad: Tensor | None = None
    if grad_loss is not None:
        real, fake = _coefficients(target, target_value, pos_weight, label_smoothing)
        scale = grad_loss
        if REDUCTIONS[reduction] == "mean":
            scale = scale / max(x.numel(), 1)
        grad = scale * _derivative(x, real, fake, loss)
        if sample_weight is not None:
            grad = grad * sample_weight
    if grad_logits is not None:
        grad = grad_logits.to(x.dtype) if grad is None else grad + grad_logits
    grad = torch.zeros_like(x) if grad is None else grad
    grad_input, grad_weight = input.new_empty(0), weight.new_empty(0)
    if needs[0] or needs[1]:
        gradients = torch.ops.aten.convolution_backward(
            grad.to(dtype), input, weight, None, list(stride), list(padding), [1, 1], False, [0, 0], 1,
            [needs[0], needs[1], False],
        )  # fmt: skip
        grad_input = gradients[0] if needs[0] else grad_input
        grad_weight = gradients[1] if needs[1] else grad_weight
    grad_bias = grad.sum((0, 2, 3)).to(dtype) if needs[2] else weight.new_empty(0)
    return grad_input, grad_weight, grad_bias


def _backward_fake(
    grad_loss, grad_logits, input, weight, bias, logits, target, target_value, sample_weight, pos_weight, loss, stride,
    padding, smoothing, reduction, needs,
):  # fmt: skip
    grad_input = input.new_empty(input.shape if needs[0] else 0)
    if needs[0] and not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last):
        grad_input = grad_input.to(memory_format=torch.channels_last)
    return (
        grad_input,
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(weight.shape[0]) if needs[2] else weight.new_empty(0),
    )


_backward_operator = define(
    "conv_gan_loss_backward(Tensor? grad_loss, Tensor? grad_logits, Tensor input, Tensor weight, Tensor? bias, "
    "Tensor logits, Tensor? target, float target_value, Tensor? sample_weight, Tensor? pos_weight, int loss, "
    "int[2] stride, int[2] padding, float label_smoothing, int reduction, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    reference=backward_reference,
    fake=_backward_fake,
)


def _backward(args, saved, grads, needs):
    input, weight, bias, target, target_value, sample_weight, pos_weight, *rest = args
    loss, stride, padding, label_smoothing, reduction, _ = rest
    out = [None] * len(args)
    if any(needs[:3]):
        grad_loss = None if grads[0] is None else grads[0].to(accumulate_dtype(input.dtype))
        gradients = _backward_operator(
            grad_loss, grads[1], input, weight, bias, saved[0].detach(), target, target_value, sample_weight,
            pos_weight, loss, stride, padding, label_smoothing, reduction, [needs[0], needs[1], needs[2]],
        )  # fmt: skip
        out[:3] = [gradient if needs[i] else None for i, gradient in enumerate(gradients)]
    where = [i for i in (3, 5, 6) if needs[i]]
    if where and grads[0] is not None:  # gradients of targets and weights: rare, and plain PyTorch

        def loss_alone(*tensors):
            full = list(args)
            for i, tensor in zip(where, tensors, strict=True):
                full[i] = tensor
            return reference(*full)[0]

        pull = torch.func.vjp(loss_alone, *[args[i] for i in where])[1]
        for i, gradient in zip(where, pull(grads[0]), strict=True):
            out[i] = gradient
    return out


conv_gan_loss = define(
    "conv_gan_loss(Tensor input, Tensor weight, Tensor? bias, Tensor? target, float target_value, "
    "Tensor? sample_weight, Tensor? pos_weight, int loss, int[2] stride, int[2] padding, float label_smoothing, "
    "int reduction, bool float32_loss) -> (Tensor loss, Tensor logits)",
    reference=reference,
    fake=_fake,
    backward=_backward,
    save_outputs=(1,),
)
