"""What a training step returns: numbers, of which those of a GPU are fetched when somebody looks at them.

A GPU that is done with a step waits for the next one while the host fetches four numbers of the last. So they travel
beside the work, and the host waits for them when they are read, or once the next step has been started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NAMES = ("loss_d", "loss_g", "d_real", "d_fake")


class StepResult(dict[str, float]):
    """A ``dict`` whose entries are there from the first look at it on.

    Args:
        read: the values, in the order of ``NAMES``; may wait for the device, and is not called again once ``check`` has
            let them pass.
        check: is given the values and may raise: at the first look, and at every further one.
    """

    def __init__(self, read: Callable[[], Sequence[float]], check: Callable[[dict[str, float]], None]) -> None:
        # json's encoder in C asks for the entries of what does not look empty to it.
        super().__init__(dict.fromkeys(NAMES, float("nan")))
        self._read: Callable[[], Sequence[float]] | None = read
        self._check = check

    def wait(self) -> None:
        """Fetches the values. Raises FloatingPointError where a loss is not finite."""
        if self._read is None:
            return
        values = dict(zip(NAMES, self._read(), strict=True))
        self._check(values)
        self._read = None
        super().update(values)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self.items()),)


def _waiting(name: str) -> Callable[..., Any]:
    of_dict = getattr(dict, name)

    def method(self: StepResult, *args: Any, **more: Any) -> Any:
        self.wait()
        return of_dict(self, *args, **more)

    method.__name__, method.__doc__ = name, of_dict.__doc__
    return method


for _name in (
    "__getitem__", "__setitem__", "__delitem__", "__contains__", "__iter__", "__reversed__", "__len__", "__repr__",
    "__eq__", "__ne__", "__or__", "__ror__", "__ior__", "get", "keys", "values", "items", "copy", "pop", "popitem",
    "setdefault", "update", "clear",
):  # fmt: skip
    setattr(StepResult, _name, _waiting(_name))


def fetching(values: Tensor) -> Callable[[], list[float]]:
    """Starts to copy ``values`` to the host; what is returned waits for them. They may be overwritten afterwards."""
    if values.device.type != "cuda":
        copied = values.tolist()
        return lambda: copied
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(values.device))

    def read() -> list[float]:
        there.synchronize()
        return host.tolist()

    return read
