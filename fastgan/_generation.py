"""The products of transformers' models that generate text, by ``fastgan.nn.functional.linear``'s kernel.

A step of generation has one row a sequence, and reads every weight for it. Only these models' layers are swapped: a
layer that sees more rows, or wants gradients, runs torch's product either way.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel, pytorch_utils

from fastgan.nn.linear import Linear
from fastgan.ops.linear import few_rows


class Conv1D(pytorch_utils.Conv1D):
    """transformers' ``Conv1D``, a linear layer whose weight is (inputs, outputs), with the same state."""

    def forward(self, x: Tensor) -> Tensor:
        output = few_rows(x, self.weight, self.bias, by_depth=True)
        return super().forward(x) if output is None else output


SWAPS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Linear, pytorch_utils.Conv1D: Conv1D}


def products(model: nn.Module) -> dict[int, type[nn.Module]]:
    """id of a layer below ``model`` that belongs to a model which generates -> the class that it has or gets."""
    found = {}
    for inner in model.modules():
        if isinstance(inner, PreTrainedModel) and inner.can_generate():
            for layer in inner.modules():
                kind = parametrize.type_before_parametrizations(layer)
                if kind in SWAPS or kind in SWAPS.values():
                    found[id(layer)] = SWAPS.get(kind, kind)
    return found
