"""Convolutions."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.nn import _autocast
from fastgan.nn._inputs import Pair as _Pair
from fastgan.nn._inputs import check_tensors
from fastgan.nn._inputs import pair as _pair
from fastgan.ops import conv as _conv
from fastgan.ops import conv_layer as _conv_layer


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Pair = 1,
    padding: _Pair | str = 0,
    dilation: _Pair = 1,
    groups: int = 1,
) -> Tensor:
    """As ``torch.nn.functional.conv2d``: kernel 4 with stride 2 and kernel 3 with stride 1 by kernels of ours.

    On the CPU in float32, where the sizes make it pay; everything else is torch's own. ``fastgan/ops/conv.py`` says
    how exact it is, and ``fastgan.set_conv_algorithm("exact")`` turns it off.

    Args:
        input: (N, C, H, W) or (C, H, W); weight: (K, C / groups, R, S); bias: (K,) or None.
        stride, padding, dilation: one integer or two; padding also "valid" or "same".
        groups: divides C and K.

    Returns:
        (N, K, H', W'), or (K, H', W') for an unbatched input.

    Raises:
        RuntimeError: ranks, sizes, dtypes or devices that do not fit, or no output left.
        TypeError: an argument of another type.
    """
    return _conv2d(input, weight, bias, stride, padding, dilation, groups)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: _Pair,
    padding: _Pair | str,
    dilation: _Pair,
    groups: int,
    slope: float = 1.0,
) -> Tensor:
    """What is negative in the result is multiplied by ``slope``: the activation that goes with it."""
    check_tensors("bias", input=input, weight=weight, bias=bias)
    if _is_plain_convolution(input, weight, bias):
        _check_convolution_arguments(input, weight, bias, stride, dilation, groups)
        strides, dilations = _pair(stride, "stride"), _pair(dilation, "dilation")
        if not isinstance(padding, str):
            pads = _pair(padding, "padding")
            if min(pads) < 0:
                raise RuntimeError(f"padding must not be negative, got {padding}")
            size = _conv.output_size(input.shape[-2:], weight.shape[2:], strides, pads, dilations)
            if min(size) < 1:
                raise RuntimeError(
                    f"input of shape {tuple(input.shape)} is smaller than the kernel: weight of shape "
                    f"{tuple(weight.shape)} with stride={stride}, padding={padding}, dilation={dilation} leaves an "
                    f"output of {size[0]} x {size[1]}"
                )
            padding = pads
        stride, dilation = strides, dilations
    return _conv_layer.convolution(input, weight, bias, stride, padding, dilation, groups, slope)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Pair = 1,
    padding: _Pair = 0,
    output_padding: _Pair = 0,
    groups: int = 1,
    dilation: _Pair = 1,
) -> Tensor:
    """As ``torch.nn.functional.conv_transpose2d``, by our kernels where ``conv2d`` would take them.

    Args:
        input: (N, C, H, W) or (C, H, W); weight: (C, K / groups, R, S); bias: (K,) or None.
        stride, padding, dilation: one integer or two. groups: divides C and K.
        output_padding: added to one side of the output; smaller than stride or dilation in each direction.

    Returns:
        (N, K, H', W'), or (K, H', W') for an unbatched input.

    Raises:
        RuntimeError: ranks, sizes, dtypes or devices that do not fit, an impossible output_padding, or no output left.
        TypeError: an argument of another type.
    """
    return _conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)


def _conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: _Pair,
    padding: _Pair,
    output_padding: _Pair,
    groups: int,
    dilation: _Pair,
    slope: float = 1.0,
) -> Tensor:
    """``slope`` as ``_conv2d``'s."""
    check_tensors("bias", input=input, weight=weight, bias=bias)
    if _is_plain_convolution(input, weight, bias):
        _check_convolution_arguments(input, weight, bias, stride, dilation, groups, transposed=True)
        strides, pads, dilations = _pair(stride, "stride"), _pair(padding, "padding"), _pair(dilation, "dilation")
        extra = _pair(output_padding, "output_padding")
        if min(pads) < 0:
            raise RuntimeError(f"padding must not be negative, got {padding}")
        if min(extra) < 0 or any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
            raise RuntimeError(
                "output_padding must not be negative and must be smaller than stride or dilation, "
                f"got output_padding={output_padding} with stride={stride}, dilation={dilation}"
            )
        size = _conv.transposed_output_size(input.shape[-2:], weight.shape[2:], strides, pads, extra, dilations)
        if min(size) < 1:
            raise RuntimeError(
                f"padding={padding} leaves no output: input of shape {tuple(input.shape)}, weight of shape "
                f"{tuple(weight.shape)}, stride={stride} give {size[0]} x {size[1]}"
            )
        stride, padding, output_padding, dilation = strides, pads, extra, dilations
    return _conv_layer.transposed_convolution(
        input, weight, bias, stride, padding, output_padding, groups, dilation, slope
    )


def _is_plain_convolution(*tensors: Tensor | None) -> bool:
    """Dense tensors: what is refused here by name. Others are torch's to judge."""
    return not any(t is not None and (t.is_quantized or t.layout != torch.strided) for t in tensors)


def _check_convolution_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: _Pair,
    dilation: _Pair,
    groups: int,
    transposed: bool = False,
) -> None:
    if input.dim() not in (3, 4) or weight.dim() != 4:
        raise RuntimeError(
            "input must have 4 dimensions (N, C, H, W) or 3 (C, H, W) and weight 4, "
            f"got input of shape {tuple(input.shape)} and weight of shape {tuple(weight.shape)}"
        )
    for name, value in (("stride", stride), ("dilation", dilation)):
        if min(_pair(value, name)) < 1:
            raise RuntimeError(f"{name} must be positive, got {value}")
    if groups < 1:
        raise RuntimeError(f"groups must be positive, got {groups}")
    channels = weight.shape[0] if transposed else weight.shape[1] * groups
    if input.shape[-3] != channels:
        raise RuntimeError(
            f"input must have {channels} channels for weight of shape {tuple(weight.shape)} and groups={groups}, "
            f"got {input.shape[-3]} in input of shape {tuple(input.shape)}"
        )
    if weight.shape[0] % groups != 0:
        raise RuntimeError(
            f"groups must divide weight's first dimension, got groups={groups}, weight {tuple(weight.shape)}"
        )
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != outputs):
        raise RuntimeError(f"bias must have shape ({outputs},), got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != input.device:
            raise RuntimeError(f"{name} must be on input's device {input.device}, got {tensor.device}")
        if tensor.dtype != input.dtype and not _autocast.is_on(input.device.type):
            raise RuntimeError(f"{name} must have input's dtype {input.dtype}, got {tensor.dtype}")
