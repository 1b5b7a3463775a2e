"""Gradient penalties on the discriminator, differentiable where the gradient's norm is zero.

``sqrt`` has an infinite slope at zero, and 0·∞ is NaN: a discriminator that is flat somewhere (dead units, a saturated
half-precision layer) then ends a run in the middle. Here the norm's derivative at zero is zero. Squares are taken in
float32 at least, since in half precision they overflow at 256 and vanish below 0.0002.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: name -> default weight
PENALTIES = {"r1": 10.0, "wgan-gp": 10.0}


def _squared_norms(outputs: Tensor, inputs: Tensor) -> Tensor:
    """‖∂ outputs / ∂ input‖² of each example (N, ...) -> (N,), differentiable."""
    (gradient,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
    if gradient.dtype in (torch.float16, torch.bfloat16):
        gradient = gradient.float()
    return gradient.flatten(1).square().sum(1)


def safe_sqrt(squares: Tensor) -> Tensor:
    """The square root with derivative zero, not infinity, at zero."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)


def r1_penalty(logits: Callable[[Tensor], Tensor], real: Tensor, weight: float = 10.0) -> Tensor:
    """``weight / 2 · E ‖∇ D(x)‖²`` over real x (Mescheder et al., 2018): a scalar, differentiable.

    Args:
        logits: the discriminator, from (N, ...) to logits.
        real: (N, ...), floating.
        weight: γ of the paper.
    """
    inputs = real.detach().requires_grad_()
    return weight / 2 * _squared_norms(logits(inputs), inputs).mean()


def penalty_points(real: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform numbers, one for each picture of real (N, ...): (N, 1, ...), of real's dtype."""
    size = (len(real), *[1] * (real.dim() - 1))
    return torch.rand(size, generator=generator, device=real.device, dtype=torch.float32).to(real.dtype)


def wgan_gp_penalty(
    logits: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    weight: float = 10.0,
    generator: torch.Generator | None = None,
    where: Tensor | None = None,
) -> Tensor:
    """``weight · E (‖∇ D(x)‖ − 1)²`` at random points between real and fake (Gulrajani et al., 2017): a scalar.

    Args:
        logits: the discriminator, from (N, ...) to logits.
        real, fake: (N, ...) of one shape.
        weight: λ of the paper.
        generator: for the random points; None is torch's own.
        where: (N, 1, ...) in [0, 1], the points themselves (0 is real, 1 is fake), as ``penalty_points`` draws them.
    """
    if real.shape != fake.shape:
        raise ValueError(f"real and fake must have one shape, got {tuple(real.shape)} and {tuple(fake.shape)}")
    if where is None:
        where = penalty_points(real, generator)
    inputs = torch.lerp(real.detach(), fake.detach(), where).requires_grad_()
    norms = safe_sqrt(_squared_norms(logits(inputs), inputs))
    return weight * (norms - 1).square().mean()
