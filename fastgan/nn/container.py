"""``torch.nn.Sequential`` that computes two neighbours as one where nobody looks between them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import nn

from fastgan._hooks import has_hooks, has_hooks_on_all
from fastgan.nn._convert import convert
from fastgan.nn.conv import Conv2d, ConvTranspose2d


class Sequential(nn.Sequential):
    """``torch.nn.Sequential``, the same in arguments, names, indices, slices and state dict.

    A ``fastgan.nn.Conv2d`` or ``ConvTranspose2d`` and the ``nn.ReLU`` or ``nn.LeakyReLU`` after it are computed as one,
    where neither has hooks and no hooks are on all modules: hooks see what they always saw, and so does who calls the
    layers one by one, or a slice of them.
    """

    @classmethod
    def from_torch(cls, module: nn.Sequential) -> Sequential:
        """Turns ``module``, a ``torch.nn.Sequential``, into one of this class in place; what is in it stays.

        Raises TypeError for anything else: a subclass may compute something else.
        """
        return convert(module, nn.Sequential, cls)

    def forward(self, input: Any) -> Any:
        whole = not has_hooks_on_all()
        done = False  # by the layer before
        layers: list[Any] = [*self, None]
        for layer, after in pairwise(layers):
            if done:
                done = False
            elif whole and (slope := _slope_of(layer, after)) is not None:
                input = layer.activated(input, slope)
                done = True
            else:
                input = layer(input)
        return input


def _slope_of(layer: nn.Module | None, after: nn.Module | None) -> float | None:
    """By what ``after`` multiplies what is negative, if ``layer`` can do it for it; else None."""
    if not isinstance(layer, (Conv2d, ConvTranspose2d)) or not isinstance(after, (nn.ReLU, nn.LeakyReLU)):
        return None
    if type(after) not in (nn.ReLU, nn.LeakyReLU):  # a subclass may compute something else
        return None
    slope = after.negative_slope if isinstance(after, nn.LeakyReLU) else 0.0
    if has_hooks(layer) or has_hooks(after) or "forward" in vars(layer) or "forward" in vars(after):
        return None
    if "_conv_forward" in vars(layer) or not slope >= 0:
        return None
    return float(slope)
