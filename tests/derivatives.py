"""The matrix that every operator goes through: each kind of derivative, eager and compiled, against plain PyTorch.

Ways of registering an operator that look right are silently wrong in single cells of it (zero tangents, zero compiled
gradients), so no cell is left out because a neighbour passed. ``aot_eager`` traces derivatives as inductor does,
without its C++ compilation; ``backend="inductor"`` is for slow tests.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.func import grad, hessian, jvp, vmap

Function = Callable[[torch.Tensor], torch.Tensor]


def _loss(f: Function) -> Function:
    return lambda x: f(x).square().sum()


def _backward(f: Function, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    f(x).square().sum().backward()
    return x.grad


def _double_backward(f: Function, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def _penalty(f: Function, x: torch.Tensor, wrap) -> torch.Tensor:
    """The gradient of a gradient penalty with respect to a parameter, as WGAN-GP and R1 take it."""
    w = torch.ones(x.shape[-1], dtype=x.dtype).requires_grad_()
    wrap(lambda w: grad(_loss(lambda z: f(z * w)))(x).square().sum())(w).backward()
    return w.grad


def cells(x: torch.Tensor, backend: str | None) -> dict[str, Callable[[Function], torch.Tensor]]:
    """Name → what is computed from a function; ``backend`` None is eager."""
    torch.manual_seed(1)
    tangent = torch.randn_like(x)
    stack = torch.stack([x, x.flip(-1)])

    def wrap(g):
        return g if backend is None else torch.compile(g, fullgraph=True, backend=backend)

    kind = "eager" if backend is None else "compiled"
    table = {
        "backward": lambda f: _backward(wrap(f), x),
        "grad": lambda f: wrap(grad(_loss(f)))(x),
        "grad of grad": lambda f: wrap(grad(_loss(grad(_loss(f)))))(x),
        "jvp": lambda f: wrap(lambda z: jvp(f, (z,), (tangent,))[1])(x),
        "jvp of grad": lambda f: wrap(lambda z: jvp(grad(_loss(f)), (z,), (tangent,))[1])(x),
        "grad of jvp": lambda f: wrap(grad(_loss(lambda z: jvp(f, (z,), (tangent,))[1])))(x),
        "vmap of grad": lambda f: wrap(vmap(grad(_loss(f))))(stack),
        "penalty": lambda f: _penalty(f, x, wrap),
    }
    if backend is None:
        table["double backward"] = lambda f: _double_backward(f, x)
        table["hessian"] = lambda f: hessian(_loss(f))(x)
    return {f"{kind} {name}": cell for name, cell in table.items()}


def check_derivatives(
    function: Function,
    reference: Function,
    x: torch.Tensor,
    *,
    backends: tuple[str | None, ...] = (None, "aot_eager"),
    rtol: float = 1e-7,
    atol: float = 1e-9,
    skip: tuple[str, ...] = (),
) -> None:
    """Holds every derivative of ``function`` at ``x`` (small, float64) to that of ``reference``, plain PyTorch.

    Each is a function of one tensor; close over the operator's other inputs and make them depend on the argument, so
    that all of the gradients count. ``skip`` names cells that the mathematics does not have. Reports every wrong cell.
    """
    wrong = []
    for backend in backends:
        for name, cell in cells(x, backend).items():
            if name in skip:
                continue
            torch._dynamo.reset()
            try:
                torch.testing.assert_close(cell(function), cell(reference), rtol=rtol, atol=atol)
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    assert not wrong, "\n".join(wrong)
