"""``fastgan.fold_norms(model)``: a copy for evaluation in which norms and activations cost nothing.

In evaluation a batch norm is a factor and a shift a channel. The factor goes into the weights of the convolution before
it, the shift becomes its bias, and the activation is applied where the convolution writes its results: two passes over
memory less for each layer.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastgan._hooks import has_hooks
from fastgan.nn.container import slope_of
from fastgan.nn.conv import Conv2d, ConvTranspose2d
from fastgan.nn.norm_act import BatchNormAct2d
from fastgan.ops._layout import format_like
from fastgan.replace import in_sequence, obstacle_of, torch_type

M = TypeVar("M", bound=nn.Module)

_NORMS = (nn.BatchNorm2d, BatchNormAct2d)
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU)


class FoldedConv2d(Conv2d):
    """A convolution with a norm or an activation, or both, in it."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slope={self.slope}"


class FoldedConvTranspose2d(ConvTranspose2d):
    """A transposed convolution with a norm or an activation, or both, in it."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slope={self.slope}"


_FOLDED: dict[type[nn.Module], type[FoldedConv2d] | type[FoldedConvTranspose2d]] = {
    nn.Conv2d: FoldedConv2d,
    Conv2d: FoldedConv2d,
    nn.ConvTranspose2d: FoldedConvTranspose2d,
    ConvTranspose2d: FoldedConvTranspose2d,
}


def fold_norms(model: M) -> M:
    """A copy of ``model`` in evaluation mode, its batch norms and activations folded into the convolutions before them.

    Folded is what follows one another in an ``nn.Sequential``: a convolution, or a transposed one, of torch's or
    fastgan's own class; the ``BatchNorm2d`` (or ``BatchNormAct2d``) after it, if it has running statistics; the ReLU or
    LeakyReLU after that. In the place of the two stands ``nn.Identity``. Left as they are: subclasses, modules with
    hooks, modules that are used twice. Parametrized weights (spectral norm) are computed once, as evaluation does.

    Equals ``model.eval()`` up to rounding. The copy is for sampling and serving: it has other entries in its state
    dict, and training it would not train the norms. Keep ``model`` for both.

    Args:
        model: any module; it is not changed.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    folded = copy.deepcopy(model).eval()
    slots = Counter(id(child) for module in folded.modules() for child in module._modules.values() if child is not None)
    for module in list(folded.modules()):
        for names in _runs(module, slots):
            _fold(module, names)
    return folded


def _runs(module: nn.Module, slots: Counter[int]) -> Iterator[list[str]]:
    """Names of a convolution and of the one or two modules after it in a Sequential that go into it."""
    children = in_sequence(module)
    names = list(children)

    def is_free(name: str) -> bool:
        child = children[name]
        return slots[id(child)] == 1 and not has_hooks(child) and not obstacle_of(child)

    for i, name in enumerate(names):
        if torch_type(children[name]) not in _FOLDED or not is_free(name):
            continue
        end = i + 1
        if end < len(names) and type(norm := children[names[end]]) in _NORMS and is_free(names[end]):
            if norm.running_mean is None or norm.running_var is None:
                continue
            end += 1
        if end < len(names) and type(children[names[end]]) in _ACTIVATIONS and is_free(names[end]):
            end += 1
        if end > i + 1:
            yield names[i:end]


def _fold(module: nn.Module, names: list[str]) -> None:
    conv, *after = (module._modules[name] for name in names)
    assert isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d))
    norm = after[0] if isinstance(after[0], nn.BatchNorm2d) else None
    with torch.no_grad():
        weight, bias = (conv.weight, conv.bias) if norm is None else _folded(conv, norm)
    kind = _FOLDED[torch_type(conv)]
    # A new module: a parametrized one has a class that it shares with its copies.
    folded = kind(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,  # type: ignore[arg-type]
        dilation=conv.dilation, groups=conv.groups, bias=False, padding_mode=conv.padding_mode, device="meta",  # type: ignore[arg-type]
    )  # fmt: skip
    if isinstance(conv, nn.ConvTranspose2d):
        folded.output_padding = conv.output_padding
    folded.weight = nn.Parameter(weight.detach().clone())
    folded.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    folded.slope = math.prod(map(_slope, after))
    module._modules[names[0]] = folded.eval()
    for name in names[1:]:
        module._modules[name] = nn.Identity()


def _slope(module: nn.Module | None) -> float:
    """By which a module multiplies what is negative."""
    if isinstance(module, BatchNormAct2d):
        return {"none": 1.0, "relu": 0.0, "leaky_relu": float(module.negative_slope)}[module.act]
    return 1.0 if isinstance(module, nn.BatchNorm2d) else slope_of(module)


def _folded(conv: nn.Conv2d | nn.ConvTranspose2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias that give what ``norm`` makes of the convolution's result, computed in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -norm.running_mean.double()
    if conv.bias is not None:
        shift = shift + conv.bias.double()
    shift = shift * factor
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    weight = conv.weight.double()
    if isinstance(conv, nn.ConvTranspose2d):
        # (channels, outputs / groups, ...), a group's channels one after another
        parts = weight.unflatten(0, (conv.groups, -1))
        weight = (parts * factor.reshape(conv.groups, 1, -1, 1, 1)).flatten(0, 1)
    else:
        weight = weight * factor[:, None, None, None]
    format = format_like(conv.weight)
    return weight.to(conv.weight.dtype).contiguous(memory_format=format), shift.to(conv.weight.dtype)
