"""gelu as a function, with torch's signature and a bias."""

import pytest
import torch

from fastgan.nn import functional as F


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_same_as_torchs(approximate):
    torch.manual_seed(0)
    x, bias, grad = torch.randn(40, 512), torch.randn(512), torch.randn(40, 512)
    for own in (None, bias):
        found = []
        for function in (
            lambda a, b: F.gelu(a, approximate, bias=b),
            lambda a, b: torch.nn.functional.gelu(a if b is None else a + b, approximate=approximate),
        ):
            leaves = [each.clone().requires_grad_() for each in (x, own) if each is not None]
            output = function(leaves[0], leaves[1] if own is not None else None)
            output.backward(grad)
            found.append([output.detach(), *(leaf.grad for leaf in leaves)])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.kernel
def test_one_operation_where_it_pays():
    x, bias = torch.randn(64, 512), torch.randn(512)
    calls = {
        "fused": lambda: F.gelu(x, bias=bias),
        "small": lambda: F.gelu(x[:2], bias=bias),
        "integer bias": lambda: F.gelu(x, bias=torch.ones(512, dtype=torch.long)),
    }
    for name, call in calls.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            call()
        names = {event.key for event in seen.key_averages()}
        assert ("fastgan::bias_gelu" in names) == (name == "fused"), name
        assert ("aten::gelu" in names) == (name != "fused"), name


def test_in_transforms_and_compiled():
    x, bias = torch.randn(64, 512), torch.randn(512)
    leaf = x.clone().requires_grad_()
    F.gelu(leaf, bias=bias).sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda t: F.gelu(t, bias=bias).sum())(x), leaf.grad)
    compiled = torch.compile(F.gelu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, bias=bias), F.gelu(x, bias=bias))


def test_torchs_errors():
    with pytest.raises(RuntimeError, match="approximate argument must be either none or tanh"):
        F.gelu(torch.randn(64, 512), "relu")
    with pytest.raises(RuntimeError, match="size of tensor"):
        F.gelu(torch.randn(64, 512), bias=torch.randn(3))
