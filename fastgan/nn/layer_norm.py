"""``DropoutAddLayerNorm``: ``fastgan.nn.functional.dropout_add_layer_norm`` as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastgan.nn import functional


class DropoutAddLayerNorm(nn.LayerNorm):
    """``layer_norm(dropout(input) + residual)``: a ``torch.nn.LayerNorm`` over the last dimension, with its state.

    ``module(input, residual)`` gives the output, with ``prenorm=True`` (output, sum); see
    ``fastgan.nn.functional.dropout_add_layer_norm`` for shapes, dtypes and errors.

    Args:
        normalized_shape: the features, one number.
        p: the share of the input that is dropped in training.
        prenorm: return the sum as well, for the next residual.
        eps, elementwise_affine, bias, device, dtype: as ``torch.nn.LayerNorm``.

    Raises:
        ValueError: more than one dimension in ``normalized_shape``, or p outside [0, 1].
    """

    def __init__(self, normalized_shape: Any, p: float = 0.0, prenorm: bool = False, **options: Any) -> None:
        super().__init__(normalized_shape, **options)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"normalized_shape must be one number, got {self.normalized_shape}")
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p must be in [0, 1], got {p}")
        self.p, self.prenorm = p, prenorm

    def forward(self, input: Tensor, residual: Tensor) -> Any:  # type: ignore[override]
        return functional.dropout_add_layer_norm(
            input, residual, self.weight, self.bias, self.p, self.eps, training=self.training, prenorm=self.prenorm
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}, prenorm={self.prenorm}"
