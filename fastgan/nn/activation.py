"""What stands in an activation's place once ``BatchNormAct2d`` before it has taken the activation over."""

from __future__ import annotations

from torch import Tensor, nn


class FusedReLU(nn.ReLU):
    """Returns its input: the ``BatchNormAct2d`` before it has applied the ReLU; its own hooks fire."""

    def forward(self, input: Tensor) -> Tensor:
        return input

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), "in the norm before it")))


class FusedLeakyReLU(nn.LeakyReLU):
    """Returns its input: the ``BatchNormAct2d`` before it has applied the LeakyReLU; see ``FusedReLU``."""

    def forward(self, input: Tensor) -> Tensor:
        return input

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, in the norm before it"
