"""Leaky ReLU of what a convolution gives, and its backward as an operator.

::

    gradient = torch.ops.fastgan.leaky_relu_backward(gradient, output, slope)

What is negative is multiplied by ``slope``: 0 is ReLU, 1 nothing. The backward looks at the activation's result alone,
so nothing else is kept. torch's own kernels compute both; the operator puts the result into memory that fastgan keeps
from call to call (16 MB at a time behind the first layer of a DCGAN's discriminator), and is linear in the gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan import _impl
from fastgan.ops._autograd import LIBRARY, define
from fastgan.ops._layout import format_like, is_channels_last
from fastgan.ops._output import new_output


def activated(output: Tensor, slope: float, inplace: bool = False) -> Tensor:
    """``output``, what is negative of it multiplied by ``slope``."""
    if slope == 0.0:
        return F.relu(output, inplace)  # of -inf 0, where leaky_relu has NaN
    return output if slope == 1.0 else F.leaky_relu(output, slope, inplace)


def leaky_relu_backward_reference(gradient: Tensor, output: Tensor, slope: float) -> Tensor:
    """``fastgan::leaky_relu_backward`` in PyTorch."""
    if slope == 0.0:
        out = torch.ops.aten.threshold_backward(gradient, output, 0)
    else:
        out = torch.ops.aten.leaky_relu_backward(gradient, output, slope, True)
    return out.contiguous(memory_format=format_like(gradient))


def _kernel(gradient, output, slope):
    out = new_output(gradient, gradient.shape, channels_last=is_channels_last(gradient))
    if slope == 0.0:
        return torch.ops.aten.threshold_backward.grad_input(gradient, output, 0, grad_input=out)
    return torch.ops.aten.leaky_relu_backward.grad_input(gradient, output, slope, True, grad_input=out)


def _fake(gradient, output, slope):
    return gradient.new_empty(gradient.shape).contiguous(memory_format=format_like(gradient))


def _backward(args, _, grads, needs):
    return leaky_relu_backward(grads[0], *args[1:]) if needs[0] else None, None, None


def _jvp(args, _, tangents):
    output, slope = args[1:]
    if tangents[0] is None:  # only the output moves, and the mask with it nowhere
        return (torch.zeros_like(output),)
    return (leaky_relu_backward(tangents[0], output, slope),)


leaky_relu_backward = define(
    "leaky_relu_backward(Tensor gradient, Tensor output, float slope) -> Tensor",
    reference=leaky_relu_backward_reference,
    fake=_fake,
    backward=_backward,
    jvp=_jvp,
    unsaved=(0,),
)
if _impl.extension_error is None:
    LIBRARY.impl("leaky_relu_backward", _kernel, "CPU")
