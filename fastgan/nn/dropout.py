"""``Dropout``: torch's own class with ``fastgan.nn.functional.dropout`` in its forward."""

from __future__ import annotations

from torch import Tensor, nn

from fastgan.nn import functional
from fastgan.nn._convert import convert


class Dropout(nn.Dropout):
    """``torch.nn.Dropout``, the same in arguments, defaults and errors; other numbers from the same generator.

    It adds no state, so an existing module becomes one by ``Dropout.from_torch(module)``.
    """

    @classmethod
    def from_torch(cls, module: nn.Dropout) -> Dropout:
        """Turns ``module``, a ``torch.nn.Dropout``, into one of this class in place; its hooks stay.

        Raises TypeError for anything else: a subclass may compute something else.
        """
        return convert(module, nn.Dropout, cls)

    def forward(self, input: Tensor) -> Tensor:
        return functional.dropout(input, self.p, self.training, self.inplace)
