"""``linear_cross_entropy``: a language model's head and its loss; the (tokens, vocabulary) logits are never whole.

For a token with features h, class y, logits x = W h + b and lse = log sum exp x, the loss is

    (1 - s) (lse - x_y) + s (lse - mean x) + z lse²        s: label_smoothing (Szegedy et al. 2016), z: z_loss (PaLM)

With an adversarial radius r, x_y is first lowered by r ‖h‖: the closed form of the worst perturbation of the target's
embedding within a ball of radius r (Wang, Gong and Liu, "Improving neural language modeling via adversarial training",
ICML 2019). Ignored tokens have neither loss nor gradient, and the mean divides by the number of the others.

The tokens that count are gathered first (of masked-word prediction's batch, 15 % remain) and go through in
chunks: a matrix product into one buffer that is used again for each chunk; the row kernel
(csrc/linear_cross_entropy), which leaves losses and, in the buffer itself, the gradient of the logits; and a product
for each gradient that will be wanted. So a forward that expects a backward does all of the work at once, for an
upstream gradient of 1; the backward multiplies. Where each token has an upstream gradient of its own
(``reduction="none"``), or where the backward is to be differentiated, ``linear_cross_entropy_backward`` computes the
chunks again.

16-bit features and weights are widened for the CPU's products. A GPU, and bfloat16 on a CPU with AMX (``product``),
multiply them as they are and leave float32: the logits are never rounded, and their gradient is before it is
multiplied, as it is by torch under autocast. So autocast lowers features and weights there, and widens them for another
CPU. The operator's loss is never of 16 bits.

On a GPU the vocabulary goes through in blocks instead (``_linear_cross_entropy_loops``).

While a CUDA graph is captured nothing can be gathered, for the host would have to know how many: ignored tokens then go
along with a gradient of zero, and an impossible target makes the loss NaN where it would raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan import _cuda, _impl
from fastgan.ops import _linear_cross_entropy_loops as _loops
from fastgan.ops._autograd import LIBRARY, cast_for_autocast, define, in_functorch, take_saved
from fastgan.ops._linear_cross_entropy_loops import accumulate_dtype, gradient_dtype
from fastgan.ops.product import tiles_are_used

REDUCTIONS = ("none", "mean", "sum")
NONE, MEAN, SUM = range(3)


def autocast_dtype(device: str) -> torch.dtype:
    """What features and weights become under autocast: a GPU, or AMX, multiplies the lower type, a CPU float32."""
    lower = torch.get_autocast_dtype(device)
    if device == "cpu" and not (lower == torch.bfloat16 and tiles_are_used()):
        return torch.float32
    return lower


def autocast(device: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three as autocast has them; the bias, which is added to float32 logits, is float32."""
    dtype = autocast_dtype(device)
    return (
        cast_for_autocast(input, dtype),
        cast_for_autocast(weight, dtype),
        None if bias is None else cast_for_autocast(bias, torch.float32),
    )


# ---- references ----


def _logits(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, radius: float) -> Tensor:
    dtype = accumulate_dtype(input.dtype)
    logits = F.linear(input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    if radius != 0.0:
        logits = logits - _one_hot(target, weight) * (radius * _norm(input.to(dtype)))[:, None]
    return logits


def _one_hot(target: Tensor, weight: Tensor) -> Tensor:
    return torch.arange(weight.shape[0], device=target.device) == target[:, None]


def _norm(input: Tensor) -> Tensor:
    """Norms of the rows (tokens, features), with zero instead of NaN for every derivative of a row of zeros."""
    square = input.square().sum(-1)
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def _per_token(values: Tensor, kept: Tensor, reduction: int) -> Tensor:
    """A gradient for each token from the upstream one: zero for the ignored."""
    if reduction == MEAN:
        values = values / kept.sum()
    return torch.where(kept, values, 0.0)


def reference(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    z_loss: float,
    adversarial_radius: float,
    gradients: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Input (T, H), weight (V, H), target (T,) and bias (V,) or None → the loss and the gradients asked for.

    The gradients of input and weight in ``gradient_dtype``, the others in the accumulate dtype. The bias may be wider
    than the others.
    """
    logits = _logits(input, weight, target, bias, adversarial_radius)
    kept = target != ignore_index
    lse = logits.logsumexp(-1)
    # nll_loss picks the target's entry and refuses an impossible target as torch does.
    loss = lse + F.nll_loss(logits, target, ignore_index=ignore_index, reduction="none")
    if label_smoothing != 0.0:
        loss = (1.0 - label_smoothing) * loss + label_smoothing * (lse - logits.mean(-1))
    if z_loss != 0.0:
        loss = loss + z_loss * lse.square()
    loss = torch.where(kept, loss, 0.0)
    if reduction != NONE:
        loss = loss.sum()
    if reduction == MEAN:
        loss = loss / kept.sum()
    if any(gradients):
        with torch.no_grad():
            settings = (ignore_index, label_smoothing, reduction, z_loss, adversarial_radius)
            one = torch.ones((), dtype=accumulate_dtype(input.dtype), device=input.device)
            precomputed = _gradients(one, input, weight, target, bias, *settings, gradients)
    else:
        precomputed = [input.new_empty(0, dtype=accumulate_dtype(input.dtype)) for _ in range(3)]
    dtype = gradient_dtype(input.dtype, input.device.type)
    return loss, precomputed[0].to(dtype), precomputed[1].to(dtype), precomputed[2]


def _gradients(
    grad, input, weight, target, bias, ignore_index, label_smoothing, reduction, z_loss, adversarial_radius, gradients
) -> list[Tensor]:
    dtype = accumulate_dtype(input.dtype)
    x = input.to(dtype)
    logits = _logits(input, weight, target, bias, adversarial_radius)
    kept = target != ignore_index
    per_token = _per_token(grad.to(dtype), kept, reduction)
    softmax, hot = logits.softmax(-1), _one_hot(target, weight).to(dtype)
    inner = softmax if z_loss == 0.0 else softmax * (1.0 + 2.0 * z_loss * logits.logsumexp(-1, keepdim=True))
    inner = inner - (1.0 - label_smoothing) * hot
    if label_smoothing != 0.0:
        inner = inner - label_smoothing / weight.shape[0]
    dlogits = torch.where(kept[:, None], inner * per_token[:, None], 0.0)
    out = [input.new_empty(0, dtype=dtype) for _ in range(3)]
    if gradients[0]:
        out[0] = dlogits @ weight.to(dtype)
        if adversarial_radius != 0.0:
            norm = _norm(x)
            inverse = torch.where(norm == 0, 0.0, 1.0 / torch.where(norm == 0, 1.0, norm))
            out[0] = out[0] - (adversarial_radius * (dlogits * hot).sum(-1) * inverse)[:, None] * x
    if gradients[1]:
        out[1] = dlogits.t() @ x
    if gradients[2]:
        out[2] = dlogits.sum(0)
    return out


def backward_reference(grad: Tensor, input: Tensor, *args) -> tuple[Tensor, ...]:
    """The gradients of input, weight and bias for an upstream gradient: a scalar, or (T,) without reduction."""
    return _as_given(_gradients(grad, input, *args), input, args[0], args[2])


def _as_given(gradients: Sequence[Tensor], input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Each gradient in the dtype of its tensor."""
    given = (input, weight, input if bias is None else bias)
    return tuple(gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, given, strict=True))


def composed(
    input, weight, target, bias, ignore_index, label_smoothing, reduction, z_loss, adversarial_radius
) -> Tensor:
    """What the operator does not take: probabilities as targets, and weights (V, d1, ..., H)."""
    if adversarial_radius != 0.0:
        raise ValueError(f"adversarial_radius needs a weight of shape (V, H), got {tuple(weight.shape)}")
    features = weight.shape[-1]
    logits = F.linear(input, weight.reshape(-1, features), None if bias is None else bias.reshape(-1))
    logits = logits.reshape(*input.shape[:-1], *weight.shape[:-1])
    shape = logits.shape
    if weight.dim() == 2:
        logits = logits.reshape(-1, shape[-1])
        target = target.reshape(-1, shape[-1]) if target.is_floating_point() else target.reshape(-1)
    loss = F.cross_entropy(
        logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=REDUCTIONS[reduction]
    )
    if reduction == NONE and weight.dim() == 2:
        loss = loss.reshape(shape[:-1])
    if z_loss == 0.0:
        return loss
    square = z_loss * logits.logsumexp(1).square()
    kept = torch.ones_like(square, dtype=torch.bool) if target.is_floating_point() else target != ignore_index
    square = torch.where(kept, square, 0.0)
    if reduction == NONE:
        return loss + square.reshape(loss.shape)
    return loss + (square.sum() / kept.sum() if reduction == MEAN else square.sum())


def gradients_to_expect(input: Tensor, weight: Tensor, bias: Tensor | None, reduction: int) -> list[bool]:
    """Of input, weight and bias: which gradients the forward computes along with the loss.

    Only a hint: the backward computes what it does not find. Under torch.func every backward can be differentiated
    again, so what the forward had computed would not be used.
    """
    if reduction == NONE or not torch.is_grad_enabled() or in_functorch():
        return [False] * 3
    return [tensor is not None and tensor.requires_grad for tensor in (input, weight, bias)]


# ---- kernels ----


def has_kernel(device: str) -> bool:
    """Whether tensors of this type of device have the kernels."""
    return device == "cpu" or (device == "cuda" and _cuda.has_kernel("linear_cross_entropy_rows"))


def _forward_kernel(
    input, weight, target, bias, ignore_index, label_smoothing, reduction, z_loss, adversarial_radius, gradients
):
    settings = (ignore_index, label_smoothing, z_loss, adversarial_radius)
    if not has_kernel(input.device.type):
        return reference(
            input, weight, target, bias, ignore_index, label_smoothing, reduction, z_loss, adversarial_radius, gradients
        )
    loss, count, out = _loops.chunked(
        input, weight, target, bias, *settings, None, reduction == MEAN, gradients, want_loss=True
    )
    if reduction != NONE:
        loss = loss.sum()
    if reduction == MEAN:
        loss = loss / count  # no token that counts: nan, as torch has it
    return loss, *out


def _backward_kernel(
    grad, input, weight, target, bias, ignore_index, label_smoothing, reduction, z_loss, adversarial_radius, gradients
):
    settings = (ignore_index, label_smoothing, z_loss, adversarial_radius)
    if not has_kernel(input.device.type):
        return backward_reference(
            grad, input, weight, target, bias, ignore_index, label_smoothing, reduction, z_loss, adversarial_radius,
            gradients,
        )  # fmt: skip
    _, _, out = _loops.chunked(
        input, weight, target, bias, *settings, grad, reduction == MEAN, gradients, want_loss=False
    )
    return _as_given(out, input, weight, bias)


# ---- operators ----


def _fake_gradients(input, weight, gradients: Sequence[bool], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    shapes = (input.shape, weight.shape, weight.shape[:1])
    return [
        input.new_empty(shape if wanted else (0,), dtype=dtype)
        for shape, wanted, dtype in zip(shapes, gradients, dtypes, strict=True)
    ]


def _fake(input, weight, target, bias, ignore_index, label_smoothing, reduction, z_loss, adversarial_radius, gradients):
    dtype = accumulate_dtype(input.dtype)
    loss = input.new_empty(target.shape if reduction == NONE else (), dtype=dtype)
    narrow = gradient_dtype(input.dtype, input.device.type)
    return loss, *_fake_gradients(input, weight, gradients, [narrow, narrow, dtype])


def _fake_backward(grad, input, weight, target, bias, *args):
    dtypes = [tensor.dtype for tensor in (input, weight, input if bias is None else bias)]
    return tuple(_fake_gradients(input, weight, args[-1], dtypes))


def _backward(args, saved, grads, needs):
    input, weight, target, bias, *settings, precomputed = args
    wanted = [needs[0], needs[1], needs[3]]
    reduction = settings[2]
    none = (None,) * 6
    if (
        not torch.is_grad_enabled()
        and reduction != NONE
        and all(have or not want for have, want in zip(precomputed, wanted, strict=True))
    ):
        out = [
            take_saved(gradient, grads[0], tensor.dtype) if want else None
            for gradient, tensor, want in zip(saved, (input, weight, bias), wanted, strict=True)
        ]
    else:
        # The backward will itself be differentiated, or each token has an upstream gradient of its own.
        out = linear_cross_entropy_backward(grads[0], input, weight, target, bias, *settings, wanted)
        out = [gradient if want else None for gradient, want in zip(out, wanted, strict=True)]
    return out[0], out[1], None, out[2], *none


def _autocast_arguments(device: str, begin: int, args: Sequence[Any]) -> list[Any]:
    """Input, weight, target and bias stand at ``begin``; before them an upstream gradient."""
    input, weight, target, bias = args[begin : begin + 4]
    input, weight, bias = autocast(device, input, weight, bias)
    return [*args[:begin], input, weight, target, bias, *args[begin + 4 :]]


_SETTINGS = "int ignore_index, float label_smoothing, int reduction, float z_loss, float adversarial_radius"

linear_cross_entropy = define(
    f"linear_cross_entropy(Tensor input, Tensor weight, Tensor target, Tensor? bias, {_SETTINGS}, bool[] gradients)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backward=_backward,
    save_outputs=(1, 2, 3),
    nondifferentiable_outputs=(1, 2, 3),
    autocast=lambda device, args: _autocast_arguments(device, 0, args),
)

linear_cross_entropy_backward = define(
    "linear_cross_entropy_backward(Tensor grad, Tensor input, Tensor weight, Tensor target, Tensor? bias, "
    f"{_SETTINGS}, bool[] gradients) -> (Tensor, Tensor, Tensor)",
    reference=backward_reference,
    fake=_fake_backward,
    autocast=lambda device, args: _autocast_arguments(device, 1, args),
)

for _device in ("CPU", "CUDA") if _impl.extension_error is None else ():
    LIBRARY.impl("linear_cross_entropy", _forward_kernel, _device)
    LIBRARY.impl("linear_cross_entropy_backward", _backward_kernel, _device)
