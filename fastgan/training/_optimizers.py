"""GANTrainer's optimizers: made, checked, and held to the memory layout of their parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def adams(
    generator: nn.Module, discriminator: nn.Module, lr: float | tuple[float, float], betas: tuple[float, float]
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    rates = lr if isinstance(lr, (tuple, list)) else (lr, lr)
    if len(rates) != 2:
        raise ValueError(f"lr must be one number, or the generator's and the discriminator's, got {lr}")
    for rate in rates:
        if isinstance(rate, bool) or not isinstance(rate, (int, float)):
            raise TypeError(f"lr must be a number, got {rate!r}")
        if not rate > 0 or not math.isfinite(rate):
            raise ValueError(f"lr must be positive and finite, got {lr}")
    if not isinstance(betas, (tuple, list)):
        raise TypeError(f"betas must be two numbers, got {betas!r}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    optimizers = []
    for name, module, rate in zip(("generator", "discriminator"), (generator, discriminator), rates, strict=True):
        parameters = list(module.parameters())
        if not any(parameter.requires_grad for parameter in parameters):
            raise ValueError(f"{name} has no parameter that requires a gradient")
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
        optimizers.append(torch.optim.Adam(parameters, lr=rate, betas=betas, fused=fused))
    return optimizers[0], optimizers[1]


def own_optimizers(
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer], generator: nn.Module, discriminator: nn.Module
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    if not isinstance(optimizers, (tuple, list)) or len(optimizers) != 2:
        raise TypeError("optimizers must be a pair, the generator's and the discriminator's")
    for optimizer, module, name in zip(
        optimizers, (generator, discriminator), ("generator", "discriminator"), strict=True
    ):
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizers must be torch.optim.Optimizer, got {type(optimizer).__name__}")
        own = {id(parameter) for parameter in module.parameters()}
        if own.isdisjoint(id(parameter) for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError(f"optimizers: the {name}'s has none of its parameters (generator's first)")
        match_layouts(optimizer, states=True)
    return optimizers[0], optimizers[1]


def match_layouts(optimizer: torch.optim.Optimizer, states: bool = False) -> None:
    """Gives gradients (and moments) the strides of their parameters.

    A fused step walks parameter, gradient and moments as one row of memory each: with other strides it would pair each
    weight with another one's gradient, silently. Autograd itself keeps to the parameter's strides; hooks that set
    ``.grad``, and optimizers older than a change of the memory format, do not.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None and gradient.stride() != parameter.stride() and gradient.layout == torch.strided:
                parameter.grad = torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
            entries = optimizer.state.get(parameter, {}) if states else {}
            for key, value in entries.items():
                if (
                    isinstance(value, Tensor)
                    and value.shape == parameter.shape
                    and value.stride() != parameter.stride()
                ):
                    entries[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
