"""What conv_gan_loss refuses, and how its arguments become the operator's: shapes and dtypes, one check apart."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.nn import _autocast
from fastgan.nn._inputs import number, pair
from fastgan.ops import gan_loss as _gan_loss


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def lowered(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def padding_pair(padding: int | tuple[int, int] | str, weight: Tensor, stride: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(padding, str):
        return pair(padding, "padding")
    if padding == "valid":
        return 0, 0
    if padding != "same":
        raise RuntimeError(f"padding must be integers, 'valid' or 'same', got {padding!r}")
    if stride != (1, 1):
        raise RuntimeError(f"padding='same' needs stride 1, got {stride}")
    if weight.dim() == 4 and (weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0):
        raise RuntimeError(f"padding='same' needs odd kernel sizes here, got {tuple(weight.shape[2:])}")
    return weight.shape[-2] // 2, weight.shape[-1] // 2


def check_convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    if input.dim() != 4 or weight.dim() != 4:
        raise RuntimeError(
            f"input must have 4 dimensions (N, C, H, W) and weight 4 (K, C, kh, kw), "
            f"got shapes {tuple(input.shape)} and {tuple(weight.shape)}"
        )
    if not input.is_floating_point():
        raise RuntimeError(f"input must be float32, float64, bfloat16 or float16, got {describe(input)}")
    if weight.device != input.device or (bias is not None and bias.device != input.device):
        where = "" if bias is None else f" and {bias.device}"
        raise RuntimeError(f"weight and bias must be on input's device {input.device}, got {weight.device}{where}")
    lowered = _autocast.is_on(input.device.type)
    if not lowered and (weight.dtype != input.dtype or (bias is not None and bias.dtype != input.dtype)):
        kind = "" if bias is None else f" and {bias.dtype}"
        raise RuntimeError(f"weight and bias must have input's dtype {input.dtype}, got {weight.dtype}{kind}")
    if input.shape[1] != weight.shape[1]:
        raise RuntimeError(
            f"input must have as many channels as weight of shape {tuple(weight.shape)}: {weight.shape[1]}, "
            f"got input of shape {tuple(input.shape)}"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise RuntimeError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if min(stride) <= 0:
        raise RuntimeError(f"stride must be positive, got {stride}")
    if min(padding) < 0:
        raise RuntimeError(f"padding must not be negative, got {padding}")
    padded = input.shape[2] + 2 * padding[0], input.shape[3] + 2 * padding[1]
    if min(weight.shape) < 1 or padded[0] < weight.shape[2] or padded[1] < weight.shape[3]:
        raise RuntimeError(
            f"weight's kernel {tuple(weight.shape[2:])} must not be larger than the padded input {padded}, nor weight "
            f"be empty: input {tuple(input.shape)}, weight {tuple(weight.shape)}"
        )


def check_loss(loss: str, reduction: str, label_smoothing: float, pos_weight: object) -> tuple[int, int]:
    if loss not in _gan_loss.LOSSES:
        raise ValueError(f"loss must be one of {_gan_loss.LOSSES}, got {loss!r}")
    if reduction not in _gan_loss.REDUCTIONS:
        raise ValueError(f"reduction must be one of {_gan_loss.REDUCTIONS}, got {reduction!r}")
    if not 0.0 <= number(label_smoothing, "label_smoothing") <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if loss == "lsgan" and pos_weight is not None:
        raise ValueError("pos_weight multiplies the real term of a loss with two; 'lsgan' has one, use sample_weight")
    return _gan_loss.LOSSES.index(loss), _gan_loss.REDUCTIONS.index(reduction)


def check_target(
    target: Tensor | float, shape: list[int], loss: str, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, float]:
    """The operator's ``target, target_value``."""
    if not isinstance(target, Tensor):
        if not isinstance(target, (int, float)):
            raise TypeError(f"target must be a tensor or a number, got {type(target).__name__}")
        if loss != "lsgan" and not 0.0 <= target <= 1.0:
            raise ValueError(f"target must be in [0, 1] for loss={loss!r}, got {target}")
        return None, float(target)
    if target.is_complex():
        raise RuntimeError(f"target must be real, got {describe(target)}")
    if target.device != device:
        raise RuntimeError(f"target must be on input's device {device}, got {target.device}")
    if target.dim() == 1 and target.shape[0] == shape[0]:
        target = target.reshape(-1, *(1 for _ in shape[1:]))
    elif target.dim() != 0 and list(target.shape) != shape:
        raise RuntimeError(
            f"target must be a number, a label an image of shape ({shape[0]},), or have the logits' shape "
            f"{tuple(shape)}, got shape {tuple(target.shape)}"
        )
    return target.to(dtype), 0.0


def check_target_values(target: Tensor | None, loss: str) -> None:
    """The kernels look at the values themselves; where they do not run, eager calls do it here."""
    if target is None or loss == "lsgan" or torch.compiler.is_compiling() or target.is_meta or target.numel() == 0:
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(target) or type(target) not in (Tensor, torch.nn.Parameter):
        return
    if bool(((target < 0) | (target > 1)).any()):
        raise RuntimeError(f"target must be in [0, 1] for loss={loss!r}, got values outside")


def broadcastable(
    name: str,
    tensor: Tensor | None,
    shape: list[int],
    dtype: torch.dtype,
    device: torch.device,
    per_image: bool = False,
) -> Tensor | None:
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.device != device:
        raise RuntimeError(f"{name} must be on input's device {device}, got {tensor.device}")
    if per_image and tensor.dim() == 1 and tensor.shape[0] == shape[0]:
        tensor = tensor.reshape(-1, *(1 for _ in shape[1:]))
    fits = tensor.dim() <= len(shape) and all(
        have == 1 or have == want for have, want in zip(tensor.shape, shape[len(shape) - tensor.dim() :], strict=True)
    )
    if not fits or tensor.is_complex():
        either = f"of shape ({shape[0]},) or " if per_image else ""
        raise RuntimeError(
            f"{name} must be real, {either}broadcastable to the logits' shape {tuple(shape)}, got {describe(tensor)}"
        )
    return tensor.to(dtype)


def targets_and_weights(
    target: Tensor | float,
    sample_weight: Tensor | None,
    pos_weight: Tensor | float | None,
    loss: str,
    shape: list[int],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor | None, float, Tensor | None, Tensor | None]:
    """(target tensor or None, target number, sample weights, positive weights), checked, as the operator takes them."""
    labels, target_value = check_target(target, shape, loss, dtype, device)
    weights = broadcastable("sample_weight", sample_weight, shape, dtype, device, per_image=True)
    if isinstance(pos_weight, (int, float)):
        pos_weight = torch.full((), pos_weight, dtype=dtype, device=device)
    return labels, target_value, weights, broadcastable("pos_weight", pos_weight, shape, dtype, device)
