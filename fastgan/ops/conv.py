"""Convolutions of kernel 4, stride 2 and of kernel 3, stride 1 by kernels of ours; all else is torch's own.

Between layers of 16 channels and more by Winograd's algorithm; from or to the few channels of a picture directly; and
where the kernel covers the whole image, by one matrix product. On a GPU the last alone: a discriminator's logits by
``conv_gan_loss``'s kernel, a generator's first layer by a matrix product, which spares cuDNN's padding of its channels.

Three operators, each linear in two tensors:

- ``conv``: x, w → y[n, k, i, j] = Σ x[n, c, s·i + r − p, s·j + t − q] w[k, c, r, t] (+ bias[k]);
- ``conv_input_gradient``: y, w → x, the transpose of the first in x (+ bias[c]). It is also the transposed convolution;
- ``conv_weight_gradient``: y, x → w, the transpose of the first in w.

The derivatives of each are the other two, so gradients of any order run on the same kernels.

**Precision.** F(4,2) on the points ±1/2, ±5/4, ∞ (kernel 4) and F(4,3) on 0, ±5/8, ±3/2, ∞ (kernel 3). The errors, as
measured against float64, are in ``ERRORS``. The error of an output is relative to the largest terms of its 4 × 4 tile,
not to the output itself: beside pixels a million times larger, small outputs lose digits that a direct sum keeps;
``fastgan.set_conv_algorithm("exact")`` is for those who need them. Infinities and NaN reach exactly the outputs that
depend on them: the kernel notices what is not finite, and the call is done again directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan import _cuda, _impl
from fastgan.ops import gan_loss
from fastgan.ops._autograd import LIBRARY, cast_for_autocast, define, in_functorch, is_plain

Algorithm = Literal["auto", "exact"]

#: Relative error (root mean square, float32, normal numbers, up to 256 channels) of output, input gradient and weight
#: gradient that each algorithm keeps; tests hold it to them.
ERRORS = {
    "winograd F(4,2)": (0.9e-6, 0.9e-6, 1.2e-6),
    "winograd F(4,3)": (1.5e-6, 1.5e-6, 1.5e-6),
    "direct": (4e-7, 4e-7, 4e-7),
}

#: Winograd's algorithm computes sixteen channels at a time; it takes no layer with fewer on either side
LEAST_CHANNELS = 16
#: the direct kernels take layers with so many at most on one side (csrc/conv/conv_op.cpp has the same number)
FEW_CHANNELS = 8
#: and only where so many multiplications make up for the call
LEAST_PRODUCTS = 4_000_000

_algorithm: Algorithm = "auto"


def set_conv_algorithm(algorithm: Algorithm) -> None:
    """Choose how ``fastgan.nn.functional.conv2d`` and ``conv_transpose2d`` compute on the CPU.

    Args:
        algorithm: "auto" (default) takes Winograd's algorithm where it is faster, "exact" multiplies directly (torch's
            convolution) everywhere. Process-wide, as torch's own backend flags are; a graph that was built before keeps
            its algorithm in its backward. See ``fastgan/ops/conv.py`` for the errors of both.

    Raises:
        ValueError: another name.
    """
    global _algorithm
    if algorithm not in ("auto", "exact"):
        raise ValueError(f"algorithm must be 'auto' or 'exact', got {algorithm!r}")
    _algorithm = algorithm


def get_conv_algorithm() -> Algorithm:
    """What ``set_conv_algorithm`` chose."""
    return _algorithm


# ---- torch's convolutions: what is computed, and what runs where there is no kernel ----


def convolution_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> Tensor:
    """torch's convolution: input (N, C, H, W) or (C, H, W), weight (K, C / groups, R, S)."""
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def transposed_convolution_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
    groups: int,
    dilation: int | Sequence[int],
) -> Tensor:
    """torch's transposed convolution: input (N, C, H, W) or (C, H, W), weight (C, K / groups, R, S)."""
    return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Height and width that a convolution gives."""
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


def transposed_output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Height and width that a transposed convolution gives."""
    return [
        (n - 1) * s - 2 * p + d * (k - 1) + o + 1
        for n, k, s, p, o, d in zip(size, kernel, stride, padding, output_padding, dilation, strict=True)
    ]


# ---- which algorithm ----


def algorithm_name(
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int, channels: int, outputs: int
) -> str:
    """ "winograd F(4,2)", "winograd F(4,3)", "direct", or "torch" where there is no kernel for such a layer.

    ``channels`` and ``outputs`` are those of the convolution; a transposed one goes from ``outputs`` to ``channels``.
    """
    strided = tuple(kernel) == (4, 4) and tuple(stride) == (2, 2)
    plain = tuple(kernel) == (3, 3) and tuple(stride) == (1, 1)
    if tuple(dilation) != (1, 1) or groups != 1 or not (strided or plain):
        return "torch"
    if min(channels, outputs) >= LEAST_CHANNELS:
        return "winograd F(4,2)" if strided else "winograd F(4,3)"
    if channels <= FEW_CHANNELS and outputs >= LEAST_CHANNELS:
        return "direct"
    return "direct" if plain and outputs <= FEW_CHANNELS and channels >= LEAST_CHANNELS else "torch"


def pays(large: Sequence[int], weight: Sequence[int], small: Sequence[int], name: str) -> bool:
    """Whether the kernel is faster than torch's convolution, by counting products.

    Args:
        large: (N, C, H, W), the side of the input of a convolution.
        weight: (K, C, R, S).
        small: (H', W'), height and width of the other side.
        name: from ``algorithm_name``.
    """
    batch, outputs, channels = large[0], weight[0], weight[1]
    high, wide = small
    if batch == 0 or min(channels, outputs, high, wide) < 1:
        return False
    if name == "direct":
        return batch * high * wide * channels * outputs * weight[2] * weight[3] >= LEAST_PRODUCTS
    if min(channels, outputs) < LEAST_CHANNELS:
        return False
    phases, products, direct = (4, 25, 16) if name == "winograd F(4,2)" else (1, 36, 9)
    tiles = batch * ((high + 3) // 4) * ((wide + 3) // 4)
    # Sixteen channels at a time. Weights are transformed for each block of up to 64 tiles, which costs as much as the
    # products of about six tiles; a tile's own transforms as much as 24 more channels on either side.
    rows, columns = phases * (-(-channels // 16) * 16), -(-outputs // 16) * 16
    blocks = (tiles + 63) // 64
    fast = products * (tiles + 6 * blocks) * (rows + 24) * (columns + 24)
    return fast * 1.25 < direct * batch * high * wide * channels * outputs


# ---- the operators ----


def is_channels_last(tensor: Tensor) -> bool:
    """Whether torch's convolutions would take this layout for their result.

    By strides: under vmap a tensor cannot be asked whether it is contiguous in another format.
    """
    if tensor.dim() != 4 or tensor.is_contiguous():
        return False
    expected = 1
    for dimension in (1, 3, 2, 0):
        if tensor.shape[dimension] != 1:
            if tensor.stride(dimension) != expected:
                return False
            expected *= tensor.shape[dimension]
    return True


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _has_kernel(first: Tensor, second: Tensor, kernel: Sequence[int], stride: Sequence[int], numbers: int) -> bool:
    return (
        numbers > 0
        and first.dtype == second.dtype
        and first.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (tuple(kernel), tuple(stride)) in (((4, 4), (2, 2)), ((3, 3), (1, 1)))
    )


def _bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def conv_reference(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], channels_last: bool
) -> Tensor:
    """``fastgan::conv`` in PyTorch."""
    return F.conv2d(input, weight, bias, stride, padding).contiguous(memory_format=_format(channels_last))


def conv_input_gradient_reference(
    gradient: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: list[int],
    stride: list[int],
    padding: list[int],
    channels_last: bool,
) -> Tensor:
    """``fastgan::conv_input_gradient`` in PyTorch."""
    extra = [
        n - ((m - 1) * s - 2 * p + k)
        for n, m, s, p, k in zip(size, gradient.shape[2:], stride, padding, weight.shape[2:], strict=True)
    ]
    out = F.conv_transpose2d(gradient, weight, bias, stride, padding, extra)
    return out.contiguous(memory_format=_format(channels_last))


def conv_weight_gradient_reference(
    gradient: Tensor, input: Tensor, kernel: list[int], stride: list[int], padding: list[int], channels_last: bool
) -> Tensor:
    """``fastgan::conv_weight_gradient`` in PyTorch."""
    weight = gradient.new_empty(gradient.shape[1], input.shape[1], *kernel)  # only its shape is used
    out = torch.ops.aten.convolution_backward(
        gradient, input, weight, None, stride, padding, [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]
    return out.contiguous(memory_format=_format(channels_last))


def _conv_fake(input, weight, bias, stride, padding, channels_last):
    size = output_size(input.shape[2:], weight.shape[2:], stride, padding, (1, 1))
    shape = (input.shape[0], weight.shape[0], *size)
    return input.new_empty(shape).contiguous(memory_format=_format(channels_last))


def _conv_input_gradient_fake(gradient, weight, bias, size, stride, padding, channels_last):
    shape = (gradient.shape[0], weight.shape[1], *size)
    return gradient.new_empty(shape).contiguous(memory_format=_format(channels_last))


def _conv_weight_gradient_fake(gradient, input, kernel, stride, padding, channels_last):
    shape = (gradient.shape[1], input.shape[1], *kernel)
    return gradient.new_empty(shape).contiguous(memory_format=_format(channels_last))


def _activated(output: Tensor, slope: float) -> Tensor:
    """What is negative is multiplied by ``slope``: 0 is ReLU, 1 nothing."""
    if slope == 0.0:
        return F.relu(output)  # of -inf 0, where leaky_relu has NaN
    return output if slope == 1.0 else F.leaky_relu(output, slope)


def _conv_kernel(input, weight, bias, stride, padding, channels_last, slope=1.0):
    arguments = (input, weight, bias, stride, padding, channels_last)
    size = output_size(input.shape[2:], weight.shape[2:], stride, padding, (1, 1))
    if not _has_kernel(input, weight, weight.shape[2:], stride, input.numel() * weight.numel()):
        return _activated(conv_reference(*arguments), slope)
    shape = (input.shape[0], weight.shape[0], *size)
    output, finite = _conv_pass(
        0, input, weight, shape, channels_last, _bias(bias), slope, stride[0], padding[0], padding[1]
    )  # fmt: skip
    return output if finite else _activated(conv_reference(*arguments), slope)


def _conv_input_gradient_kernel(gradient, weight, bias, size, stride, padding, channels_last, slope=1.0):
    arguments = (gradient, weight, bias, size, stride, padding, channels_last)
    numbers = gradient.numel() * weight.numel() * size[0] * size[1]
    if not _has_kernel(gradient, weight, weight.shape[2:], stride, numbers):
        return _activated(conv_input_gradient_reference(*arguments), slope)
    shape = (gradient.shape[0], weight.shape[1], *size)
    output, finite = _conv_pass(
        1, gradient, weight, shape, channels_last, _bias(bias), slope, stride[0], padding[0], padding[1]
    )  # fmt: skip
    return output if finite else _activated(conv_input_gradient_reference(*arguments), slope)


def _conv_weight_gradient_kernel(gradient, input, kernel, stride, padding, channels_last):
    arguments = (gradient, input, kernel, stride, padding, channels_last)
    if not _has_kernel(gradient, input, kernel, stride, gradient.numel() * input.numel()):
        return conv_weight_gradient_reference(*arguments)
    shape = (gradient.shape[1], input.shape[1], *kernel)
    output, finite = _conv_pass(
        2, input, gradient, shape, channels_last, None, 1.0, stride[0], padding[0], padding[1]
    )  # fmt: skip
    return output if finite else conv_weight_gradient_reference(*arguments)


# ---- derivatives: each operator's are the other two ----


def _bias_gradient(gradient: Tensor) -> Tensor:
    return gradient.sum((0, 2, 3))


def _conv_backward(args: Sequence[Any], _: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]):
    input, weight, _bias, stride, padding, _last = args
    grad = grads[0]
    return (
        conv_input_gradient(grad, weight, None, list(input.shape[2:]), stride, padding, is_channels_last(input))
        if needs[0]
        else None,
        conv_weight_gradient(grad, input, list(weight.shape[2:]), stride, padding, is_channels_last(weight))
        if needs[1]
        else None,
        _bias_gradient(grad) if needs[2] else None,  # type: ignore[arg-type]
        *(None,) * 3,
    )


def _conv_input_gradient_backward(args, _, grads, needs):
    gradient, weight, _bias, _size, stride, padding, _last = args
    grad = grads[0]
    return (
        conv(grad, weight, None, stride, padding, is_channels_last(gradient)) if needs[0] else None,
        conv_weight_gradient(gradient, grad, list(weight.shape[2:]), stride, padding, is_channels_last(weight))
        if needs[1]
        else None,
        _bias_gradient(grad) if needs[2] else None,
        *(None,) * 4,
    )


def _conv_weight_gradient_backward(args, _, grads, needs):
    gradient, input, _kernel, stride, padding, _last = args
    grad = grads[0]
    return (
        conv(input, grad, None, stride, padding, is_channels_last(gradient)) if needs[0] else None,
        conv_input_gradient(gradient, grad, None, list(input.shape[2:]), stride, padding, is_channels_last(input))
        if needs[1]
        else None,
        *(None,) * 4,
    )


def _bilinear_jvp(name: str, bias_at: int | None):
    """The tangent of a map that is linear in its first two arguments and, added to that, in a bias."""

    def jvp(args, _, tangents):
        terms = []
        for i in (0, 1):
            if tangents[i] is not None:
                parts = [*args[:i], tangents[i], *args[i + 1 :]]
                if bias_at is not None:
                    parts[bias_at] = None
                terms.append(getattr(torch.ops.fastgan, name)(*parts))
        if bias_at is not None and tangents[bias_at] is not None:
            terms.append(tangents[bias_at].reshape(1, -1, 1, 1))
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        if bias_at is not None and len(terms) == 1 and tangents[bias_at] is not None:
            total = total + torch.zeros_like(getattr(torch.ops.fastgan, name)(*args))
        return (total,)

    return jvp


conv = define(
    "conv(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, bool channels_last) -> Tensor",
    reference=conv_reference,
    fake=_conv_fake,
    backward=_conv_backward,
    jvp=_bilinear_jvp("conv", 2),
    autocast="lower",
)
conv_input_gradient = define(
    "conv_input_gradient(Tensor gradient, Tensor weight, Tensor? bias, SymInt[] size, SymInt[] stride, "
    "SymInt[] padding, bool channels_last) -> Tensor",
    reference=conv_input_gradient_reference,
    fake=_conv_input_gradient_fake,
    backward=_conv_input_gradient_backward,
    jvp=_bilinear_jvp("conv_input_gradient", 2),
    autocast="lower",
)
conv_weight_gradient = define(
    "conv_weight_gradient(Tensor gradient, Tensor input, SymInt[] kernel, SymInt[] stride, SymInt[] padding, "
    "bool channels_last) -> Tensor",
    reference=conv_weight_gradient_reference,
    fake=_conv_weight_gradient_fake,
    backward=_conv_weight_gradient_backward,
    jvp=_bilinear_jvp("conv_weight_gradient", None),
    autocast="lower",
)

# One of the three passes, and whether all of its result is finite. See csrc/conv/conv_op.cpp.
LIBRARY.define(
    "conv_pass(int which, Tensor first, Tensor second, int[] size, bool channels_last, Tensor? bias, float slope, "
    "int stride, int pad_height, int pad_width) -> (Tensor, bool)"
)
_conv_pass = torch.ops.fastgan.conv_pass.default
if _impl.extension_error is None:
    LIBRARY.impl("conv", _conv_kernel, "CPU")
    LIBRARY.impl("conv_input_gradient", _conv_input_gradient_kernel, "CPU")
    LIBRARY.impl("conv_weight_gradient", _conv_weight_gradient_kernel, "CPU")


# ---- what fastgan.nn.functional calls, its checks done ----


def _takes(*tensors: Tensor | None) -> bool:
    if _algorithm == "exact" or not _impl.kernels_run():
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
    if tensors[0] is None or tensors[0].device.type != _GPU or _algorithm == "exact" or _impl.reference_selected():
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
    """A convolution by the algorithm for its shapes; arguments as ``convolution_reference``'s.

    What is negative in the result is multiplied by ``slope``: in the kernel itself where no derivative is asked for.
    """
    if input.dim() == 4 and not isinstance(padding, str) and _takes(input, weight, bias):
        strides, pads, dilations = _pair(stride), _pair(padding), _pair(dilation)
        if _covers(input, weight, pads, dilations, groups):
            return _activated(_whole_convolution(input, weight, bias), slope)
        name = algorithm_name(weight.shape[2:], strides, dilations, groups, weight.shape[1], weight.shape[0])
        if name != "torch":
            size = output_size(input.shape[2:], weight.shape[2:], strides, pads, dilations)
            if pays(input.shape, weight.shape, size, name):
                last = is_channels_last(input) or is_channels_last(weight)
                if slope != 1.0 and is_plain((input, weight, bias)):
                    return _conv_kernel(input, weight, bias, strides, pads, last, slope)
                return _activated(conv(input, weight, bias, list(strides), list(pads), last), slope)
    elif (
        input.dim() == 4
        and not isinstance(padding, str)
        and weight.shape[0] == 1
        and _covers(input, weight, _pair(padding), _pair(dilation), groups)
        and _goes_whole_on_a_gpu(input, weight, bias)
    ):
        logits = _logits_on_a_gpu(input, weight, bias)
        if logits is not None:
            return _activated(logits, slope)
    return _activated(convolution_reference(input, weight, bias, stride, padding, dilation, groups), slope)


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
    """A transposed convolution by the algorithm for its shapes; arguments as ``transposed_convolution_reference``'s.

    ``slope`` as ``convolution``'s.
    """
    if input.dim() == 4 and _takes(input, weight, bias):
        strides, pads, extra, dilations = _pair(stride), _pair(padding), _pair(output_padding), _pair(dilation)
        if _is_single(input, pads, extra, dilations, groups) and weight.numel() > 0:
            return _activated(_whole_transposed_convolution(input, weight, bias), slope)
        name = algorithm_name(weight.shape[2:], strides, dilations, groups, weight.shape[1], weight.shape[0])
        if name != "torch":
            size = transposed_output_size(input.shape[2:], weight.shape[2:], strides, pads, extra, dilations)
            large = (input.shape[0], weight.shape[1], *size)
            if pays(large, weight.shape, input.shape[2:], name):
                last = is_channels_last(input) or is_channels_last(weight)
                if slope != 1.0 and is_plain((input, weight, bias)):
                    return _conv_input_gradient_kernel(input, weight, bias, size, strides, pads, last, slope)
                out = conv_input_gradient(input, weight, bias, size, list(strides), list(pads), last)
                return _activated(out, slope)
    elif (
        input.dim() == 4
        and _is_single(input, _pair(padding), _pair(output_padding), _pair(dilation), groups)
        and _goes_whole_on_a_gpu(input, weight, bias)
    ):
        return _activated(_whole_transposed_convolution(input, weight, bias), slope)
    out = transposed_convolution_reference(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return _activated(out, slope)
