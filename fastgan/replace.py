"""The one changed line: ``fastgan.replace_modules(model)``, and ``fastgan.explain(model)`` to see what it does.

A module becomes one of fastgan's by its ``__class__`` alone: the object, its parameters, buffers, hooks, flags and
names stay, and whoever holds it (an optimizer, a wrapper, another module) holds the same object. Only torch's exact
classes are swapped, since a subclass may compute something else.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from fastgan._hooks import has_hooks
from fastgan.nn.attention import MultiheadAttention
from fastgan.nn.container import Sequential, class_for, runs_in_order, slope_of
from fastgan.nn.conv import Conv2d, ConvTranspose2d, algorithm_of
from fastgan.nn.dropout import Dropout
from fastgan.nn.embedding import Embedding
from fastgan.nn.norm_act import BatchNormAct2d
from fastgan.ops.embedding import why_torch

_SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: Conv2d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.BatchNorm2d: BatchNormAct2d,
    nn.Dropout: Dropout,
    nn.Embedding: Embedding,
    nn.MultiheadAttention: MultiheadAttention,
}
_NOTHING = "fastgan has nothing for"
_OF_ITS_OWN = "computes attention itself and never asks for attn_implementation's"

State = Literal["swapped", "will be swapped", "left"]
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Row:
    """What ``explain`` says of one module.

    Attributes:
        name: as in ``model.named_modules()``; a module reached by several names has the first.
        type: the name of its class, now.
        state: "swapped" (it is one of fastgan's), "will be swapped" (by ``replace_modules``) or "left".
        becomes: the class of fastgan's that it has or will have, or "".
        reason: why it was left, or what to know.
    """

    name: str
    type: str
    state: State
    becomes: str = ""
    reason: str = ""


class Explanation(list[Row]):
    """The rows of ``explain``, a list that prints as a table."""

    def __str__(self) -> str:
        titles = ("module", "class", "fastgan", "why")
        # in a large model what fastgan has nothing for is counted by class, not listed
        folded = [row for row in self if row.reason.startswith(_NOTHING)] if len(self) > 60 else []
        lines = [
            (
                row.name or "(the model)",
                row.type,
                {"swapped": row.becomes, "will be swapped": f"-> {row.becomes}", "left": "-"}[row.state],
                row.reason,
            )
            for row in self
            if row not in folded
        ]
        widths = [max(len(line[i]) for line in [titles, *lines]) for i in range(3)]
        table = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]).rstrip()
            for line in [titles, tuple("-" * width for width in (*widths, 3)), *lines]
        ]
        counts = Counter(row.state for row in self)
        states: tuple[State, ...] = ("swapped", "will be swapped", "left")
        said = ", ".join(f"{counts[state]} {state}" for state in states if counts[state])
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(row.type for row in folded).most_common())
        return "\n".join([*table, *([f"{_NOTHING} {kinds}"] if kinds else []), said or "no modules"])

    __repr__ = __str__


def replace_modules(model: M) -> M:
    """Makes fastgan's modules of the torch modules in ``model``, in place, and returns ``model``.

    - ``nn.Conv2d``, ``nn.ConvTranspose2d``, ``nn.MultiheadAttention`` and ``nn.BatchNorm2d`` become fastgan.nn's
      ``Conv2d``, ``ConvTranspose2d``, ``MultiheadAttention`` and ``BatchNormAct2d``, which are subclasses of theirs.
    - ``nn.Embedding`` of 1 MB and more becomes fastgan.nn's, whose gradient lies in memory kept from step to step.
    - ``nn.Dropout`` becomes fastgan.nn's, which draws other numbers from the same generator.
    - An ``nn.Sequential`` in which a norm, or a convolution that has kernels here, comes before an ``nn.ReLU`` or
      ``nn.LeakyReLU`` becomes fastgan.nn's, which computes both as one where neither has hooks at the time of the call;
      one of a subclass that leaves the forward alone becomes one of a subclass of that, of the same name.
    - ``nn.TransformerEncoder.use_nested_tensor`` is switched off over replaced attention: evaluation without
      gradients computes at padded positions what training does, instead of zeros.
    - transformers models that run ``"sdpa"`` attention, or ``"eager"`` for want of it (GPT-OSS and others with sinks),
      are set to ``"fastgan"`` once ``fastgan.hf`` has registered it, and language models' heads and losses are fused: a
      call with labels in training mode returns no logits, unless ``return_logits=True`` is given. In those that
      generate text, ``nn.Linear`` and ``Conv1D`` become subclasses of theirs that are faster on few rows. GPT-2's GELU
      becomes one operation; in layers like BERT's, bias and GELU become one, and dropout, residual and norm another,
      which call neither module unless somebody put hooks on it.

    The same objects stay: parameters, buffers, their names and dtypes, hooks, parametrizations (spectral and weight
    norm of both kinds, pruning), training mode and requires_grad. State dicts are interchangeable with the unreplaced
    model's, optimizers made before are valid. Subclasses, lazy, scripted and quantized modules, and modules whose
    forward was overridden on the instance, are left as they are. Calling it again changes nothing.

    Quantize before calling it and not after: such tools look for exact classes.

    Args:
        model: any module, itself one of those above or holding some.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    _check(model)
    plan = list(_plan(model))  # decided as a whole before anything changes
    for decision in plan:
        decision.apply()
    _switch_transformers(model)
    return model


def explain(model: nn.Module) -> Explanation:
    """What ``replace_modules`` did to ``model`` or would do, a row a module, and why; ``print`` shows a table.

    Args:
        model: replaced already, or not yet; it is not changed.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    _check(model)
    return Explanation(decision.row for decision in _plan(model))


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


@dataclass
class _Decision:
    module: nn.Module
    row: Row
    target: type[nn.Module] | None = None
    attributes: dict[str, Any] | None = None  # set on the module

    def apply(self) -> None:
        if self.target is not None:
            _swap_class(self.module, self.target)
        for name, value in (self.attributes or {}).items():
            setattr(self.module, name, value)


def _swap_class(module: nn.Module, target: type[nn.Module]) -> None:
    if parametrize.is_parametrized(module):
        # Such a module has a class of its own, made by register_parametrization, with a property for each tensor. A
        # deep copy shares that class, so a new one is made.
        body = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
        target = type(f"Parametrized{target.__name__}", (target,), body)
    module.__class__ = target


def torch_type(module: nn.Module) -> type[nn.Module]:
    """The module's class, without what a parametrization made of it."""
    return parametrize.type_before_parametrizations(module)


def _plan(model: nn.Module) -> Iterator[_Decision]:
    named = list(model.named_modules())
    inner = {
        id(child) for _, module in named if isinstance(module, nn.MultiheadAttention) for child in module.children()
    }
    neighbours = {id(module): list(_neighbours(module)) for _, module in named}
    before = {id(act): layer for pairs in neighbours.values() for layer, act in pairs}
    # Both are None until fastgan.hf is imported.
    heads, layers = (sys.modules.get(f"fastgan.{name}") for name in ("_lm_heads", "_hf_layers"))
    of_transformers = layers.swaps(model) if layers else {}
    for name, module in named:
        kind = torch_type(module)
        if kind in _SWAPS and not obstacle_of(module):
            row = Row(name, type(module).__name__, "will be swapped", _SWAPS[kind].__name__, _how(module))
            yield _Decision(module, row, _SWAPS[kind])
        elif pairs := neighbours[id(module)]:
            target = class_for(kind)  # type: ignore[arg-type]  # a class is hashable
            state: State = "swapped" if type(module) is target else "will be swapped"
            reason = f"layer and activation as one: {len(pairs)}"
            yield _Decision(module, Row(name, type(module).__name__, state, Sequential.__name__, reason), target)
        elif isinstance(module, nn.TransformerEncoder) and _uses_nested_tensors(module):
            reason = "use_nested_tensor off: at padded positions evaluation computes what training does"
            row = Row(name, type(module).__name__, "will be swapped", "use_nested_tensor=False", reason)
            yield _Decision(module, row, None, {"use_nested_tensor": False})
        elif kind in _SWAPS.values():
            yield _Decision(module, Row(name, type(module).__name__, "swapped", kind.__name__, _how(module)))
        elif id(module) in of_transformers and not obstacle_of(module):
            target, reason = of_transformers[id(module)]
            state = "swapped" if kind is target else "will be swapped"
            row = Row(name, type(module).__name__, state, target.__name__, reason)
            yield _Decision(module, row, None if kind is target else target)
        elif heads is not None and heads.is_language_model(module):
            becomes, why = "fused head and loss", "labels in training mode: no logits, unless return_logits=True"
            if heads.is_fused(module):
                yield _Decision(module, Row(name, type(module).__name__, "swapped", becomes, why))
            elif obstacle := heads.why_not(module):
                yield _Decision(module, Row(name, type(module).__name__, "left", reason=obstacle))
            else:
                row = Row(name, type(module).__name__, "will be swapped", becomes, why)
                yield _Decision(module, row, heads.fused_class(type(module)))
        elif (used := _attention_implementation(module)) is not None:
            why = _OF_ITS_OWN if not _asks_for_attention(module) else _why_not_transformers(module, used)
            if why:
                yield _Decision(module, Row(name, type(module).__name__, "left", reason=why))
            else:
                state = "swapped" if used == "fastgan" else "will be swapped"
                yield _Decision(module, Row(name, type(module).__name__, state, 'attn_implementation="fastgan"'))
        elif id(module) not in inner and _is_worth_a_row(name, module):
            reason = _as_one(before[id(module)], module) if id(module) in before else _why_left(module, kind)
            yield _Decision(module, Row(name, type(module).__name__, "left", reason=reason))


def _how(module: nn.Module) -> str:
    """What to know of a module that is swapped."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        return algorithm_of(module)
    return f"with the {module.act}" if isinstance(module, BatchNormAct2d) and module.act != "none" else ""


def in_sequence(module: nn.Module) -> dict[str, nn.Module]:
    """What a Sequential, or a subclass that runs as one, runs one after another; empty for any other module."""
    if not runs_in_order(module):
        return {}
    return {name: child for name, child in module._modules.items() if child is not None}


def _neighbours(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(layer, activation) in a Sequential, which ours computes as one unless there are hooks."""
    plain = torch_type(module) is type(module)
    for layer, act in pairwise(in_sequence(module).values() if plain else ()):
        if slope_of(act) >= 0 and _can_take_over(layer):
            yield layer, act


def _can_take_over(layer: Any) -> bool:
    """Whether an activation can be part of ``layer``, now or once it is swapped, and gains from it."""
    kind = torch_type(layer)
    if obstacle_of(layer):
        return False
    if kind in (nn.Conv2d, nn.ConvTranspose2d, Conv2d, ConvTranspose2d):
        return algorithm_of(layer) != "torch"
    return kind is nn.BatchNorm2d or (kind is BatchNormAct2d and layer.act == "none")


def _as_one(layer: nn.Module, act: nn.Module) -> str:
    one = f"as one with the {torch_type(layer).__name__} before it"
    return f"{one}, but for hooks that are there now" if has_hooks(layer) or has_hooks(act) else one


def _uses_nested_tensors(encoder: nn.TransformerEncoder) -> bool:
    if not getattr(encoder, "use_nested_tensor", False):
        return False
    attentions = [m for m in encoder.modules() if isinstance(m, nn.MultiheadAttention)]
    return any(
        torch_type(m) is MultiheadAttention or (torch_type(m) in _SWAPS and not obstacle_of(m)) for m in attentions
    )


def obstacle_of(module: nn.Module) -> str:
    """Why a module of one of torch's exact classes is left nevertheless."""
    overridden = [name for name in ("forward", "_conv_forward") if name in vars(module)]
    if overridden:
        return f"its {overridden[0]} was overridden on the instance"
    if isinstance(module, nn.Dropout) and module.inplace:
        return "inplace=True is torch's own"
    if isinstance(module, nn.Embedding):
        return why_torch(module.weight, module.max_norm, module.scale_grad_by_freq, module.sparse)
    return ""


def _is_worth_a_row(name: str, module: nn.Module) -> bool:
    if isinstance(module, tuple(_SWAPS)):
        return True
    if "parametrizations" in name.split(".") or isinstance(module, nn.Identity):
        return False
    return next(module.children(), None) is None


def _why_left(module: nn.Module, kind: type[nn.Module]) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript"
    if isinstance(module, LazyModuleMixin):
        return "lazy: call replace_modules again after the first forward"
    if kind.__module__.startswith("torch.ao."):
        return "quantized"
    if kind in _SWAPS:
        return obstacle_of(module)
    for torch_class in _SWAPS:
        if isinstance(module, torch_class):
            return f"a subclass of nn.{torch_class.__name__} may compute something else"
    if kind in (nn.ReLU, nn.LeakyReLU):
        return "nothing directly before it in a Sequential takes it over"
    return f"{_NOTHING} {kind.__name__}"


def _attention_implementation(module: nn.Module) -> str | None:
    """What a transformers attention module runs; None for any other. transformers is never imported from here."""
    if "transformers.modeling_utils" not in sys.modules or not type(module).__name__.endswith("Attention"):
        return None
    if any(type(child).__name__.endswith("Attention") for child in module.children()):
        return None  # it is around the one that computes
    used = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return "" if used is None and type(module).__module__.startswith("transformers.") else used


def _asks_for_attention(module: nn.Module) -> bool:
    """Whether a transformers module calls the attention function of its configuration, or has only one of its own."""
    functions = [inspect.unwrap(f) for kind in type(module).__mro__ for f in vars(kind).values() if callable(f)]
    return any("ALL_ATTENTION_FUNCTIONS" in f.__code__.co_names for f in functions if hasattr(f, "__code__"))


def _begins_with_eager(module: nn.Module) -> bool:
    """Whether transformers has nothing but "eager" for this model, so that nobody asked for it."""
    sinks = sys.modules.get("fastgan._hf_sinks")
    return sinks is not None and getattr(module.config, "model_type", None) in sinks.SINKS_ALONE


def _why_not_transformers(module: nn.Module, used: str) -> str:
    """Empty if ``replace_modules`` switches attention from ``used`` to "fastgan", or has."""
    if used == "fastgan" or (used == "eager" and _begins_with_eager(module)):
        return ""
    if used != "sdpa":
        return f'attn_implementation is "{used}": asked for, or what this model begins with'
    registered = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    if "fastgan" not in registered.valid_keys():
        return 'attn_implementation is "sdpa"; import fastgan.hf first'
    return ""


def _switch_transformers(model: nn.Module) -> None:
    pretrained = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if pretrained is None:
        return
    for module in model.modules():  # an outer model before those inside, which it sets as well
        if isinstance(module, pretrained):
            used = module.config._attn_implementation
            if used is None or used == "fastgan" or _why_not_transformers(module, used):
                continue
            if any(_attention_implementation(m) and _asks_for_attention(m) for m in module.modules()):
                module.set_attn_implementation("fastgan")
