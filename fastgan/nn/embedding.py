"""``Embedding``: torch's own class with ``fastgan.nn.functional.embedding`` in its forward."""

from __future__ import annotations

from torch import Tensor, nn

from fastgan.nn import functional
from fastgan.nn._convert import convert


class Embedding(nn.Embedding):
    """``torch.nn.Embedding``, the same in arguments, defaults, parameters, state dict and errors.

    It adds no state, so an existing module becomes one by ``Embedding.from_torch(module)``.
    """

    @classmethod
    def from_torch(cls, module: nn.Embedding) -> Embedding:
        """Turns ``module``, a ``torch.nn.Embedding``, into one of this class in place; its parameters and hooks stay.

        Raises TypeError for anything else: a subclass may compute something else.
        """
        return convert(module, nn.Embedding, cls)

    def forward(self, input: Tensor) -> Tensor:
        return functional.embedding(
            input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )
