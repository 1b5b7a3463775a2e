"""``LinearCrossEntropyLoss``: the language model's head and its loss as a module."""

from __future__ import annotations

from torch import Tensor, nn

from fastgan.nn import functional
from fastgan.nn._linear_cross_entropy_inputs import check_settings


class LinearCrossEntropyLoss(nn.Module):
    """``fastgan.nn.functional.linear_cross_entropy`` with its settings kept; it holds no parameters.

    The head's weight is handed to each call, so that it can be a tied embedding's:
    ``loss = criterion(hidden, embedding.weight, labels)``.

    Args:
        ignore_index, label_smoothing, reduction, z_loss, adversarial_radius: as the function's, with its defaults. The
            adversarial radius acts in training mode only.

    Settings out of range are refused when it is made, as by the function.

    Shapes and errors are the function's: ``forward(input (..., H), weight (V, H), target (...), bias (V,) or None)``.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        *,
        z_loss: float = 0.0,
        adversarial_radius: float = 0.0,
    ):
        super().__init__()
        check_settings(label_smoothing, reduction, z_loss, adversarial_radius)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.z_loss = z_loss
        self.adversarial_radius = adversarial_radius

    def forward(self, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear_cross_entropy(
            input,
            weight,
            target,
            bias,
            self.ignore_index,
            self.label_smoothing,
            self.reduction,
            z_loss=self.z_loss,
            adversarial_radius=self.adversarial_radius if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, reduction={self.reduction!r}, "
            f"z_loss={self.z_loss}, adversarial_radius={self.adversarial_radius}"
        )
