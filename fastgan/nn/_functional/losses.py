"""Losses that are one with the layer before them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan import _impl
from fastgan.nn import _autocast, _gan_loss_inputs, _linear_cross_entropy_inputs
from fastgan.nn._functional._kernels import has_kernel
from fastgan.nn._inputs import check_tensors, number
from fastgan.nn._inputs import pair as _pair
from fastgan.ops import gan_loss as _gan_loss
from fastgan.ops import linear_cross_entropy as _linear_cross_entropy

# ---- gan_loss ----


def conv_bce_with_logits(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | float,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    sample_weight: Tensor | None = None,
    pos_weight: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """A discriminator's last convolution, sigmoid and binary cross-entropy as one kernel: ``(loss, logits)``.

    Equals ``logits = conv2d(input, weight, bias, stride, padding)`` and
    ``binary_cross_entropy_with_logits(logits, target, sample_weight, pos_weight=pos_weight, reduction=reduction)``; see
    ``conv_gan_loss`` for arguments, shapes and errors. Loss and gradient are exact for confident discriminators too:
    nothing is clamped and nothing cancels.
    """
    return conv_gan_loss(
        input,
        weight,
        bias,
        target,
        loss="bce",
        stride=stride,
        padding=padding,
        sample_weight=sample_weight,
        pos_weight=pos_weight,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def conv_gan_loss(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | float,
    *,
    loss: str = "bce",
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    sample_weight: Tensor | None = None,
    pos_weight: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """A discriminator's last convolution and its GAN loss as one kernel: ``(loss, logits)``, both differentiable.

    Args:
        input: features (N, C, H, W), any strides; float32, float64, bfloat16 or float16.
        weight: (K, C, kh, kw), of input's dtype.
        bias: (K,) or None.
        target: 1 is real, 0 is fake. One number (or a tensor of no dimension) for every logit; a label an image, shape
            (N,), for each of its image's logits; or a target of the logits' shape (N, K, H', W'). "bce", "hinge" and
            "wasserstein" want it in [0, 1], "lsgan" takes any finite number.
        loss: with x a logit and t its target, "bce": t softplus(-x) + (1-t) softplus(x); "hinge" (the
            discriminator's): t relu(1-x) + (1-t) relu(1+x); "wasserstein": (1-2t) x, so -x for real and x for fake
            (with target 1 it is also the generator's part of the hinge loss); "lsgan": (x-t)^2, as Mao et al. (2017)
            without their factor 1/2.
        stride, padding: as ``torch.nn.functional.conv2d``'s.
        sample_weight: multiplies each logit's loss; shape (N,), an image each, or broadcastable to the logits. As in
            torch, the mean divides by the number of logits, not by the sum of the weights.
        pos_weight: multiplies the real term, broadcastable to the logits or a number; not for "lsgan".
        label_smoothing: s in [0, 1] turns each target t into t (1-s) + s/2.
        reduction: "mean" over all logits, also where there are several an image; "sum"; or "none".

    Returns:
        The loss, a scalar or for "none" of the logits' shape, in the logits' dtype (computed in float32 for the 16-bit
        types; under autocast it is float32, as torch's losses are), and the logits (N, K, H', W').

    Raises:
        RuntimeError: shapes or dtypes that do not fit; a tensor target with values outside [0, 1].
        ValueError: a number outside its range, or an unknown loss or reduction.
        TypeError: an argument of another type.
    """
    check_tensors("bias", input=input, weight=weight, bias=bias)
    stride, padding = _pair(stride, "stride"), _gan_loss_inputs.padding_pair(padding, weight, stride)
    _gan_loss_inputs.check_convolution(input, weight, bias, stride, padding)
    loss_index, reduction_index = _gan_loss_inputs.check_loss(loss, reduction, label_smoothing, pos_weight)
    autocast = _autocast.is_on(input.device.type)
    if autocast:
        # As torch: the convolution in the lower type, the loss in float32.
        lower = torch.get_autocast_dtype(input.device.type)
        input, weight = _gan_loss_inputs.lowered(input, lower), _gan_loss_inputs.lowered(weight, lower)
        bias = None if bias is None else _gan_loss_inputs.lowered(bias, lower)
    shape = _gan_loss.output_shape(input, weight, stride, padding)
    accumulate = _gan_loss.accumulate_dtype(input.dtype)
    tensors = _gan_loss_inputs.targets_and_weights(
        target, sample_weight, pos_weight, loss, shape, accumulate, input.device
    )
    parts = (*tensors, loss_index)
    settings = (float(label_smoothing), reduction_index, autocast)
    if _impl.reference_selected() or input.is_meta or not has_kernel(input, "conv_gan_loss"):
        _gan_loss_inputs.check_target_values(tensors[0], loss)
        return _gan_loss.reference(input, weight, bias, *parts, stride, padding, *settings)
    return _gan_loss.conv_gan_loss(input, weight, bias, *parts, stride, padding, *settings)


def gan_loss_with_logits(
    logits: Tensor,
    target: Tensor | float,
    *,
    loss: str = "bce",
    sample_weight: Tensor | None = None,
    pos_weight: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The loss of ``conv_gan_loss`` for logits (N, ...) that come from another layer; the same arguments and errors."""
    check_tensors(logits=logits)
    if logits.dim() == 0 or not logits.is_floating_point():
        raise RuntimeError(f"logits must be floating-point of shape (N, ...), got {_gan_loss_inputs.describe(logits)}")
    loss_index, reduction_index = _gan_loss_inputs.check_loss(loss, reduction, label_smoothing, pos_weight)
    shape, accumulate = list(logits.shape), _gan_loss.accumulate_dtype(logits.dtype)
    tensors = _gan_loss_inputs.targets_and_weights(
        target, sample_weight, pos_weight, loss, shape, accumulate, logits.device
    )
    _gan_loss_inputs.check_target_values(tensors[0], loss)
    autocast = _autocast.is_on(logits.device.type)
    return _gan_loss.loss_of_logits(logits, *tensors, loss_index, float(label_smoothing), reduction_index, autocast)


# ---- linear_cross_entropy ----


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    *,
    z_loss: float = 0.0,
    adversarial_radius: float = 0.0,
) -> Tensor:
    """A language model's head and its loss, the (tokens, vocabulary) logits never stored whole.

    Equals ``cross_entropy(linear(input, weight, bias), target, ...)`` in value and in derivatives of any order. Tokens
    whose target is ``ignore_index`` cost nothing. Where a gradient will be wanted, the forward computes it along with
    the loss; the backward of "mean" and "sum" only scales it.

    Args:
        input: features (H,) or (..., H), any strides; float32, float64, bfloat16 or float16.
        weight: (V, H), of input's dtype; a tied embedding's weight as it is. (V, d1, ..., H) computes d1 × ... losses a
            token, as ``torch.nn.functional.linear_cross_entropy`` does, through plain PyTorch.
        target: classes, int64 or uint8, of input's shape without H; or probabilities, floating-point, with V in
            H's place, through plain PyTorch.
        bias: (V,) or None.
        ignore_index: tokens of this target have no loss and no gradient, and the mean does not count them.
        label_smoothing: in [0, 1], spread over all classes; not counting ignored tokens.
        reduction: "mean" over the tokens that are not ignored (nan where there is none, as in torch), "sum" or "none".
        z_loss: adds z_loss · logsumexp(logits)² to each token's loss (PaLM, Chowdhery et al. 2022, section 5).
        adversarial_radius: the target's embedding is moved by so much in the direction that raises the loss most: its
            logit is lowered by radius · ‖input‖ (Wang, Gong and Liu, ICML 2019). Needs classes as target.

    Returns:
        The loss in input's dtype (computed in float32 for the 16-bit types; float32 under autocast, which multiplies
        float32 on the CPU and the lower type on a GPU or, bfloat16, on a CPU with AMX), a scalar or, for "none", of
        target's shape.

    Raises:
        RuntimeError: shapes or dtypes that do not fit, or label_smoothing outside [0, 1].
        ValueError: another number of targets than tokens, an unknown reduction, a negative z_loss or radius.
        IndexError: a class outside [0, V) that is not ``ignore_index``.
        TypeError: an argument of another type.
    """
    check_tensors("bias", input=input, weight=weight, target=target, bias=bias)
    ignore_index = -100 if ignore_index is None else ignore_index
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
    label_smoothing, z_loss = number(label_smoothing, "label_smoothing"), number(z_loss, "z_loss")
    adversarial_radius = number(adversarial_radius, "adversarial_radius")
    _linear_cross_entropy_inputs.check(
        input, weight, target, bias, label_smoothing, reduction, z_loss, adversarial_radius
    )
    device, dtype = input.device.type, input.dtype
    if _autocast.is_on(device):
        # As torch: the loss in float32; on a GPU, or by AMX, factors of the lower type, their product though float32.
        input, weight, bias = _linear_cross_entropy.autocast(device, input, weight, bias)
        dtype = _linear_cross_entropy.accumulate_dtype(input.dtype)
    index = _linear_cross_entropy.REDUCTIONS.index(reduction)
    settings = (ignore_index, label_smoothing, index, z_loss, adversarial_radius)
    if weight.dim() > 2 or target.is_floating_point():
        return _linear_cross_entropy.composed(input, weight, target, bias, *settings)
    arguments = (input.reshape(target.numel(), input.shape[-1]), weight, target.reshape(-1).long(), bias, *settings)
    if _impl.reference_selected() or not _linear_cross_entropy.has_kernel(device):
        with _autocast.off(device):
            loss = _linear_cross_entropy.reference(*arguments, [False] * 3)[0]
    else:
        gradients = _linear_cross_entropy.gradients_to_expect(input, weight, bias, index)
        loss = _linear_cross_entropy.linear_cross_entropy(*arguments, gradients)[0]
    return (loss.reshape(target.shape) if reduction == "none" else loss).to(dtype)
