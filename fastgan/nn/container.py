"""``torch.nn.Sequential`` that computes two neighbours as one where nobody looks between them."""

from __future__ import annotations

import copyreg
import functools
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastgan._hooks import has_hooks, has_hooks_on_all
from fastgan.nn._convert import convert, empty
from fastgan.nn.conv import Conv2d, ConvTranspose2d
from fastgan.nn.norm_act import BatchNormAct2d


class Sequential(nn.Sequential):
    """``torch.nn.Sequential``, the same in arguments, names, indices, slices and state dict.

    A ``fastgan.nn.Conv2d``, ``ConvTranspose2d`` or ``BatchNormAct2d`` and the ``nn.ReLU`` or ``nn.LeakyReLU`` after it
    are computed as one, where neither has hooks and no hooks are on all modules: hooks see what they always saw, and so
    do ``torch.fx``, and who calls the layers one by one, or a slice of them.
    """

    @classmethod
    def from_torch(cls, module: nn.Sequential) -> Sequential:
        """Turns ``module``, a ``torch.nn.Sequential``, into one of this class in place; what is in it stays.

        Raises TypeError for anything else: a subclass may compute something else.
        """
        return convert(module, nn.Sequential, cls)

    def forward(self, input: Any) -> Any:
        # torch.fx follows a forward with what is no tensor, and is shown every layer
        whole = isinstance(input, Tensor) and not has_hooks_on_all()
        done = False  # by the layer before
        layers: list[Any] = [*self, None]
        for layer, after in pairwise(layers):
            if done:
                done = False
            elif whole and (slope := slope_of(after)) >= 0 and _takes_over(layer) and not has_hooks(after):
                input = layer.activated(input, slope)
                done = True
            else:
                input = layer(input)
        return input


def slope_of(act: nn.Module | None) -> float:
    """By what an ``nn.ReLU`` or ``nn.LeakyReLU`` multiplies what is negative; NaN for any other module.

    If it is negative the activation stays by itself: from a result's sign that of what it was could not be told.
    """
    # a subclass, or a forward of its own, may compute something else
    if type(act) not in (nn.ReLU, nn.LeakyReLU) or "forward" in vars(act):
        return float("nan")
    return float(act.negative_slope) if isinstance(act, nn.LeakyReLU) else 0.0


def _takes_over(layer: nn.Module) -> bool:
    """Whether ``layer`` is one of ours that can compute the activation after it on the way, unseen by hooks."""
    if "forward" in vars(layer) or has_hooks(layer):
        return False
    kind = parametrize.type_before_parametrizations(layer)
    if kind is BatchNormAct2d:
        return layer.act == "none"
    return kind in (Conv2d, ConvTranspose2d) and "_conv_forward" not in vars(layer)


def runs_in_order(module: nn.Module) -> bool:
    """Whether ``module`` is a Sequential, or of a subclass that runs as one."""
    kind: Any = type(module)
    return (
        isinstance(module, nn.Sequential)
        and "forward" not in vars(module)
        and kind.forward in (nn.Sequential.forward, Sequential.forward)
        and kind.__iter__ is nn.Sequential.__iter__
    )


@functools.cache
def class_for(kind: Any) -> type[nn.Sequential]:
    """``Sequential``, or for a subclass of torch's a subclass of that, of the same name, with our forward."""
    if kind.forward is Sequential.forward:
        return kind
    if kind is nn.Sequential:
        return Sequential

    class Ours(kind):
        forward = Sequential.forward

        def __reduce_ex__(self, protocol: Any) -> Any:
            reduced = super().__reduce_ex__(protocol)
            if type(self) is Ours and reduced[0] in _CONSTRUCTORS:  # by its name pickle would find ``kind``
                return empty, (class_for, kind), *reduced[2:]
            return reduced

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Ours, name, getattr(kind, name))
    return Ours


_CONSTRUCTORS = (copyreg.__newobj__, copyreg._reconstructor)  # type: ignore[attr-defined]  # of objects without their own
