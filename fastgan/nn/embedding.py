"""``Embedding``: torch's own class with ``fastgan.nn.functional.embedding`` in its forward."""

from __future__ import annotations

from torch import Tensor, nn

from fastgan.nn import functional
from fastgan.ops.embedding import LARGE


class Embedding(nn.Embedding):
    """``torch.nn.Embedding``, the same in arguments, defaults, parameters, state dict and errors.

    It adds no state, so an existing module becomes one by ``Embedding.from_torch(module)``.
    """

    @classmethod
    def from_torch(cls, module: nn.Embedding) -> Embedding:
        """Turns ``module``, a ``torch.nn.Embedding``, into one of this class in place; its parameters and hooks stay.

        Raises TypeError for anything else: a subclass may compute something else.
        """
        if type(module) not in (nn.Embedding, cls):
            raise TypeError(f"module must be a torch.nn.Embedding, got {type(module).__name__}")
        module.__class__ = cls
        return module  # type: ignore[return-value]

    def forward(self, input: Tensor) -> Tensor:
        return functional.embedding(
            input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )


def why_not(module: nn.Embedding) -> str:
    """Why torch's own serves a table as well; empty where ours pays."""
    if module.sparse:
        return "sparse=True: its gradient is not as large as the table"
    if module.max_norm is not None or module.scale_grad_by_freq:
        return "max_norm and scale_grad_by_freq are torch's own"
    if module.weight.numel() * module.weight.element_size() < LARGE:
        return "its table is smaller than 1 MB"
    return ""
