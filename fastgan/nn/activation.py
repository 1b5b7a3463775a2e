"""What stands in an activation's place once the norm or the convolution before it has taken the activation over."""

from __future__ import annotations

from torch import Tensor, nn


class FusedReLU(nn.ReLU):
    """Returns its input: the layer before it has applied the ReLU; its own hooks fire."""

    def forward(self, input: Tensor) -> Tensor:
        return input

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), "in the layer before it")))


class FusedLeakyReLU(nn.LeakyReLU):
    """Returns its input: the layer before it has applied the LeakyReLU; see ``FusedReLU``."""

    def forward(self, input: Tensor) -> Tensor:
        return input

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, in the layer before it"
