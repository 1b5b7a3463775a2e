"""How an operator of fastgan gets its derivatives; the one file that knows torch's private names.

``define`` takes an operator's schema, its reference in pure PyTorch and, where there is a kernel for it, its backward
(itself an operator), and registers everything that torch asks of an operator:

====================  ================================================================================================
dispatch key          what runs
====================  ================================================================================================
CPU, CUDA             the compiled kernel, registered by ``fastgan._C`` and by ``fastgan._C_cuda`` (``_cuda.py``)
CompositeExplicit...  the reference: on devices, or in builds, without a kernel
Meta                  ``fake``: shapes, dtypes and strides alone
Autograd              a single-level ``autograd.Function`` applied in Python, which is what torch's own operators do
                      in C++. ``register_autograd`` and a Function *around* the operator are each silently wrong
                      somewhere: zero tangents, zero compiled gradients
FuncTorchBatched      the reference, decomposed under vmap; or the rule given as ``vmap``
Autocast              ``autocast="lower"`` casts floating arguments to the autocast dtype, ``"float32"`` to float32, a
                      function as it will. A backward formula runs without autocast: its arguments have been cast
====================  ================================================================================================

Derivatives that have no kernel come from the reference: an operator without ``backward`` is differentiated by running
the vjp of its reference, and one without ``jvp`` by running its reference on dual numbers. They are right to any order,
and slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled, make_dual, unpack_dual
from torch.autograd.function import _SingleLevelFunction

LIBRARY = torch.library.Library("fastgan", "DEF")

#: what a backward formula gets: arguments, saved outputs, gradients of the outputs, and which arguments want a gradient
Backward = Callable[
    [Sequence[Any], Sequence[torch.Tensor], Sequence[torch.Tensor | None], Sequence[bool]], Sequence[Any]
]

#: what autocast does to the arguments: (type of device, arguments) -> arguments
Autocast = Callable[[str, Sequence[Any]], Sequence[Any]]

#: what a forward-mode formula gets: arguments, saved outputs, and the arguments' tangents, None where there is none
Jvp = Callable[[Sequence[Any], Sequence[torch.Tensor], Sequence[torch.Tensor | None]], Sequence[torch.Tensor | None]]


#: stands for an argument that is not kept (``unsaved``) where a formula gets the arguments
UNSAVED = object()

# What follows is written without context managers of Python's: a small call's time is spent here.


def _call_below_autograd(operator: Callable[..., Any], args: Sequence[Any]) -> Any:
    """The operator underneath the Autograd key; with either kind of gradient off, nested levels are silently wrong."""
    grad, forward = torch._C.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
    torch._C._set_grad_enabled(True)
    torch._C._set_fwd_grad_enabled(True)
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)
    finally:
        torch._C._set_fwd_grad_enabled(forward)
        torch._C._set_grad_enabled(grad)


def _apply_at_one_level(function: Any, args: Sequence[Any]) -> Any:
    before = torch._C._functorch.get_single_level_autograd_function_allowed()
    torch._C._functorch.set_single_level_autograd_function_allowed(True)
    try:
        return function.apply(*args)
    finally:
        torch._C._functorch.set_single_level_autograd_function_allowed(before)


def _has_one_level() -> bool:
    """True in eager code outside torch.func and forward mode: what can ask for a derivative is the graph alone."""
    return (
        forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.compiler.is_compiling()
    )


def is_plain(tensors: Sequence[Any]) -> bool:
    """True if nothing can ask for a derivative of this call: the whole layer is then left out."""
    return _has_one_level() and not _wants_graph(tensors)


def runs_directly(*tensors: torch.Tensor) -> bool:
    """True if a backward formula may call kernels itself: nothing differentiates, batches or traces this call."""
    return (
        _has_one_level()
        and not torch.is_grad_enabled()
        and all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)
        and not any(torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors)
    )


def _wants_graph(tensors: Sequence[Any]) -> bool:
    if torch._C.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _gradients_asked_for(ctx: Any, args: Sequence[Any]) -> list[bool]:
    """Which arguments the backward call that is running wants a gradient of.

    ``ctx.needs_input_grad`` tells only what requires one. ``autograd.grad(D(x).sum(), x)`` (R1, WGAN-GP) wants none of
    the weights', and torch's own operators skip those; the engine knows.
    """
    needs = list(ctx.needs_input_grad)
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return needs
    edges = iter(ctx.next_functions)
    for i, arg in enumerate(args):
        if not isinstance(arg, torch.Tensor) and arg is not UNSAVED:
            continue
        node = next(edges, (None, 0))[0]
        if needs[i] and node is not None:
            needs[i] = _runs(node)
    return needs


def _runs(node: Any) -> bool:
    """Whether this call of the engine executes a node, or asks for the gradient that reaches it."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # Raised for a leaf that is an input of autograd.grad: its gradient is handed out. It costs 40 microseconds
        # there; passing leaves through views, about which the engine can be asked, cost 20 in every call.
        return True


def in_functorch() -> bool:
    """True inside torch.func's transforms (not seen while compiling)."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def take_saved(gradient: torch.Tensor, upstream: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``gradient * upstream``, for a scalar upstream and a gradient that the forward computed and saved.

    In place where this backward frees the saved tensor anyway: the gradient of a vocabulary's weight is 100 MB, and the
    pages of another 100 MB cost more than the multiplication. So such an output belongs to the operator's backward:
    whoever calls the raw operator and keeps it sees it change.
    """
    consumed = (
        not torch.compiler.is_compiling()
        and not torch._C._functorch.is_legacy_batchedtensor(upstream)  # grad(..., is_grads_batched=True)
        and type(gradient) is torch.Tensor
        and type(upstream) is torch.Tensor
        and torch._C._current_graph_task_id() != -1
        and not torch._C._autograd._get_current_graph_task_keep_graph()
    )
    if not consumed:
        return (gradient * upstream).to(dtype)
    is_one = gradient.device.type == "cpu" and upstream.item() == 1.0
    return (gradient if is_one else gradient.mul_(upstream)).to(dtype)


def _tangent(output: torch.Tensor) -> torch.Tensor:
    tangent = unpack_dual(output, level=0).tangent
    return torch.zeros_like(output) if tangent is None else tangent


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Backward | None = None,
    jvp: Jvp | None = None,
    save_outputs: Sequence[int] = (),
    unsaved: Sequence[int] = (),
    nondifferentiable_outputs: Sequence[int] = (),
    vmap: Callable[..., Any] | None = None,
    autocast: str | Autocast | None = None,
) -> torch._ops.OpOverload:
    """Define ``torch.ops.fastgan.<name>`` with everything but its compiled kernel, and return it.

    Args:
        schema: name and signature, as ``torch.library`` reads it. No output may alias an input.
        reference: the same mathematics in differentiable PyTorch; takes the operator's arguments by position.
        fake: as for ``torch.library.register_fake``.
        backward: ``(args, saved_outputs, grad_outputs, needs) -> a gradient or None for each argument``. It may call
            only differentiable operators (its own backward operator is one), so that it can be differentiated again.
            None: the vjp of ``reference``.
        jvp: ``(args, saved_outputs, tangents) -> a tangent or None for each output``, by differentiable operators as
            well. None: ``reference`` on dual numbers.
        save_outputs: indices of the outputs that ``backward`` and ``jvp`` get as ``saved_outputs``. Whatever of them
            enters a gradient must be recomputed, or be taken with its own derivative, by the backward operator's
            reference.
        unsaved: indices of tensor arguments that neither ``backward`` nor ``jvp``, both given, looks at: not kept for
            them, which get ``UNSAVED`` in their place.
        nondifferentiable_outputs: indices of outputs without a gradient.
        vmap: a rule as for ``torch.library.register_vmap``, where one is better than the decomposed reference.
        autocast: ``"lower"``, ``"float32"``, a function ``(device, args) -> args``, or None (autocast leaves the
            arguments alone).
    """
    name = schema[: schema.index("(")]
    formula = jvp  # Node has a method of that name
    LIBRARY.define(schema)
    operator = getattr(torch.ops.fastgan, name).default
    tensors = [i for i, argument in enumerate(operator._schema.arguments) if "Tensor" in str(argument.type)]

    kept = [i for i in tensors if i not in unsaved]

    def keep(ctx, args, output):
        """Keeps what the formulas look at; the tensors among it, for ``save_for_forward``."""
        ctx.is_single = not isinstance(output, tuple)
        outputs = (output,) if ctx.is_single else output
        ctx.constants = constants = list(args)
        for i in tensors:
            constants[i] = UNSAVED if i in unsaved and args[i] is not None else None
        saved = [args[i] for i in kept] + [outputs[i] for i in save_outputs]
        ctx.save_for_backward(*saved)
        if nondifferentiable_outputs:
            ctx.mark_non_differentiable(*[outputs[i] for i in nondifferentiable_outputs])
        ctx.set_materialize_grads(False)
        return saved

    class Node(_SingleLevelFunction):
        @staticmethod
        def forward(ctx, *args):
            with torch._C._AutoDispatchBelowAutograd():
                output = operator(*args)
            keep(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            args, outputs = _restore(ctx)
            if all(grad is None for grad in grads):
                return (None,) * len(args)
            needs = _gradients_asked_for(ctx, args)
            # Called inside autocast's region or outside, the bits are the same.
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
                if backward is None or torch._C.is_grad_enabled() or not _has_one_level():
                    return _pull_back(ctx, args, outputs, grads, needs)
                # Nothing differentiates this backward: its operators go without their Autograd keys.
                with torch._C._AutoDispatchBelowAutograd():
                    return _pull_back(ctx, args, outputs, grads, needs)

    class NestedNode(Node):
        """Inside transforms, forward mode and graphs that are being compiled."""

        @staticmethod
        def forward(*args):
            return _call_below_autograd(operator, args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_forward(*keep(ctx, inputs, output))

        @staticmethod
        def jvp(ctx, *tangents):
            args, outputs = _restore(ctx)
            with _set_fwd_grad_enabled(True):
                duals = [unpack_dual(a, level=0).primal if _is_differentiable(a) else a for a in args]
                tangents = tuple(
                    t if a is UNSAVED or _is_differentiable(a) else None for a, t in zip(duals, tangents, strict=True)
                )
                if formula is not None:
                    outputs = [unpack_dual(o, level=0).primal for o in outputs]
                    results = formula(duals, outputs, tangents)
                    return results[0] if ctx.is_single else tuple(results)
                for i, tangent in enumerate(tangents):
                    if tangent is not None:
                        duals[i] = make_dual(duals[i], tangent, level=0)
                out = reference(*duals)
                if ctx.is_single:
                    return _tangent(out)
                return tuple(
                    None if i in nondifferentiable_outputs else _tangent(output) for i, output in enumerate(out)
                )

    def _pull_back(ctx, args, outputs, grads, needs):
        if backward is not None:
            return tuple(backward(args, outputs, grads, needs))
        where = [i for i, value in enumerate(args) if _is_differentiable(value) and needs[i]]
        if not where:
            return (None,) * len(args)
        vjp: Any = torch.func.vjp(_as_function_of(where, args), *[args[i] for i in where])
        primal_outputs, pull = vjp
        if ctx.is_single:
            gradients = pull(grads[0])
        else:
            gradients = pull(
                tuple(torch.zeros_like(o) if g is None else g for o, g in zip(primal_outputs, grads, strict=True))
            )
        out: list[Any] = [None] * len(args)
        for i, gradient in zip(where, gradients, strict=True):
            out[i] = gradient
        return tuple(out)

    def _restore(ctx):
        args, saved = list(ctx.constants), ctx.saved_tensors
        for i, tensor in zip(kept, saved, strict=False):
            args[i] = tensor
        return args, saved[len(kept) :]

    def _as_function_of(where, args):
        def function(*tensors):
            full = list(args)
            for i, tensor in zip(where, tensors, strict=True):
                full[i] = tensor
            return reference(*full)

        return function

    def autograd_kernel(*args):
        if not _has_one_level():
            return _apply_at_one_level(NestedNode, args)
        if _wants_graph([args[i] for i in tensors]):
            return Node.apply(*args)  # type: ignore[attr-defined]
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastgan::{name}", fake)
    LIBRARY.impl(name, autograd_kernel, "Autograd")
    if vmap is None:
        LIBRARY.impl(name, lambda *args: reference(*args), "FuncTorchBatched")
    else:
        torch.library.register_vmap(f"fastgan::{name}", vmap)
    if autocast is not None:
        for device in ("cpu", "cuda"):
            LIBRARY.impl(name, _autocast_kernel(operator, device, autocast), f"Autocast{device.upper()}")
    return operator


def cast_for_autocast(value: Any, dtype: torch.dtype) -> Any:
    """As torch's autocast: float64 and what is not floating are left alone."""
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype not in (dtype, torch.float64):
        return value.to(dtype)
    return value


_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def _autocast_kernel(operator: torch._ops.OpOverload, device: str, policy: str | Autocast) -> Callable[..., Any]:
    if isinstance(policy, str) and policy not in ("lower", "float32"):
        raise ValueError(f"autocast must be 'lower', 'float32' or a function, got {policy!r}")
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def kernel(*args):
        if isinstance(policy, str):
            dtype = torch.get_autocast_dtype(device) if policy == "lower" else torch.float32
            cast: Sequence[Any] = [cast_for_autocast(a, dtype) for a in args]
        else:
            cast = policy(device, args)
        with torch._C._ExcludeDispatchKeyGuard(key):
            return operator(*cast)

    return kernel
