"""Layers of transformers' models that become faster subclasses of theirs.

Products in models that generate text run ``fastgan.nn.functional.linear``'s kernel: a step of generation has one row a
sequence, and reads every weight for it. Only these models' are swapped: a layer that sees more rows, or wants
gradients, runs torch's product either way.

``NewGELUActivation``, GPT-2's, is written as eight operations, each with a tensor of its own that is kept for the
backward; torch has the same formula as one.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel, activations, pytorch_utils

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
        return F.gelu(input, approximate="tanh")


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
                kind = table.get(kind, kind)
                if kind in table.values():
                    found[id(layer)] = kind, _WHY[kind]
    return found
