"""Batch norm and activation as one operator: the pure-PyTorch reference, the schema, the fakes and the derivatives.

::

    z = (x - mean) / sqrt(var + eps) * weight + bias        per channel, dimension 1 of an input of rank >= 2
    y = z                  act = "none"
        max(z, 0)                "relu"
        z > 0 ? z : negative_slope * z                          "leaky_relu"

``norm_act`` takes mean and biased variance from the batch and returns them, (groups, C), for the running statistics:
operators never change their inputs, so moving those is the work of ``fastgan.nn.functional.batch_norm_act``. With
``groups`` > 1 the batch is cut into that many equal parts, each with statistics of its own. ``norm_act_eval`` takes the
running statistics, which are constants to both. The activation's mask is recomputed from the input, never stored.

Statistics are float64, so that the rounding of a large mean does not reach the output (on the CPU they cost nothing:
there are a few hundred). Weight and bias have the input's dtype, or float32 beside a half-precision input. The output
keeps the memory of a channels_last input and is contiguous otherwise.

Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan.ops._autograd import LIBRARY, define, in_functorch

ACTIVATIONS = ("none", "relu", "leaky_relu")


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _per_channel(vector: Tensor, rank: int) -> Tensor:
    return vector.view(1, -1, *[1] * (rank - 2))


def _activate(z: Tensor, act: str, negative_slope: float) -> Tensor:
    if act == "relu":
        return torch.relu(z)
    return torch.where(z > 0, z, z * negative_slope) if act == "leaky_relu" else z


def _mask(grad: Tensor, z: Tensor, act: str, negative_slope: float) -> Tensor:
    if act == "relu":
        return torch.where(z <= 0, torch.zeros_like(grad), grad)
    return torch.where(z > 0, grad, grad * negative_slope) if act == "leaky_relu" else grad


def _affine(normalised: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    rank, dtype = normalised.dim(), normalised.dtype
    if weight is not None:
        normalised = normalised * _per_channel(weight.to(dtype), rank)
    return normalised if bias is None else normalised + _per_channel(bias.to(dtype), rank)


def _grouped(x: Tensor, groups: int) -> Tensor:
    return x.reshape(groups, x.shape[0] // groups, *x.shape[1:])


def _standardised(input: Tensor, eps: float, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x̂ in the input's shape, and the statistics: mean, var and 1/σ of shape (groups, 1, C, 1, ...)."""
    x = _grouped(input.to(_compute_dtype(input.dtype)), groups)
    dims = [i for i in range(x.dim()) if i not in (0, 2)]
    if x.numel() == 0:  # no value has a mean
        statistic = x.new_zeros([groups, 1, input.shape[1], *[1] * (input.dim() - 2)])
        return x.reshape(input.shape).clone(), statistic, statistic, statistic
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    mean, centred = mean + centred.mean(dims, keepdim=True), centred - centred.mean(dims, keepdim=True)
    var = centred.square().mean(dims, keepdim=True)
    invstd = torch.rsqrt(var + eps)
    return (centred * invstd).reshape(input.shape), mean, var, invstd


def norm_act_reference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    negative_slope: float,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    normalised, mean, var, _ = _standardised(input, eps, groups)
    output = _activate(_affine(normalised, weight, bias), act, negative_slope).to(input.dtype)
    shape = (groups, input.shape[1])
    return _laid_out(output, input), mean.detach().reshape(shape).double(), var.detach().reshape(shape).double()


def norm_act_backward_reference(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    act: str,
    negative_slope: float,
    groups: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    # mean and var enter the gradient as functions of the input: they are computed again, not taken as constants.
    normalised, _, _, invstd = _standardised(input, eps, groups)
    dtype, rank = normalised.dtype, input.dim()
    dz = _mask(grad_output.to(dtype), _affine(normalised, weight, bias), act, negative_slope)
    grad_input, grad_weight, grad_bias = (grad_output.new_empty(0) for _ in range(3))
    if needs[0]:
        scaled = dz if weight is None else dz * _per_channel(weight.to(dtype), rank)
        scaled, normalised_groups = _grouped(scaled, groups), _grouped(normalised, groups)
        if scaled.numel():
            dims = [i for i in range(scaled.dim()) if i not in (0, 2)]
            along = (scaled * normalised_groups).mean(dims, keepdim=True)
            scaled = (scaled - scaled.mean(dims, keepdim=True) - normalised_groups * along) * invstd
        grad_input = _laid_out(scaled.reshape(input.shape).to(input.dtype), input)
    channels = [i for i in range(rank) if i != 1]
    if needs[1]:
        assert weight is not None
        grad_weight = (dz * normalised).sum(channels).to(weight.dtype)
    if needs[2]:
        assert bias is not None
        grad_bias = dz.sum(channels).to(bias.dtype)
    return grad_input, grad_weight, grad_bias


@torch.no_grad()
def move_reference(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, factor: float
) -> None:
    """Moves the running statistics in place, by each group of (groups, C) in turn; ``factor`` is for the variance."""
    for group in range(mean.shape[0]):
        for running, statistic, scale in ((running_mean, mean[group], 1.0), (running_var, var[group], factor)):
            if running.dtype in (torch.bfloat16, torch.float16):  # rounded once
                running.copy_(running.double() * (1 - momentum) + statistic * (scale * momentum))
            else:
                running.mul_(1 - momentum).add_(statistic, alpha=scale * momentum)


def move_running_statistics(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, factor: float
) -> None:
    """``move_reference``, in one call where it can be: four calls and their conversions are 70 microseconds."""
    dtypes = (torch.float32, torch.float64)
    if (
        torch.compiler.is_compiling()
        or in_functorch()
        or running_mean.device.type not in ("cpu", "cuda")
        or running_mean.is_inference()
        or running_var.is_inference()
        or running_mean.dtype not in dtypes
        or running_mean.dtype != running_var.dtype
        or not type(running_mean) is type(running_var) is type(mean) is Tensor
    ):
        move_reference(running_mean, running_var, mean, var, momentum, factor)
        return
    moved = [each.detach() if each.requires_grad else each for each in (running_mean, running_var)]
    torch.ops.fastgan.norm_act_move.default(*moved, mean, var, momentum, factor)
    torch.autograd.graph.increment_version([running_mean, running_var])


def _standardised_by(input: Tensor, running_mean: Tensor, running_var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype, rank = _compute_dtype(input.dtype), input.dim()
    invstd = _per_channel(torch.rsqrt(running_var.detach().to(dtype) + eps), rank)
    return (input.to(dtype) - _per_channel(running_mean.detach().to(dtype), rank)) * invstd, invstd


def norm_act_eval_reference(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    negative_slope: float,
) -> Tensor:
    normalised, _ = _standardised_by(input, running_mean, running_var, eps)
    return _laid_out(_activate(_affine(normalised, weight, bias), act, negative_slope).to(input.dtype), input)


def norm_act_eval_backward_reference(
    grad_output: Tensor,
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    negative_slope: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    normalised, invstd = _standardised_by(input, running_mean, running_var, eps)
    dtype, rank = normalised.dtype, input.dim()
    dz = _mask(grad_output.to(dtype), _affine(normalised, weight, bias), act, negative_slope)
    grad_input, grad_weight, grad_bias = (grad_output.new_empty(0) for _ in range(3))
    if needs[0]:
        scale = invstd if weight is None else invstd * _per_channel(weight.to(dtype), rank)
        grad_input = _laid_out((dz * scale).to(input.dtype), input)
    channels = [i for i in range(rank) if i != 1]
    if needs[1]:
        assert weight is not None
        grad_weight = (dz * normalised).sum(channels).to(weight.dtype)
    if needs[2]:
        assert bias is not None
        grad_bias = dz.sum(channels).to(bias.dtype)
    return grad_input, grad_weight, grad_bias


def _memory_format(input: Tensor) -> torch.memory_format:
    """How kernels walk an input and lay out what has its shape: in place if it is one of torch's formats."""
    if input.is_contiguous():
        return torch.contiguous_format
    if input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if input.dim() == 5 and input.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def _laid_out(output: Tensor, input: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(output):
        return output  # inside transforms strides are not the caller's
    return output.contiguous(memory_format=_memory_format(input))


def _fake_like(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=_memory_format(input))


def _fake(input, weight, bias, eps, act, negative_slope, groups):
    statistics = [input.new_empty((groups, input.shape[1]), dtype=torch.float64) for _ in range(2)]
    return _fake_like(input), *statistics


def _fake_gradients(grad_output, input, weight, bias, needs):
    empty = grad_output.new_empty
    return (
        _fake_like(input) if needs[0] else empty(0),
        empty(weight.shape, dtype=weight.dtype) if needs[1] else empty(0),
        empty(bias.shape, dtype=bias.dtype) if needs[2] else empty(0),
    )


def _fake_backward(grad_output, input, weight, bias, mean, var, eps, act, negative_slope, groups, needs):
    return _fake_gradients(grad_output, input, weight, bias, needs)


def _fake_eval_backward(grad_output, input, running_mean, running_var, weight, bias, eps, act, negative_slope, needs):
    return _fake_gradients(grad_output, input, weight, bias, needs)


def _asked(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


def _backward(args, saved, grads, needs):
    input, weight, bias, *settings = args
    wanted = [needs[0], needs[1], needs[2]]
    gradients = norm_act_backward(grads[0], input, weight, bias, *saved, *settings, wanted)
    return *_asked(gradients, wanted), None, None, None, None


def _eval_backward(args, saved, grads, needs):
    wanted = [needs[0], needs[3], needs[4]]
    gradient = _asked(norm_act_eval_backward(grads[0], *args, wanted), wanted)
    return gradient[0], None, None, gradient[1], gradient[2], None, None, None


norm_act = define(
    "norm_act(Tensor input, Tensor? weight, Tensor? bias, float eps, str act, float negative_slope, int groups)"
    " -> (Tensor output, Tensor mean, Tensor var)",
    reference=norm_act_reference,
    fake=_fake,
    backward=_backward,
    save_outputs=(1, 2),
    nondifferentiable_outputs=(1, 2),
)
LIBRARY.define(
    "norm_act_move(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, float momentum,"
    " float factor) -> ()"
)
LIBRARY.impl("norm_act_move", move_reference, "CompositeExplicitAutograd")
torch.library.register_fake("fastgan::norm_act_move", lambda *args: None)
norm_act_backward = define(
    "norm_act_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor var,"
    " float eps, str act, float negative_slope, int groups, bool[] needs)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    reference=norm_act_backward_reference,
    fake=_fake_backward,
)
norm_act_eval = define(
    "norm_act_eval(Tensor input, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, float eps,"
    " str act, float negative_slope) -> Tensor",
    reference=norm_act_eval_reference,
    fake=lambda input, *rest: _fake_like(input),
    backward=_eval_backward,
)
norm_act_eval_backward = define(
    "norm_act_eval_backward(Tensor grad_output, Tensor input, Tensor running_mean, Tensor running_var, Tensor? weight,"
    " Tensor? bias, float eps, str act, float negative_slope, bool[] needs)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    reference=norm_act_eval_backward_reference,
    fake=_fake_eval_backward,
)
