"""The convolutions that ``fastgan.nn.functional`` calls, its checks done: which algorithm, ours or torch's.

On the CPU in float32 the operators of ``conv.py`` where they pay, and where the kernel covers the whole image one
matrix product. On a GPU the last alone: a discriminator's logits by ``conv_gan_loss``'s kernel, a generator's first
layer by a matrix product, which spares cuDNN's padding of its channels. All else is torch's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan import _cuda, _impl
from fastgan.ops import conv as _conv
from fastgan.ops import gan_loss
from fastgan.ops._autograd import cast_for_autocast, in_functorch
from fastgan.ops._layout import is_channels_last
from fastgan.ops.leaky_relu import activated


def _takes(*tensors: Tensor | None) -> bool:
    if _conv.get_conv_algorithm() == "exact" or not _impl.kernels_run():
        return False
    first = tensors[0]
    assert first is not None
    return all(
        t is None or (t.dtype == torch.float32 and t.device.type == "cpu" and t.layout == torch.strided)
        for t in tensors
    ) and not torch.is_autocast_enabled("cpu")


_Pair = tuple[int, int]


def _pair(value: int | Sequence[int]) -> _Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _rows(tensor: Tensor, channels_last: bool) -> Tensor:
    """(N, C, H, W) -> (N, C * H * W), the numbers of a row in the order of (H, W, C) if ``channels_last``."""
    return (tensor.permute(0, 2, 3, 1) if channels_last else tensor).flatten(1)


def _covers(input: Tensor, weight: Tensor, pads: _Pair, dilations: _Pair, groups: int) -> bool:
    """Whether the kernel covers the whole image, of which there is at least one."""
    plain = pads == (0, 0) and dilations == (1, 1) and groups == 1
    return plain and input.shape[2:] == weight.shape[2:] and input.numel() > 0


def _is_single(input: Tensor, pads: _Pair, extra: _Pair, dilations: _Pair, groups: int) -> bool:
    """Whether a transposed convolution is of single pixels, each of which the kernel is spread over."""
    return input.shape[2:] == (1, 1) and pads == extra == (0, 0) and dilations == (1, 1) and groups == 1


def _whole_convolution(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution whose kernel covers the image: (N, C, R, S) and (K, C, R, S) -> (N, K, 1, 1), one product."""
    last = is_channels_last(input) or is_channels_last(weight)
    return F.linear(_rows(input, last), _rows(weight, last), bias)[:, :, None, None]


def _whole_transposed_convolution(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A transposed convolution of single pixels: (N, K, 1, 1) and (K, C, R, S) -> (N, C, R, S), one product."""
    channels, high, wide = weight.shape[1:]
    last = is_channels_last(input) or is_channels_last(weight)
    out = input.flatten(1) @ _rows(weight, last)
    if last:
        out = out.unflatten(1, (high, wide, channels)).permute(0, 3, 1, 2)
    else:
        out = out.unflatten(1, (channels, high, wide))
    return out if bias is None else out + bias.to(out.dtype)[:, None, None]  # autocast has lowered out alone


# ---- the same on a GPU ----

_GPU = "cuda"  # its type of device
_LOGITS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _goes_whole_on_a_gpu(*tensors: Tensor | None) -> bool:
    if (
        tensors[0] is None
        or tensors[0].device.type != _GPU
        or _conv.get_conv_algorithm() == "exact"
        or _impl.reference_selected()
    ):
        return False
    if torch.compiler.is_compiling() or in_functorch():  # Inductor has its own choice, and vmap torch's rule
        return False
    return all(
        t is None or (t.numel() > 0 and t.layout == torch.strided and type(t) in (Tensor, torch.nn.Parameter))
        for t in tensors
    )


def _logits_on_a_gpu(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """One number a picture, (N, C, R, S) and (1, C, R, S) -> (N, 1, 1, 1), beside a loss that nobody looks at.

    None where that has no kernel, or one that does not pay: not for pictures and weights in different orders of memory.
    """
    if torch.is_autocast_enabled(_GPU):
        dtype = torch.get_autocast_dtype(_GPU)
        input, weight = cast_for_autocast(input, dtype), cast_for_autocast(weight, dtype)
        bias = cast_for_autocast(bias, dtype)
    same = all(t is None or t.dtype == input.dtype for t in (weight, bias))
    if not same or input.dtype not in _LOGITS or input.stride()[1:] != weight.stride()[1:]:
        return None
    if not _cuda.has_kernel("conv_gan_loss"):
        return None
    wasserstein, none = gan_loss.LOSSES.index("wasserstein"), gan_loss.REDUCTIONS.index("none")
    loss = (None, 1.0, None, None, wasserstein, [1, 1], [0, 0], 0.0, none, False)
    return gan_loss.conv_gan_loss(input, weight, bias, *loss)[1]


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    slope: float = 1.0,
) -> Tensor:
    """A convolution by the algorithm for its shapes; arguments as ``torch.nn.functional.conv2d``'s.

    What is negative in the result is multiplied by ``slope``, where a kernel of ours writes it.
    """
    if not slope >= 0:  # the sign of a result would not tell that of what it was
        return activated(convolution(input, weight, bias, stride, padding, dilation, groups), slope)
    if input.dim() == 4 and not isinstance(padding, str) and _takes(input, weight, bias):
        strides, pads, dilations = _pair(stride), _pair(padding), _pair(dilation)
        if _covers(input, weight, pads, dilations, groups):
            return activated(_whole_convolution(input, weight, bias), slope)
        name = _conv.algorithm_name(weight.shape[2:], strides, dilations, groups, weight.shape[1], weight.shape[0])
        if name != "torch":
            size = _conv.output_size(input.shape[2:], weight.shape[2:], strides, pads, dilations)
            if _conv.pays(input.shape, weight.shape, size, name):
                last = is_channels_last(input) or is_channels_last(weight)
                arguments = (input, weight, bias, list(strides), list(pads), last)
                return _conv.conv(*arguments) if slope == 1.0 else _conv.conv_act(*arguments, slope)
    elif (
        input.dim() == 4
        and not isinstance(padding, str)
        and weight.shape[0] == 1
        and _covers(input, weight, _pair(padding), _pair(dilation), groups)
        and _goes_whole_on_a_gpu(input, weight, bias)
    ):
        logits = _logits_on_a_gpu(input, weight, bias)
        if logits is not None:
            return activated(logits, slope)
    return activated(F.conv2d(input, weight, bias, stride, padding, dilation, groups), slope, inplace=True)


def transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
    groups: int,
    dilation: int | Sequence[int],
    slope: float = 1.0,
) -> Tensor:
    """A transposed convolution by the algorithm for its shapes; arguments as ``conv_transpose2d``'s.

    ``slope`` as ``convolution``'s.
    """
    if not slope >= 0:
        out = transposed_convolution(input, weight, bias, stride, padding, output_padding, groups, dilation)
        return activated(out, slope)
    if input.dim() == 4 and _takes(input, weight, bias):
        strides, pads, extra, dilations = _pair(stride), _pair(padding), _pair(output_padding), _pair(dilation)
        if _is_single(input, pads, extra, dilations, groups) and weight.numel() > 0:
            return activated(_whole_transposed_convolution(input, weight, bias), slope)
        name = _conv.algorithm_name(weight.shape[2:], strides, dilations, groups, weight.shape[1], weight.shape[0])
        if name != "torch":
            size = _conv.transposed_output_size(input.shape[2:], weight.shape[2:], strides, pads, extra, dilations)
            large = (input.shape[0], weight.shape[1], *size)
            if _conv.pays(large, weight.shape, input.shape[2:], name):
                last = is_channels_last(input) or is_channels_last(weight)
                arguments = (input, weight, bias, size, list(strides), list(pads), last)
                if slope == 1.0:
                    return _conv.conv_input_gradient(*arguments)
                return _conv.conv_input_gradient_act(*arguments, slope)
    elif (
        input.dim() == 4
        and _is_single(input, _pair(padding), _pair(output_padding), _pair(dilation), groups)
        and _goes_whole_on_a_gpu(input, weight, bias)
    ):
        return activated(_whole_transposed_convolution(input, weight, bias), slope)
    out = F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return activated(out, slope, inplace=True)
