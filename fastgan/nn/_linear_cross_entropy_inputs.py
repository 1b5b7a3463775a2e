"""What linear_cross_entropy accepts: shapes and dtypes, with torch's exception types."""

from __future__ import annotations

from torch import Tensor, int64, uint8

from fastgan.nn import _autocast
from fastgan.ops.linear_cross_entropy import REDUCTIONS


def check_settings(label_smoothing: float, reduction: str, z_loss: float, adversarial_radius: float) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0, got {label_smoothing}")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}")
    if not adversarial_radius >= 0.0:
        raise ValueError(f"adversarial_radius must not be negative, got {adversarial_radius}")


def check(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    reduction: str,
    z_loss: float,
    adversarial_radius: float,
) -> None:
    check_settings(label_smoothing, reduction, z_loss, adversarial_radius)
    if input.dim() < 1 or weight.dim() < 2 or input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            f"input must have shape (..., H) and weight (V, H) with the same H, "
            f"got {tuple(input.shape)} and {tuple(weight.shape)}"
        )
    if weight.dim() > 2 and input.dim() != 2:
        raise RuntimeError(f"input must have shape (N, H) where weight has more than two dimensions, got {input.dim()}")
    if not input.is_floating_point():
        raise RuntimeError(f"input must be float32, float64, bfloat16 or float16, got {input.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias), ("target", target)):
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(f"{name} must be on input's device {input.device}, got {tensor.device}")
    autocast = _autocast.is_on(input.device.type)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype and not (autocast and tensor.is_floating_point()):
            raise RuntimeError(f"{name} must have input's dtype {input.dtype}, got {tensor.dtype}")
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise RuntimeError(f"bias must have shape {tuple(weight.shape[:-1])}, got {tuple(bias.shape)}")
    _check_classes(input, weight, target, adversarial_radius)


def _check_classes(input: Tensor, weight: Tensor, target: Tensor, adversarial_radius: float) -> None:
    places = (*input.shape[:-1], *weight.shape[1:-1])
    if target.is_floating_point():
        shape = (*input.shape[:-1], *weight.shape[:-1])
        if tuple(target.shape) != shape:
            raise RuntimeError(
                f"target must be int64 classes of shape {places} or probabilities of shape {shape}, "
                f"got {target.dtype} of shape {tuple(target.shape)}"
            )
        if adversarial_radius != 0.0:
            raise ValueError("adversarial_radius needs classes as target, got probabilities")
        return
    if target.dtype not in (int64, uint8):
        raise RuntimeError(f"target must be int64 or uint8 classes or floating-point probabilities, got {target.dtype}")
    if target.shape != places:
        # torch's cross_entropy: ValueError for another number of tokens, RuntimeError for another rank
        kind = ValueError if target.dim() == len(places) else RuntimeError
        raise kind(f"target must have input's shape without its last dimension: {places}, got {tuple(target.shape)}")
