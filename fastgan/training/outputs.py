"""What a discriminator returns: logits, or the probabilities of a closing Sigmoid, whose input is then taken.

Losses of logits are exact where those of probabilities are not: a confident discriminator's 1 − p rounds to zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

OUTPUTS = ("auto", "logits", "probabilities")


class Outputs:
    """Calls a discriminator and returns its logits.

    Args:
        discriminator: the module.
        kind: "auto" takes the input of a last ``nn.Sigmoid`` and refuses other outputs that can only be probabilities;
            "logits" takes what comes; "probabilities" is for those that reach [0, 1] without an ``nn.Sigmoid``.
    """

    def __init__(self, discriminator: nn.Module, kind: str) -> None:
        if kind not in OUTPUTS:
            raise ValueError(f"discriminator_output must be one of {OUTPUTS}, got {kind!r}")
        self.discriminator, self.kind = discriminator, kind
        self._checked = False

    def __call__(self, images: Tensor) -> Tensor:
        """The logits of ``images``, shaped as the discriminator's output."""
        if self.kind == "logits":
            return _single(self._call(images), len(images))
        passed: list[tuple[Tensor, Tensor]] = []
        hooks = [
            module.register_forward_hook(lambda _, inputs, output: passed.append((inputs[0], output)))
            for module in self.discriminator.modules()
            if isinstance(module, nn.Sigmoid)
        ]
        try:
            output = _single(self._call(images), len(images))
        finally:
            for hook in hooks:
                hook.remove()
        for logits, probabilities in reversed(passed):
            # The output itself or a reshaping of it: the same memory, all of it.
            if probabilities.data_ptr() == output.data_ptr() and probabilities.numel() == output.numel():
                return logits.reshape(output.shape)
        if self.kind == "probabilities":
            return _logit(output)
        if not self._checked:
            _refuse_probabilities(output)
            self._checked = True
        return output

    def _call(self, images: Tensor) -> Any:
        try:
            return self.discriminator(images)
        except TypeError as error:
            if "argument" not in str(error):
                raise
            raise TypeError(
                f"discriminator must take pictures alone ({error}); a conditional one can be wrapped in a module that "
                "holds the rest"
            ) from error


def _single(output: Any, count: int) -> Tensor:
    if isinstance(output, Tensor) and output.dim() == 0 and count == 1:
        output = output.reshape(1)  # squeeze() of a batch of one picture
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() == 0:
        what = f"{output.dtype} of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"discriminator must return one floating tensor (N, ...), got {what}")
    if torch.is_grad_enabled() and not output.requires_grad:
        raise ValueError("discriminator's output has no gradient: it is detached, or computed under no_grad")
    return output


def _logit(probabilities: Tensor) -> Tensor:
    wide = probabilities if probabilities.dtype == torch.float64 else probabilities.float()
    if not bool(((wide >= 0) & (wide <= 1) | wide.isnan()).all()):
        low, high = wide.detach().aminmax()
        raise ValueError(
            f"discriminator_output='probabilities', but the discriminator returned values from {float(low):.4g} to "
            f"{float(high):.4g}, outside [0, 1]"
        )
    # As torch's BCELoss, which holds log(p) and log(1 - p) at -100: nothing infinite at 0 and 1.
    tiny = torch.finfo(wide.dtype).eps
    return torch.logit(wide, eps=tiny)


def _refuse_probabilities(output: Tensor) -> None:
    """Outputs that all lie in [0, 1] are refused unless a linear layer made them, which reaches beyond."""
    if output.numel() == 0 or _unbounded(output.grad_fn, 0):
        return
    if bool(((output >= 0) & (output <= 1)).all()):
        raise ValueError(
            "the discriminator's outputs all lie in [0, 1], so they seem to be probabilities and not logits. Say which "
            "by discriminator_output='probabilities' or discriminator_output='logits' (only a last nn.Sigmoid module "
            "is recognised by 'auto')"
        )


_AFFINE = ("Convolution", "ConvTranspose", "Addmm", "AddmmBackward", "Mm", "Bmm", "Linear", "MkldnnLinear", "Baddbmm")
_PASSED_THROUGH = (
    "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Mean", "Sum", "Clone", "Alias", "Add", "Sub", "Mul",
    "Neg", "Permute", "Transpose", "T", "Cat", "Slice", "Select", "ToCopy", "AsStrided", "Div", "Expand", "Contiguous",
)  # fmt: skip


def _unbounded(node: Any, depth: int) -> bool:
    """Whether a linear layer's result comes out through nothing but sums, products and reshapings."""
    if node is None or depth > 12:
        return False
    name = type(node).__name__ if not hasattr(node, "name") else node.name().split("::")[-1]
    kind = name.split("Backward")[0]
    if kind in _AFFINE or name == "NodeBackward":  # the latter: an operator of fastgan
        return True
    return kind in _PASSED_THROUGH and any(_unbounded(child, depth + 1) for child, _ in node.next_functions)
