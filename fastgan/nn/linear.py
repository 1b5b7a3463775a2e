"""``Linear``: torch's own class with ``fastgan.nn.functional.linear`` in its forward."""

from __future__ import annotations

from torch import Tensor, nn

from fastgan.nn import functional
from fastgan.nn._convert import convert


class Linear(nn.Linear):
    """``torch.nn.Linear``, the same in arguments, defaults, parameters, state dict and errors.

    It adds no state, so an existing module becomes one by ``Linear.from_torch(module)``.
    """

    @classmethod
    def from_torch(cls, module: nn.Linear) -> Linear:
        """Turns ``module``, a ``torch.nn.Linear``, into one of this class in place; its parameters and hooks stay.

        Raises TypeError for anything else: a subclass may compute something else.
        """
        return convert(module, nn.Linear, cls)

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)
