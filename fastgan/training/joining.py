"""May real and fake go through a discriminator as one batch?

Only if no picture's result depends on the others in its batch, which holds for convolutions and activations, and for
``BatchNormAct2d`` with ``groups=2``, whose statistics are each half's own. Everything else gets two passes: plain batch
norm would mix real and fake, spectral norm would iterate once instead of twice, dropout would draw other masks, and of
a hook or an unknown module nothing is known.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import fx, nn

import fastgan.nn
from fastgan._hooks import has_hooks

_PER_SAMPLE = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LayerNorm, nn.GroupNorm, nn.Upsample, nn.UpsamplingNearest2d,
    nn.UpsamplingBilinear2d, nn.PixelShuffle, nn.PixelUnshuffle, nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d,
    nn.ReplicationPad2d,
)  # fmt: skip
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# Functions of one tensor, or of tensors and constants, that treat every example alike and keep their order.
_FUNCTIONS = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, torch.add, torch.sub, torch.mul,
    torch.relu, torch.sigmoid, torch.tanh, F.relu, F.leaky_relu, F.elu, F.gelu, F.silu, F.softplus, F.sigmoid, F.tanh,
    F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d,
}  # fmt: skip
_METHODS = {"relu", "sigmoid", "tanh", "contiguous", "add", "sub", "mul", "div"}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        own = type(module).__module__.partition(".")[0] in ("torch", "fastgan")
        return own and not isinstance(module, (nn.Sequential, nn.ModuleList)) and _is_library_layer(module)


def _is_library_layer(module: nn.Module) -> bool:
    where = type(module).__module__
    return where.startswith(("torch.nn.", "fastgan.nn"))


# The numbers in the real pictures for each of the discriminator's parameters, up to which the CPU takes one batch. It
# spares one walk over the weights, and costs the activations of both halves at once: at 64 × 64, batch 64, width 64
# (0.28) two passes take 0.99 of the time and 0.7 of the memory, with batch 16 and width 96 (0.03) 1.03 of the time.
PICTURES_PER_WEIGHT = 0.1


def one_batch_pays(discriminator: nn.Module, real: torch.Tensor) -> bool:
    """Whether real and fake are less work as one batch: always on a GPU, which waits for launches."""
    if real.device.type != "cpu":
        return True
    weights = sum(parameter.numel() for parameter in discriminator.parameters())
    return real.numel() <= PICTURES_PER_WEIGHT * weights


def why_two_passes(discriminator: nn.Module) -> str | None:
    """Why real and fake need two passes through this discriminator as it is now; None if one batch is right."""
    for name, module in discriminator.named_modules():
        where = f"{name or 'the discriminator'} ({type(module).__name__})"
        if has_hooks(module):
            return f"{where} has a hook, which spectral norm and weight norm use"
        if "parametrizations" in module._modules:
            return f"{where} has a parametrization"
        if "forward" in vars(module):
            return f"{where} has another forward than its class"
    for name, parameter in discriminator.named_parameters():
        if has_gradient_hook(parameter):
            return f"{name} has a gradient hook, which sees each backward's gradient alone"
    try:
        graph = _Tracer().trace(discriminator)
    except Exception as error:
        return f"its forward cannot be followed ({type(error).__name__})"
    if sum(node.op == "placeholder" for node in graph.nodes) != 1:
        return "its forward takes more than one argument"
    for node in graph.nodes:
        reason = _why_not(discriminator, node)
        if reason is not None:
            return reason
    return None


def has_gradient_hook(parameter: torch.Tensor) -> bool:
    """Whether something is called with this parameter's gradient during backward."""
    return bool(parameter._backward_hooks) or bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def _why_not(discriminator: nn.Module, node: fx.Node) -> str | None:
    if node.op in ("placeholder", "get_attr"):
        return None
    if _is_batch_size(node):
        # as in view(x.size(0), -1); anything else that knows the batch's size may depend on it
        reshaping = all(user.op == "call_method" and user.target in ("view", "reshape") for user in node.users)
        return None if reshaping else "its forward uses the size of the batch"
    if node.op == "output":
        return None if isinstance(node.args[0], fx.Node) else "it returns more than one tensor"
    if node.op == "call_module":
        module = discriminator.get_submodule(str(node.target))
        return None if _is_per_sample(module) else f"{node.target} ({type(module).__name__}) looks at the whole batch"
    arguments = node.args[1:]
    if node.op == "call_function":
        if node.target in _FUNCTIONS:
            return None
        name = getattr(node.target, "__name__", str(node.target))
    else:
        name = str(node.target)
        if name in _METHODS:
            return None
    return None if _keeps_order(name, arguments, dict(node.kwargs)) else f"its forward calls {name}"


def _is_batch_size(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "size" and tuple(node.args[1:]) == (0,)


def _keeps_order(name: str, arguments: tuple, keywords: dict) -> bool:
    """Reshapings that leave the examples one after another, and means within an example."""
    if name in ("view", "reshape"):
        shape = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], (tuple, list)) else arguments
        # The batch's place is left open (-1): a number there would be this batch's size.
        open_first = len(shape) > 0 and (shape[0] == -1 or (isinstance(shape[0], fx.Node) and _is_batch_size(shape[0])))
        return not keywords and open_first and all(isinstance(size, int) for size in shape[1:])
    if name == "flatten":
        return True
    if name == "squeeze":
        where = arguments[0] if arguments else keywords.get("dim")
        return isinstance(where, int) and where != 0
    if name == "mean":
        where = arguments[0] if arguments else keywords.get("dim")
        where = (where,) if isinstance(where, int) else where
        return isinstance(where, (tuple, list)) and all(isinstance(axis, int) and axis > 0 for axis in where)
    return False


def _is_per_sample(module: nn.Module) -> bool:
    kind = type(module)
    if kind in DROPOUTS:
        assert isinstance(module, DROPOUTS)
        return not module.training or module.p == 0
    if kind in _INSTANCE_NORMS:
        return not (module.track_running_stats and module.training)
    if kind is nn.Flatten:
        assert isinstance(module, nn.Flatten)
        return module.start_dim >= 0
    if kind is nn.Unflatten:
        return isinstance(module.dim, int) and module.dim > 0
    if isinstance(module, _BATCH_NORMS):
        fixed = not module.training and module.running_mean is not None
        return fixed if kind in _BATCH_NORMS else has_groups(module) and (fixed or module.training)
    if kind.__module__.startswith("fastgan.nn"):
        return isinstance(module, _PER_SAMPLE)
    return kind in _PER_SAMPLE


def has_groups(module: nn.Module) -> TypeGuard[fastgan.nn.BatchNormAct2d]:
    """A BatchNormAct2d, whose statistics can be each half's own."""
    kind = getattr(fastgan.nn, "BatchNormAct2d", None)
    return kind is not None and type(module) is kind


@contextmanager
def statistics_per_half(discriminator: nn.Module) -> Iterator[None]:
    """Each BatchNormAct2d keeps separate statistics for the two halves of its batch: real first, then fake."""
    changed = [module for module in discriminator.modules() if has_groups(module)]
    before = [module.groups for module in changed]
    for module in changed:
        module.groups = 2
    try:
        yield
    finally:
        for module, groups in zip(changed, before, strict=True):
            module.groups = groups
