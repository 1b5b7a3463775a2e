"""What GANTrainer says of arguments and networks that do not fit."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def latent_shape_of(generator: nn.Module, latent_shape: Sequence[int] | None) -> tuple[int, ...]:
    if isinstance(latent_shape, str):
        raise TypeError(f"latent_shape must be integers, got {latent_shape!r}")
    if latent_shape is not None:
        try:
            shape = (latent_shape,) if isinstance(latent_shape, int) else tuple(map(operator.index, latent_shape))
        except TypeError:
            raise TypeError(f"latent_shape must be integers, got {latent_shape!r}") from None
        if not shape or min(shape) < 1:
            raise ValueError(f"latent_shape must have positive sizes, got {shape}")
        return shape
    first = next((module for module in generator.modules() if not list(module.children())), None)
    if isinstance(first, nn.ConvTranspose2d):
        return (first.in_channels, 1, 1)
    if isinstance(first, nn.Linear):
        return (first.in_features,)
    return (100, 1, 1)


def device_of(device: torch.device | str | None, generator: nn.Module) -> torch.device:
    if device is None:
        parameter = next(generator.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except Exception as error:  # each kind of device that is not there says so in its own way
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return place


def refuse_meta(device: torch.device, **modules: nn.Module) -> None:
    for name, module in modules.items():
        if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            raise ValueError(f"{name} is on the meta device and has no values yet: to_empty, then initialise it")
    if device.type == "meta":
        raise ValueError("device must be one that computes, not meta")


def warn_of_range(generator: nn.Module, real: Tensor) -> None:
    """Says once that pictures are not scaled as a generator that ends in Tanh makes them."""
    last = [module for module in generator.modules() if not list(module.children())][-1]
    if not isinstance(last, nn.Tanh):
        return
    low, high = (float(value) for value in real.detach().aminmax())
    if high > 1.5 or low < -1.5 or (low >= 0 and high > low):
        warnings.warn(
            f"real runs from {low:.3g} to {high:.3g}, but the generator ends in Tanh, whose pictures run from -1 to 1: "
            f"{'scale it to that range' if high > 1.5 or low < -1.5 else '2 * real - 1 is what it can learn to make'}",
            stacklevel=3,
        )


def wrong_shape(real: Tensor, expected: torch.Size) -> ValueError:
    sizes = ", ".join(map(str, expected))
    return ValueError(f"real must be shaped as the generator's pictures, (N, {sizes}); got {tuple(real.shape)}")


def one_argument(name: str, argument: str, error: TypeError) -> TypeError:
    if "argument" not in str(error):
        return error
    return TypeError(
        f"{name} must take {argument} alone ({error}); a conditional one can be wrapped in a module that holds the rest"
    )
