"""``fastgan.fold_norms(model)``: a copy for evaluation in which norms and activations cost nothing.

In evaluation a batch norm is a factor and a shift a channel. The factor goes into the weights of the convolution before
it, the shift becomes its bias, and the activation is applied where the convolution writes its results: two passes over
memory less for each layer.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastgan.nn.activation import FusedLeakyReLU, FusedReLU
from fastgan.nn.conv import Conv2d, ConvTranspose2d
from fastgan.nn.norm_act import BatchNormAct2d
from fastgan.ops import conv as _conv

M = TypeVar("M", bound=nn.Module)

_NORMS = (nn.BatchNorm2d, BatchNormAct2d)
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, FusedReLU, FusedLeakyReLU)


class FoldedConv2d(Conv2d):
    """A convolution that multiplies what is negative in its result by ``slope``."""

    slope: float = 1.0

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return _conv.convolution(
            input, weight, bias, self.stride, padding, self.dilation, self.groups, self.slope  # type: ignore[arg-type]
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slope={self.slope}"


class FoldedConvTranspose2d(ConvTranspose2d):
    """A transposed convolution that multiplies what is negative in its result by ``slope``."""

    slope: float = 1.0

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        extra = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation  # type: ignore[arg-type]
        )  # fmt: skip
        return _conv.transposed_convolution(
            input, self.weight, self.bias, self.stride, self.padding, extra, self.groups, self.dilation,  # type: ignore[arg-type]
            self.slope,
        )  # fmt: skip

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
    if type(module).forward is not nn.Sequential.forward or "forward" in vars(module):
        return
    names = [name for name, child in module._modules.items() if child is not None]
    children = [module._modules[name] for name in names]

    def is_free(child: nn.Module | None) -> bool:
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return slots[id(child)] == 1 and not any(getattr(child, each) for each in hooks)

    for i, conv in enumerate(children):
        if parametrize.type_before_parametrizations(conv) not in _FOLDED or not is_free(conv):  # type: ignore[arg-type]
            continue
        if "forward" in vars(conv) or "_conv_forward" in vars(conv):
            continue
        end = i + 1
        if end < len(children) and type(children[end]) in _NORMS and is_free(children[end]):
            norm = children[end]
            if norm.running_mean is None or norm.running_var is None:  # type: ignore[union-attr]
                continue
            end += 1
        if end < len(children) and type(children[end]) in _ACTIVATIONS and is_free(children[end]):
            end += 1
        if end > i + 1:
            yield names[i:end]


def _fold(module: nn.Module, names: list[str]) -> None:
    conv, *after = (module._modules[name] for name in names)
    assert isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d))
    norm = after[0] if isinstance(after[0], nn.BatchNorm2d) else None
    with torch.no_grad():
        weight, bias = (conv.weight, conv.bias) if norm is None else _folded(conv, norm)
    kind = _FOLDED[parametrize.type_before_parametrizations(conv)]
    # A new module: a parametrized one has a class that it shares with its copies.
    folded = kind(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,  # type: ignore[arg-type]
        dilation=conv.dilation, groups=conv.groups, bias=False, padding_mode=conv.padding_mode, device="meta",  # type: ignore[arg-type]
    )  # fmt: skip
    if isinstance(conv, nn.ConvTranspose2d):
        folded.output_padding = conv.output_padding
    folded.weight = nn.Parameter(weight.detach().clone())
    folded.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    folded.slope = 1.0
    for each in after:
        folded.slope *= _slope(each)
    module._modules[names[0]] = folded.eval()
    for name in names[1:]:
        module._modules[name] = nn.Identity()


def _slope(module: nn.Module | None) -> float:
    """By which a module multiplies what is negative; a fused activation leaves that to the norm before it."""
    if isinstance(module, BatchNormAct2d):
        return {"none": 1.0, "relu": 0.0, "leaky_relu": float(module.negative_slope)}[module.act]
    if isinstance(module, (FusedReLU, FusedLeakyReLU, nn.BatchNorm2d)):
        return 1.0
    return float(module.negative_slope) if isinstance(module, nn.LeakyReLU) else 0.0


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
    last = _conv.is_channels_last(conv.weight)
    format = torch.channels_last if last else torch.contiguous_format
    return weight.to(conv.weight.dtype).contiguous(memory_format=format), shift.to(conv.weight.dtype)
