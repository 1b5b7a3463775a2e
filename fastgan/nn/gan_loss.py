"""DiscriminatorHeadLoss: a discriminator's last convolution and its loss, for models that keep the convolution."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fastgan._hooks import has_hooks
from fastgan.nn import _gan_loss_inputs, functional


class DiscriminatorHeadLoss(nn.Module):
    """The last convolution of a discriminator and the GAN loss of its logits as one kernel.

    Holds no parameters: the convolution stays where it is in the discriminator, with its state dict and optimizer, and
    is handed to ``forward``.

    >>> head_loss = DiscriminatorHeadLoss("bce")
    >>> features = discriminator.body(images)
    >>> loss, logits = head_loss(features, discriminator.head, 1.0)

    Args:
        loss: "bce" (default), "hinge", "lsgan" or "wasserstein"; see ``fastgan.nn.functional.conv_gan_loss``.
        label_smoothing: s in [0, 1] turns each target t into t (1-s) + s/2. Default 0.
        reduction: "mean" (default, over all logits), "sum" or "none".

    Raises ValueError for another loss or reduction, or a smoothing out of range.
    """

    def __init__(self, loss: str = "bce", *, label_smoothing: float = 0.0, reduction: str = "mean") -> None:
        super().__init__()
        _gan_loss_inputs.check_loss(loss, reduction, label_smoothing, None)
        self.loss = loss
        self.label_smoothing = label_smoothing
        self.reduction = reduction

    def forward(
        self,
        input: Tensor,
        conv: nn.Module | Tensor,
        target: Tensor | float,
        *,
        bias: Tensor | None = None,
        sample_weight: Tensor | None = None,
        pos_weight: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(loss, logits)`` of ``conv(input)``.

        Args:
            input: features (N, C, H, W).
            conv: an ``nn.Conv2d`` (its stride and padding count), any other module that gives logits (it is called, and
                the loss follows in plain PyTorch), or the weight (K, C, kh, kw) of a convolution with stride 1.
            target: 1 for real, 0 for fake: a number, a label an image (N,), or a tensor of the logits' shape.
            bias: (K,), only where ``conv`` is a weight.
            sample_weight: (N,) or broadcastable to the logits.
            pos_weight: a number, or broadcastable to the logits.
        """
        arguments: dict[str, Any] = {
            "loss": self.loss,
            "sample_weight": sample_weight,
            "pos_weight": pos_weight,
            "label_smoothing": self.label_smoothing,
            "reduction": self.reduction,
        }
        if isinstance(conv, Tensor):
            return functional.conv_gan_loss(input, conv, bias, target, **arguments)
        if bias is not None:
            raise TypeError(f"bias goes with a weight; {type(conv).__name__} brings its own")
        if _is_plain_convolution(conv):
            return functional.conv_gan_loss(
                input,
                conv.weight,
                conv.bias,
                target,
                stride=conv.stride,  # type: ignore[arg-type]
                padding=conv.padding,  # type: ignore[arg-type]
                **arguments,
            )
        logits = conv(input)
        return functional.gan_loss_with_logits(logits, target, **arguments), logits

    def extra_repr(self) -> str:
        return f"loss={self.loss!r}, label_smoothing={self.label_smoothing}, reduction={self.reduction!r}"


def _is_plain_convolution(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """A Conv2d that nothing but its weight, bias, stride and padding describes; hooks and subclasses are called."""
    ours = type(conv).__module__.partition(".")[0] == "fastgan"  # another forward, the same meaning
    if not isinstance(conv, nn.Conv2d) or "forward" in vars(conv):
        return False
    if type(conv).forward is not nn.Conv2d.forward and not ours:
        return False
    same = conv.padding == "same" and any(size % 2 == 0 for size in conv.kernel_size)
    simple = conv.groups == 1 and tuple(conv.dilation) == (1, 1) and conv.padding_mode == "zeros" and not same
    return (
        bool(simple) and not has_hooks(conv) and not isinstance(conv.weight, torch.nn.parameter.UninitializedParameter)
    )
