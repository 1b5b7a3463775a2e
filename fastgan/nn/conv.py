"""Convolution modules: torch's own classes with ``fastgan.nn.functional`` in their forward."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.nn._convert import convert
from fastgan.nn._functional import convolution
from fastgan.ops import conv as _conv


def algorithm_of(module: nn.Conv2d | nn.ConvTranspose2d) -> str:
    """How ``module`` computes on the CPU in float32: "winograd F(4,2)", "winograd F(4,3)", "direct" or "torch".

    Ours is taken where the sizes of the input make it faster (``fastgan.ops.conv.pays``).
    """
    if _conv.get_conv_algorithm() == "exact":
        return "torch"
    outputs, channels = module.out_channels, module.in_channels
    if isinstance(module, nn.ConvTranspose2d):
        outputs, channels = channels, outputs
    return _conv.algorithm_name(module.kernel_size, module.stride, module.dilation, module.groups, channels, outputs)


class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d``, the same in arguments, defaults, parameters, state dict and errors.

    It adds no state, so an existing module becomes one by ``Conv2d.from_torch(module)``.
    """

    #: by which what is negative in the result is multiplied; ``fastgan.fold_norms`` makes copies with another
    slope: float = 1.0

    @classmethod
    def from_torch(cls, module: nn.Conv2d) -> Conv2d:
        """Turns ``module``, a ``torch.nn.Conv2d``, into one of this class in place; its parameters and hooks stay.

        Raises TypeError for anything else: a subclass may compute something else.
        """
        return convert(module, nn.Conv2d, cls)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._convolve(input, weight, bias, self.slope)

    def activated(self, input: Tensor, slope: float) -> Tensor:
        """``F.leaky_relu(self(input), slope)``, or ``F.relu`` if ``slope`` is 0, as one.

        Results are written with the activation, and gradients read through its derivative. Hooks do not fire.
        """
        return self._convolve(input, self.weight, self.bias, slope * self.slope)

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None, slope: float) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return convolution._conv2d(
            input, weight, bias, self.stride, padding, self.dilation, self.groups, slope  # type: ignore[arg-type]
        )  # fmt: skip


class ConvTranspose2d(nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d``, the same in arguments, defaults, parameters, state dict and errors.

    It adds no state, so an existing module becomes one by ``ConvTranspose2d.from_torch(module)``.
    """

    slope: float = 1.0  # as Conv2d's

    @classmethod
    def from_torch(cls, module: nn.ConvTranspose2d) -> ConvTranspose2d:
        """Turns ``module``, a ``torch.nn.ConvTranspose2d``, into one of this class, as ``Conv2d.from_torch``."""
        return convert(module, nn.ConvTranspose2d, cls)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """``output_size`` (H, W) chooses among the sizes that stride makes ambiguous, as in torch."""
        return self._convolve(input, output_size, self.slope)

    def activated(self, input: Tensor, slope: float) -> Tensor:
        """As ``Conv2d.activated``."""
        return self._convolve(input, None, slope * self.slope)

    def _convolve(self, input: Tensor, output_size: list[int] | None, slope: float) -> Tensor:
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            2,
            self.dilation,  # type: ignore[arg-type]
        )
        return convolution._conv_transpose2d(
            input,
            self.weight,
            self.bias,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            output_padding,
            self.groups,
            self.dilation,  # type: ignore[arg-type]
            slope,
        )
