"""Batch norm and activation as one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgan.nn import functional
from fastgan.nn._convert import convert
from fastgan.ops.norm_act import ACTIVATIONS


class BatchNormAct2d(nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` and the activation after it in one pass; parameters, buffers and state dict are its.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as ``torch.nn.BatchNorm2d``'s.
        act: "none", "relu" or "leaky_relu".
        negative_slope: of "leaky_relu".
        groups: in training, so many equal parts of the batch have statistics of their own, as so many calls would; the
            running statistics move, and ``num_batches_tracked`` counts, once a part.
        bias: False leaves the shift out (torch >= 2.12 has it).

    Shape: (N, C, H, W) to the same. Errors: as ``batch_norm_act``; ValueError for another rank.
    """

    # Defaults of the class, not set by __init__: a BatchNorm2d becomes one of these by its __class__ alone.
    act: str = "none"
    negative_slope: float = 0.01
    groups: int = 1

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        act: str = "none",
        negative_slope: float = 0.01,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)
        self._set(act, negative_slope, groups)

    def _set(self, act: str, negative_slope: float, groups: int) -> None:
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {ACTIVATIONS}, got {act!r}")
        if groups < 1:
            raise ValueError(f"groups must be positive, got {groups}")
        self.act, self.negative_slope, self.groups = act, negative_slope, groups

    @classmethod
    def from_torch(
        cls, module: nn.BatchNorm2d, *, act: str = "none", negative_slope: float = 0.01, groups: int = 1
    ) -> BatchNormAct2d:
        """Turns ``module``, a ``torch.nn.BatchNorm2d``, into one of this class in place.

        Parameters, buffers, hooks, training flag, eps, momentum, affine and track_running_stats stay as they are.
        Raises TypeError for anything else (a subclass may compute something else), ValueError for an unknown act.
        """
        before = module.__class__
        converted = convert(module, nn.BatchNorm2d, cls)
        try:
            converted._set(act, negative_slope, groups)
        except ValueError:
            module.__class__ = before
            raise
        return converted

    def forward(self, input: Tensor) -> Tensor:
        return self._normalize(input, self.act, self.negative_slope)

    def activated(self, input: Tensor, slope: float) -> Tensor:
        """``F.leaky_relu(self(input), slope)``, or ``F.relu`` if ``slope`` is 0, in one pass; ``act`` must be "none".

        Hooks do not fire.
        """
        assert self.act == "none"
        return self._normalize(input, "leaky_relu" if slope else "relu", slope)

    def _normalize(self, input: Tensor, act: str, negative_slope: float) -> Tensor:
        self._check_input_dim(input)
        # As torch: statistics of the batch in training and where there are no others; only tracked ones move.
        batch_statistics = self.training or (self.running_mean is None and self.running_var is None)
        tracked = not self.training or self.track_running_stats
        running_mean = self.running_mean if tracked else None
        running_var = self.running_var if tracked else None
        moves = self.training and self.track_running_stats and self.num_batches_tracked is not None
        # Without momentum the average is cumulative, so each part of the batch has a weight of its own.
        if moves and self.momentum is None and self.groups > 1:
            return self._normalize_cumulative(input, act, negative_slope)
        factor = 0.0 if self.momentum is None else self.momentum
        if moves:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(self.groups)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        return functional.batch_norm_act(
            input,
            running_mean,
            running_var,
            self.weight,
            self.bias,
            batch_statistics,
            factor,
            self.eps,
            act,
            negative_slope,
            self.groups if self.training else 1,
        )

    def _normalize_cumulative(self, input: Tensor, act: str, negative_slope: float) -> Tensor:
        if input.shape[0] % self.groups != 0:
            raise ValueError(f"groups must divide the batch, got groups={self.groups} and a batch of {input.shape[0]}")
        assert self.num_batches_tracked is not None
        outputs = []
        for part in input.chunk(self.groups):
            self.num_batches_tracked.add_(1)
            outputs.append(
                functional.batch_norm_act(
                    part,
                    self.running_mean,
                    self.running_var,
                    self.weight,
                    self.bias,
                    True,
                    1.0 / float(self.num_batches_tracked),
                    self.eps,
                    act,
                    negative_slope,
                )
            )
        return torch.cat(outputs)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.act != "none":
            text += f", act={self.act}"
        if self.act == "leaky_relu":
            text += f", negative_slope={self.negative_slope}"
        return text if self.groups == 1 else f"{text}, groups={self.groups}"
