"""Layers of transformers' models that become faster subclasses of theirs.

Products in models that generate text run ``fastgan.nn.functional.linear``'s kernel: a step of generation has one row a
sequence, and reads every weight for it. Only these models' are swapped: a layer that sees more rows, or wants
gradients, runs torch's product either way.

In the layers of BERT and its kin, dropout, residual and norm at their ends become one operation
(``fastgan.nn.functional.dropout_add_layer_norm``), bias and GELU in their middle another: ``BertSelfOutput``,
``BertOutput``, ``BertIntermediate`` and those of the same text.

``NewGELUActivation``, GPT-2's, is written as eight operations, each with a tensor of its own that is kept for the
backward; torch has the same formula as one.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel, activations, pytorch_utils

from fastgan._hooks import has_hooks
from fastgan.nn import functional
from fastgan.nn._functional._kernels import pays_on_cpu
from fastgan.nn.dropout import Dropout
from fastgan.nn.linear import Linear
from fastgan.ops.linear import few_rows


class Conv1D(pytorch_utils.Conv1D):
    """transformers' ``Conv1D``, a linear layer whose weight is (inputs, outputs), with the same state."""

    def forward(self, x: Tensor) -> Tensor:
        output = few_rows(x, self.weight, self.bias, by_depth=True)
        return super().forward(x) if output is None else output


class NewGELUActivation(activations.NewGELUActivation):
    """transformers' GELU by tanh, in one operation forward and one backward."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.gelu(input, "tanh")


def _elsewhere(input: Tensor) -> bool:
    """Where the fused operations do not run, the layer's own text is the faster: a product adds its bias itself, and
    under autocast a bias added after it would make float32 of what follows."""
    return not pays_on_cpu((input,), 0) or torch.is_autocast_enabled("cpu")


def _unseen(*modules: nn.Module) -> bool:
    """Whether nobody would notice that the modules are not called."""
    return not any(has_hooks(each) or "forward" in vars(each) for each in modules)


def _is_plain(norm: nn.Module, drop: nn.Module) -> bool:
    """Whether the two may become one with the residual, and nobody could see it."""
    if type(norm) is not nn.LayerNorm or type(drop) not in (nn.Dropout, Dropout):
        return False
    return _unseen(norm, drop)


class _LayerEnd(nn.Module):
    """Of the forward that BertSelfOutput and BertOutput have: a product, then dropout, residual and norm."""

    dense: nn.Linear
    dropout: nn.Dropout
    LayerNorm: nn.LayerNorm

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        hidden_states, norm, drop = self.dense(hidden_states), self.LayerNorm, self.dropout
        if _elsewhere(hidden_states) or not _is_plain(norm, drop):
            return norm(drop(hidden_states) + input_tensor)
        output = functional.dropout_add_layer_norm(
            hidden_states, input_tensor, norm.weight, norm.bias, drop.p, norm.eps, training=drop.training
        )
        assert isinstance(output, Tensor)
        return output


class _LayerMiddle(nn.Module):
    """Of the forward that BertIntermediate has: a product, then an activation."""

    dense: nn.Linear
    intermediate_act_fn: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        dense, act = self.dense, self.intermediate_act_fn
        if _elsewhere(hidden_states) or not _is_gelu_of_linear(dense, act):
            return act(dense(hidden_states))
        return functional.gelu(F.linear(hidden_states, dense.weight), bias=dense.bias)


def _is_gelu_of_linear(dense: nn.Module, act: Any) -> bool:
    """Whether the bias may be added with the GELU, and nobody could see it."""
    if type(act) is not activations.GELUActivation or act.act is not F.gelu:
        return False
    if type(dense) not in (nn.Linear, Linear) or dense.bias is None:
        return False
    return _unseen(dense, act)


#: models whose layers have that text, and the folders of their modules
_LIKE_BERT = {
    "Bert": "bert", "Roberta": "roberta", "XLMRoberta": "xlm_roberta", "Camembert": "camembert", "Electra": "electra",
    "Ernie": "ernie", "LayoutLM": "layoutlm", "BertGeneration": "bert_generation",
}  # fmt: skip


def _module_of(name: str) -> str | None:
    """transformers' module that has the part of a layer of that name."""
    for end in ("SelfOutput", "Output", "Intermediate"):
        folder = _LIKE_BERT.get(name.removesuffix(end)) if name.endswith(end) else None
        if folder is not None:
            return f"transformers.models.{folder}.modeling_{folder}"
    return None


def __getattr__(name: str) -> Any:
    """The class for transformers' class of that name. Made when it is asked for, also by pickle: only then is the
    model's module loaded."""
    module = _module_of(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    theirs = getattr(importlib.import_module(module), name)
    ours = _LayerMiddle if name.endswith("Intermediate") else _LayerEnd
    made = type(name, (ours, theirs), {"__module__": __name__, "__doc__": f"transformers' ``{name}``, fused."})
    globals()[name] = made
    return made


def _layer_part(kind: type[nn.Module]) -> type[nn.Module] | None:
    if issubclass(kind, (_LayerEnd, _LayerMiddle)):
        return kind
    if _module_of(kind.__name__) != kind.__module__:
        return None
    return getattr(sys.modules[__name__], kind.__name__)


_PRODUCTS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Linear, pytorch_utils.Conv1D: Conv1D}
_ANYWHERE: dict[type[nn.Module], type[nn.Module]] = {activations.NewGELUActivation: NewGELUActivation}
_WHY = {Linear: "up to 32 rows, as generation has them", Conv1D: "up to 32 rows, as generation has them",
        NewGELUActivation: "as one operation"}  # fmt: skip


def swaps(model: nn.Module) -> dict[int, tuple[type[nn.Module], str]]:
    """id of a layer below ``model`` -> the class that it has or gets, and what that is for."""
    found = {}
    for inner in model.modules():
        if isinstance(inner, PreTrainedModel):
            table = _ANYWHERE | (_PRODUCTS if inner.can_generate() else {})
            for layer in inner.modules():
                kind = parametrize.type_before_parametrizations(layer)
                part = _layer_part(kind)
                if part is not None:
                    what = "dropout, residual and norm" if issubclass(part, _LayerEnd) else "bias and GELU"
                    found[id(layer)] = part, f"{what} as one operation"
                    continue
                kind = table.get(kind, kind)
                if kind in table.values():
                    found[id(layer)] = kind, _WHY[kind]
    return found
