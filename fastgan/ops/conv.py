"""Convolutions of kernel 4, stride 2 and of kernel 3, stride 1 by kernels of ours: the operators.

Between layers of 16 channels and more by Winograd's algorithm; from or to the few channels of a picture directly.
``conv_layer.py`` chooses between them and torch's own. Three operators, each linear in two tensors:

- ``conv``: x, w → y[n, k, i, j] = Σ x[n, c, s·i + r − p, s·j + t − q] w[k, c, r, t] (+ bias[k]);
- ``conv_input_gradient``: y, w → x, the transpose of the first in x (+ bias[c]). It is also the transposed convolution;
- ``conv_weight_gradient``: y, x → w, the transpose of the first in w.

The derivatives of each are the other two, so gradients of any order run on the same kernels.

Two more, ``conv_act`` and ``conv_input_gradient_act``, are the first two with a (leaky) ReLU where results are written.
They keep the activation's results alone, and a gradient is multiplied by its derivative where the kernels of a
convolution's two gradients read it (``mask``), or, where those cannot, by ``leaky_relu_backward``.

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

from fastgan import _impl
from fastgan.ops._autograd import LIBRARY, define, runs_directly
from fastgan.ops._layout import format_of, is_channels_last
from fastgan.ops.leaky_relu import activated, leaky_relu_backward

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


# ---- sizes ----


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
    return F.conv2d(input, weight, bias, stride, padding).contiguous(memory_format=format_of(channels_last))


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
    return out.contiguous(memory_format=format_of(channels_last))


def conv_weight_gradient_reference(
    gradient: Tensor, input: Tensor, kernel: list[int], stride: list[int], padding: list[int], channels_last: bool
) -> Tensor:
    """``fastgan::conv_weight_gradient`` in PyTorch."""
    weight = gradient.new_empty(gradient.shape[1], input.shape[1], *kernel)  # only its shape is used
    out = torch.ops.aten.convolution_backward(
        gradient, input, weight, None, stride, padding, [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]
    return out.contiguous(memory_format=format_of(channels_last))


def _conv_fake(input, weight, bias, stride, padding, channels_last):
    size = output_size(input.shape[2:], weight.shape[2:], stride, padding, (1, 1))
    shape = (input.shape[0], weight.shape[0], *size)
    return input.new_empty(shape).contiguous(memory_format=format_of(channels_last))


def _conv_input_gradient_fake(gradient, weight, bias, size, stride, padding, channels_last):
    shape = (gradient.shape[0], weight.shape[1], *size)
    return gradient.new_empty(shape).contiguous(memory_format=format_of(channels_last))


def _conv_weight_gradient_fake(gradient, input, kernel, stride, padding, channels_last):
    shape = (gradient.shape[1], input.shape[1], *kernel)
    return gradient.new_empty(shape).contiguous(memory_format=format_of(channels_last))


#: an activation's results, or None, and its slope
Mask = tuple[Tensor | None, float]
_NO_MASK: Mask = (None, 1.0)


def _conv_kernel(input, weight, bias, stride, padding, channels_last, slope=1.0):
    arguments = (input, weight, bias, stride, padding, channels_last)
    size = output_size(input.shape[2:], weight.shape[2:], stride, padding, (1, 1))
    if not _has_kernel(input, weight, weight.shape[2:], stride, input.numel() * weight.numel()):
        return activated(conv_reference(*arguments), slope, inplace=True)
    shape = (input.shape[0], weight.shape[0], *size)
    output, finite = _conv_pass(
        0, input, weight, shape, channels_last, _bias(bias), slope, None, 1.0, stride[0], padding[0], padding[1]
    )  # fmt: skip
    return output if finite else activated(conv_reference(*arguments), slope, inplace=True)


def _conv_input_gradient_kernel(
    gradient, weight, bias, size, stride, padding, channels_last, slope=1.0, mask: Mask = _NO_MASK
):
    def reference():
        plain = _masked(gradient, mask)
        out = conv_input_gradient_reference(plain, weight, bias, size, stride, padding, channels_last)
        return activated(out, slope, inplace=True)

    numbers = gradient.numel() * weight.numel() * size[0] * size[1]
    if not _has_kernel(gradient, weight, weight.shape[2:], stride, numbers):
        return reference()
    shape = (gradient.shape[0], weight.shape[1], *size)
    output, finite = _conv_pass(
        1, gradient, weight, shape, channels_last, _bias(bias), slope, *mask, stride[0], padding[0], padding[1]
    )  # fmt: skip
    return output if finite else reference()


def _conv_weight_gradient_kernel(gradient, input, kernel, stride, padding, channels_last, mask: Mask = _NO_MASK):
    def reference():
        plain = _masked(gradient, mask)
        return conv_weight_gradient_reference(plain, input, kernel, stride, padding, channels_last)

    if not _has_kernel(gradient, input, kernel, stride, gradient.numel() * input.numel()):
        return reference()
    shape = (gradient.shape[1], input.shape[1], *kernel)
    output, finite = _conv_pass(
        2, input, gradient, shape, channels_last, None, 1.0, *mask, stride[0], padding[0], padding[1]
    )  # fmt: skip
    return output if finite else reference()


def _masked(gradient: Tensor, mask: Mask) -> Tensor:
    return gradient if mask[0] is None else leaky_relu_backward(gradient, *mask)


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


# ---- with an activation ----


def _reads_mask(gradient: Tensor, output: Tensor, weight: Tensor) -> bool:
    """Whether the kernels of both gradients can read ``gradient`` through a mask, and are what runs."""
    return (
        runs_directly(gradient, output, weight)
        and gradient.device.type == "cpu"
        and _impl.extension_error is None
        and gradient.dtype == output.dtype
        and gradient.stride() == output.stride()
        and weight.shape[0] > FEW_CHANNELS  # else x and y may change places (csrc/conv/conv_op.cpp)
    )


def _act_backward(plain):
    """The backward of ``plain``, the gradient multiplied by the activation's derivative before it."""

    def backward(args, saved, grads, needs):
        masked = leaky_relu_backward(grads[0], saved[0], args[-1])
        return (*plain(args[:-1], (), (masked,), needs), None)

    return backward


_conv_act_backward_in_turn = _act_backward(_conv_backward)


def _conv_act_backward(args, saved, grads, needs):
    input, weight, _bias, stride, padding, _last, slope = args
    (output,), (grad,) = saved, grads
    if needs[2] or not _reads_mask(grad, output, weight):
        return _conv_act_backward_in_turn(args, saved, grads, needs)
    mask = (output, slope)
    size, kernel = list(input.shape[2:]), list(weight.shape[2:])
    to_input = to_weight = None
    if needs[0]:
        last = is_channels_last(input)
        to_input = _conv_input_gradient_kernel(grad, weight, None, size, stride, padding, last, mask=mask)
    if needs[1]:
        to_weight = _conv_weight_gradient_kernel(grad, input, kernel, stride, padding, is_channels_last(weight), mask)
    return (to_input, to_weight, *(None,) * 5)


def _define_act(schema, reference, fake, backward):
    """An operator whose last argument is a slope: ``reference`` of the others and its activation."""
    plain = _bilinear_jvp(schema[: schema.index("_act(")], 2)

    def jvp(args, saved, tangents):
        (tangent,) = plain(args[:-1], (), tangents[:-1])
        return (leaky_relu_backward(tangent, saved[0], args[-1]),)

    return define(
        schema,
        reference=lambda *args: activated(reference(*args[:-1]), args[-1]),
        fake=lambda *args: fake(*args[:-1]),
        backward=backward,
        jvp=jvp,
        save_outputs=(0,),
        autocast="lower",
    )


conv_act = _define_act(
    "conv_act(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, bool channels_last, "
    "float slope) -> Tensor",
    conv_reference,
    _conv_fake,
    _conv_act_backward,
)
conv_input_gradient_act = _define_act(
    "conv_input_gradient_act(Tensor gradient, Tensor weight, Tensor? bias, SymInt[] size, SymInt[] stride, "
    "SymInt[] padding, bool channels_last, float slope) -> Tensor",
    conv_input_gradient_reference,
    _conv_input_gradient_fake,
    _act_backward(_conv_input_gradient_backward),
)

# One of the three passes, and whether all of its result is finite. See csrc/conv/conv_op.cpp.
LIBRARY.define(
    "conv_pass(int which, Tensor first, Tensor second, int[] size, bool channels_last, Tensor? bias, float slope, "
    "Tensor? mask, float mask_slope, int stride, int pad_height, int pad_width) -> (Tensor, bool)"
)
_conv_pass = torch.ops.fastgan.conv_pass.default
if _impl.extension_error is None:
    LIBRARY.impl("conv", _conv_kernel, "CPU")
    LIBRARY.impl("conv_input_gradient", _conv_input_gradient_kernel, "CPU")
    LIBRARY.impl("conv_weight_gradient", _conv_weight_gradient_kernel, "CPU")
    LIBRARY.impl("conv_act", _conv_kernel, "CPU")
    LIBRARY.impl("conv_input_gradient_act", _conv_input_gradient_kernel, "CPU")
