"""A training step as one CUDA graph: recorded once, then replayed by one launch where there were hundreds.

A small network's step on a GPU is launches, not arithmetic. ``GraphedStep`` runs a step eagerly a few times (real
steps, on a stream of their own, which leave cuDNN's choices and the optimizers' moments made; the last of them is
watched, for a recording that fails leaves torch's generator and allocator in it), records the next one, and from then
on copies its inputs into the recorded ones and replays. What the recording has taken for granted is part
of a signature that is compared before every replay: another signature (a loaded state, a flag, a hyperparameter) throws
the recording away and begins anew; other shapes (an epoch's last batch) run eagerly beside it. Learning rates are
numbers on the device that the recorded step reads, so a schedule costs nothing.

Where a step cannot be recorded it runs eagerly, and one warning says why.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fastgan import _impl
from fastgan._hooks import hooks_of

#: signatures that may follow one another before nothing is recorded any more
_CHANGES = 10
#: eager steps before the recording: the first make the optimizers' moments, cuDNN's plans and autograd's buffers
WARM_UP = 3
# Their hooks are tensor operations without a host's decision, which a graph records as any other.
_RECORDABLE_HOOKS = (SpectralNorm, WeightNorm)

Inputs = Sequence[Tensor | None]


class Graph(Protocol):
    """What records a call's work on the device, and does it again. Tests put one for the CPU in its place."""

    def warm_up(self, call: Callable[[], Tensor]) -> Tensor:
        """The call, run as it is, where the recording will be made."""

    def rehearse(self, call: Callable[[], Tensor]) -> tuple[Tensor, str | None]:
        """``warm_up``, and why it could not be recorded: None if nothing is known against it."""

    def capture(self, call: Callable[[], Tensor]) -> None:
        """Records the call; the device does nothing yet. Raises where something in it cannot be recorded."""

    def replay(self) -> Tensor:
        """Does what was recorded; the recorded call's result, overwritten by the next replay."""


class CUDAGraph:
    """``Graph`` by ``torch.cuda.CUDAGraph``, whose random numbers go on from torch's generator at every replay."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None

    def warm_up(self, call: Callable[[], Tensor]) -> Tensor:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = call()
        current.wait_stream(self._stream)
        return result

    def rehearse(self, call: Callable[[], Tensor]) -> tuple[Tensor, str | None]:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                result = self.warm_up(call)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        reason = None
        for each in said:
            if "synchronizing CUDA operation" not in str(each.message):
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
            elif reason is None:
                reason = f"the host waits for the device in it, at {each.filename}:{each.lineno}"
        return result, reason

    def capture(self, call: Callable[[], Tensor]) -> None:
        self._graph = self._result = None  # the former one's memory first
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        generator = torch.cuda.default_generators[index]
        state = generator.clone_state()
        try:
            self._capture(call)
        except BaseException:
            generator.graphsafe_set_state(state)  # its own still takes itself to be in the recording
            raise

    def _capture(self, call: Callable[[], Tensor]) -> None:
        graph = torch.cuda.CUDAGraph()
        # thread_local: what a loader's thread does meanwhile (it pins memory) is no part of the recording.
        recording = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.device(self._device), recording:
            result = call()
        self._graph, self._result = graph, result

    def replay(self) -> Tensor:
        assert self._graph is not None
        assert self._result is not None
        self._graph.replay()
        return self._result


class GraphedStep:
    """Calls ``step(*inputs)``, as a replayed graph as soon and as long as that does the same.

    Args:
        step: from tensors (or None) to one tensor of results on the device. It must not look at values on the host.
        graph: what records it.
        optimizers: those that it uses; their learning rates may change from call to call.
        modules: those that it uses.
        settings: whatever else a recording depends on, compared by ``==``.
    """

    def __init__(
        self,
        step: Callable[..., Tensor],
        graph: Graph,
        *,
        optimizers: Sequence[torch.optim.Optimizer],
        modules: Sequence[nn.Module],
        device: torch.device,
        settings: Callable[[], object] = lambda: None,
    ) -> None:
        self._step, self._graph, self._settings, self._device = step, graph, settings, device
        self._optimizers, self._modules = tuple(optimizers), tuple(modules)
        self._rates = _Rates(self._optimizers, device)
        self._recorded: tuple[Any, ...] | None = None  # signature and shapes of the recording
        self._last: tuple[Any, ...] | None = None
        self._equal = 0  # calls like the last one, one after the other
        self._changes = 0  # of the signature since the last replay
        self._static: list[Tensor | None] = []
        self._gradients: list[tuple[Tensor, Tensor | None]] = []  # the recording's own
        self._strayed = False  # an eager step has left others
        #: why it runs eagerly for good, once that was said
        self.reason: str | None = None

    @property
    def is_recorded(self) -> bool:
        return self._recorded is not None

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """The step's results, which the next call may overwrite."""
        if self.reason is not None:
            return self._step(*inputs)
        this = (signature, shapes) = (self._signature(), tuple(map(_shape, inputs)))
        if self._recorded == this:
            return self._replay(inputs)
        if self._recorded is not None and self._recorded[0] != signature:
            self._forget()
        reason = why_not_recordable(self._modules, self._optimizers, self._device)
        if reason is not None:
            return self._eagerly_from_now_on(reason, inputs)
        if self._last is not None and self._last[0] != signature:
            self._changes += 1
            if self._changes > _CHANGES:
                return self._eagerly_from_now_on("flags, addresses or settings change from step to step", inputs)
        self._equal = self._equal + 1 if this == self._last else 1
        self._last = this
        if self._equal <= WARM_UP:
            self._strayed = True
            self._rates.fill()
            with self._rates.in_place():
                if self._equal < WARM_UP:
                    result = self._graph.warm_up(lambda: self._step(*inputs))
                else:
                    result, reason = self._graph.rehearse(lambda: self._step(*inputs))
            if reason is not None:
                self._say(reason)
            if self._equal == 1:  # the first step makes moments: they belong to the signature
                self._last = (self._signature(), shapes)
            return result
        return self._record(this, inputs)

    def _record(self, this: tuple[Any, ...], inputs: Inputs) -> Tensor:
        self._forget()
        self._rates.fill()
        static = [None if tensor is None else torch.empty_like(tensor).copy_(tensor.detach()) for tensor in inputs]
        try:
            with self._rates.in_place(), nothing_collected():
                self._graph.capture(lambda: self._step(*static))
        except Exception as error:
            self._forget()
            return self._eagerly_from_now_on(f"recording it failed ({_first_line(error)})", inputs)
        self._static, self._recorded, self._strayed = static, this, False
        parameters = [p for o in self._optimizers for group in o.param_groups for p in group["params"]]
        self._gradients = [(parameter, parameter.grad) for parameter in parameters]
        return self._graph.replay()

    def _replay(self, inputs: Inputs) -> Tensor:
        for to, tensor in zip(self._static, inputs, strict=True):
            if to is not None and tensor is not None:
                to.copy_(tensor.detach(), non_blocking=True)
        self._rates.fill()
        if self._strayed:
            for parameter, gradient in self._gradients:
                parameter.grad = gradient
            self._strayed = False
        self._changes = 0
        return self._graph.replay()

    def _forget(self) -> None:
        self._recorded, self._static, self._gradients = None, [], []

    def _eagerly_from_now_on(self, reason: str, inputs: Inputs) -> Tensor:
        self._say(reason)
        return self._step(*inputs)

    def _say(self, reason: str) -> None:
        self.reason = reason
        self._forget()
        warnings.warn(f"the training step is not a CUDA graph, and slower: {reason}", stacklevel=5)

    def _signature(self) -> tuple[Any, ...]:
        """What the recording has taken for granted: addresses, flags and numbers; none is read from the device."""
        taken: list[Any] = [_impl.reference_selected(), _autocast_is_on(self._device), self._settings()]
        for part in self._modules:
            for module in part.modules():
                taken += [module.training, *map(len, hooks_of(module))]
                for p in module._parameters.values():
                    taken.append(p if p is None else (p.data_ptr(), p.requires_grad, _has_hook(p)))
                taken += map(_address, module._buffers.values())
        for optimizer in self._optimizers:
            taken += [*map(len, _step_hooks(optimizer)), vars(optimizer).get("step")]
            for group in optimizer.param_groups:
                taken += [(k, _address(v)) for k, v in group.items() if k not in ("params", "lr", "initial_lr")]
                for parameter in group["params"]:
                    taken += map(_address, optimizer.state.get(parameter, {}).values())
        return tuple(taken)


class _Rates:
    """The learning rates as numbers on the device, which the recorded steps read in place of the groups' own.

    A float of a group would be recorded as it is. Eager steps between the recorded ones read these too, so that both
    round alike (the fused step keeps a float in double precision, a tensor in float32).
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], device: torch.device) -> None:
        self._optimizers, self._device = optimizers, device
        self._tensors: dict[tuple[int, int], Tensor] = {}
        self._values: dict[tuple[int, int], float] = {}

    def _groups(self) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
        for i, optimizer in enumerate(self._optimizers):
            for j, group in enumerate(optimizer.param_groups):
                yield (i, j), group

    def fill(self) -> None:
        """Takes over what the groups say now."""
        for at, group in self._groups():
            tensor = self._tensors.get(at)
            if tensor is None:
                tensor = self._tensors[at] = torch.zeros((), dtype=torch.float32, device=self._device)
            rate = group["lr"]
            if isinstance(rate, Tensor):
                tensor.copy_(rate, non_blocking=True)
                self._values.pop(at, None)
            elif self._values.get(at) != rate:
                tensor.fill_(rate)
                self._values[at] = rate

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The groups with these, and with ``capturable``, for the time of a step."""
        before = [(at, group, group["lr"], group["capturable"]) for at, group in self._groups()]
        try:
            for at, group, _, _ in before:
                group["lr"], group["capturable"] = self._tensors[at], True
            yield
        finally:
            for _, group, rate, capturable in before:
                group["lr"], group["capturable"] = rate, capturable


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Python's garbage is collected before, and none meanwhile.

    What it holds may not be let go of while a stream records: another recording's graph, as one of a trainer that was
    used before, makes this one fail.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def why_not_recordable(
    modules: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer], device: torch.device
) -> str | None:
    """Why a step with these cannot be one graph, as far as can be told before; None if nothing is known against it."""
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
            return f"the optimizer is {name}, and not torch.optim.Adam or AdamW"
        if not all(group["fused"] for group in optimizer.param_groups):
            return f"{name} was made without fused=True"
        if any(_step_hooks(optimizer)):
            return f"{name} has a step hook, which a graph would call once and never again"
        if "step" in vars(optimizer) and not _is_a_schedulers(optimizer):
            return f"{name} has another step than its class"
    for part in modules:
        for name, module in part.named_modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                return "DistributedDataParallel averages gradients between processes"
            if not all(isinstance(hook, _RECORDABLE_HOOKS) for kind in hooks_of(module) for hook in kind.values()):
                return f"{name or type(module).__name__} has a hook, which a graph would call once and never again"
            for own, parameter in module._parameters.items():
                if parameter is not None and _has_hook(parameter):
                    return f"{name}.{own} has a gradient hook, which a graph would call once and never again"
    if _autocast_is_on(device):
        return "autocast is on around train_step, and keeps lowered weights from step to step"
    return None


def _autocast_is_on(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _step_hooks(optimizer: torch.optim.Optimizer) -> tuple[dict[int, Any], ...]:
    return optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks


def _has_hook(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks) or bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def _is_a_schedulers(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step set on the optimizer is a learning-rate scheduler's, which counts calls and does no more."""
    return bool(getattr(vars(optimizer)["step"], "_wrapped_by_lr_sched", False))


def _address(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, Tensor) else value


def _shape(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
