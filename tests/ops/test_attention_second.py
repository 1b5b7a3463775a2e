"""Attention differentiated twice, and in forward mode, by kernels: their mathematics, their rules, their memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.func import grad, jacfwd, jvp, vmap

from fastgan.nn import functional as F
from fastgan.ops.attention import attention_double_backward_reference
from tests.ops.test_attention import tensors
from tests.ops.test_attention_reports import _exact

OPS = torch.ops.fastgan
ALL = (True, True, True, True)


def call(shape, dtype, masks, present=ALL):
    """The arguments of attention_double_backward; those of attention_jvp are all but the first and the last."""
    batch, heads, kv_heads, rows, columns, width, value_width = shape

    def draw(*size, there=True):
        return torch.randn(size, dtype=torch.float64).to(dtype) if there else None

    query, key, value = (batch, heads, rows, width), (batch, kv_heads, columns, width), (batch, kv_heads, columns)
    bias = mask = philox = None
    if masks in ("bias", "all"):
        bias = draw(batch, 1, rows, columns)
    if masks in ("mask", "all"):
        mask = torch.rand(1, heads, rows, columns) > 0.3
        mask[..., 0, :] = False  # a dead row
        mask[..., columns // 2 :] = False  # and padding
    if masks in ("dropout", "all"):
        philox = torch.tensor([3, 4])
    rest = (0.3 if philox is not None else 0.0, masks in ("causal", "all"), 0.3)
    inputs = (draw(*query), draw(*key), draw(*value, value_width), mask, bias, philox)
    output, logsumexp = OPS.attention(*inputs, *rest)
    tangents = [
        draw(*query, there=present[0]),
        draw(*key, there=present[1]),
        draw(*value, value_width, there=present[2]),
        None if bias is None else draw(*bias.shape, there=present[3]),
    ]
    return (draw(batch, heads, rows, value_width), *inputs, output, logsumexp, *tangents, *rest, True)


def in_float64(args):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def check(args, slack=6.0):
    """Our distance to float64 is at most twice that of the formula in PyTorch at the same precision."""
    exact = attention_double_backward_reference(*in_float64(args))
    theirs = attention_double_backward_reference(*args)
    ours = OPS.attention_double_backward(*args)
    assert torch.equal(OPS.attention_jvp(*args[1:-1]), ours[0])
    dtype = args[0].dtype
    slack = 32.0 if dtype == torch.float64 else slack  # the judge is float64, too, and rounds as we do
    eps = torch.finfo(dtype).eps
    for name, e, t, o in zip(("output", "query", "key", "value", "bias"), exact, theirs, ours, strict=True):
        assert o.shape == t.shape
        assert o.dtype == t.dtype
        if not e.numel():
            continue
        error = (o.double() - e).abs().max()
        bound = 2 * (t.double() - e).abs().max() + slack * eps * e.abs().max()
        assert error <= bound, f"{name}: {error:.2e} from float64, allowed {bound:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masks", ["none", "causal", "mask", "bias", "dropout", "all"])
@pytest.mark.parametrize(
    "shape",
    [(2, 4, 2, 50, 270, 24, 40), (1, 2, 1, 131, 70, 17, 5), (1, 2, 1, 1, 70, 17, 5)],
    ids=["long", "short", "one query"],
)
def test_distance_to_float64(capability, dtype, masks, shape):
    check(call(shape, dtype, masks))


@pytest.mark.parametrize("only", range(4))
def test_absent_directions(only):
    for masks in ("none", "all"):
        args = call((2, 2, 1, 20, 140, 8, 8), torch.float64, masks, [i == only for i in range(4)])
        if any(t is not None for t in args[9:13]):
            check(args)


def test_empty_in_every_dimension():
    for i in range(7):
        shape = [2, 2, 2, 3, 4, 5, 6]
        shape[i] = 0
        if i == 2:
            shape[1] = 0
        args = call(shape, torch.float32, "bias")
        for ours, wanted in zip(
            OPS.attention_double_backward(*args), attention_double_backward_reference(*args), strict=True
        ):
            torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("shape", [(1, 2, 1, 150, 400, 16, 16), (5, 2, 2, 100, 70, 16, 24)], ids=["long", "short"])
@pytest.mark.parametrize("masks", ["causal", "all"])
def test_same_bits_for_every_number_of_threads(capability, shape, masks):
    args = call(shape, torch.float32, masks)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([*OPS.attention_double_backward(*args), OPS.attention_jvp(*args[1:-1])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_opcheck(whole):
    inputs = call((2, 4, 2, 3, 5, 4, 6), torch.float64, "all")
    args = [
        # output and logsumexp are constants by contract
        a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() and i not in (7, 8) else a
        for i, a in enumerate(inputs)
    ]
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    tests += ["test_aot_dispatch_dynamic"] if whole else []
    torch.library.opcheck(OPS.attention_jvp, args[1:-1], test_utils=tests)
    torch.library.opcheck(OPS.attention_double_backward, args, test_utils=tests)


def test_third_derivatives():
    query, key, value, _ = tensors((1, 2), 3, 4, 3, 2)
    bias = torch.randn(3, 4, dtype=torch.float64)

    def third(f):
        function = lambda q: f(q, key * q.sum(), value + q.mean(), bias).square().sum()
        twice = grad(lambda q: grad(function)(q).square().sum())
        along = torch.ones_like(query)
        return grad(lambda q: twice(q).square().sum())(query), jvp(twice, (query,), (along,))[1]

    torch.testing.assert_close(third(F.scaled_dot_product_attention), third(_exact))


@pytest.mark.parametrize("bias_of", ["none", "all", "sample"])
def test_vmap(bias_of):
    query, key, value, _ = tensors((3, 2, 2), 3, 5, 4)
    bias = torch.randn(3, 2, 2, 3, 5, dtype=torch.float64)
    bias = {"none": None, "all": bias[0], "sample": bias}[bias_of]
    bias = None if bias is None else bias[..., :1, :, :, :]  # one for the batch of a sample

    def both(f):
        def penalty(q, k, v, *b):
            function = lambda *x: f(*x).square().sum()
            arguments = tuple(range(3 + len(b)))
            first = grad(function, arguments)
            return jvp(first, (q, k, v, *b), (k[..., :3, :], q.repeat(1, 1, 2, 1)[..., :5, :], v, *b))[1], grad(
                lambda *x: sum(g.square().sum() for g in first(*x)), arguments
            )(q, k, v, *b)

        biases = () if bias is None else (bias,)
        dims = (0, None, 0) + (() if bias is None else (0 if bias_of == "sample" else None,))
        return vmap(penalty, dims)(query, key[0], value, *biases)

    torch.testing.assert_close(both(F.scaled_dot_product_attention), both(_exact))


def test_jacobian_in_forward_mode():
    query, key, value, _ = tensors((1, 1), 3, 4, 2)
    jacobian = lambda f: jacfwd(lambda q: f(q, key, value))(query)
    torch.testing.assert_close(jacobian(F.scaled_dot_product_attention), jacobian(_exact))


def test_a_weight_of_one_has_a_tangent_of_zero():
    """The first row under is_causal sees one key: its weight is 1 whatever the scores, exactly."""
    query, key, value, _ = tensors((1, 2), 40, 40, 8, dtype=torch.float32)
    output, logsumexp = OPS.attention(query, key, value, None, None, None, 0.0, True, 0.3)
    tangent = OPS.attention_jvp(
        query, key, value, None, None, None, output, logsumexp, key, query, None, None, 0.0, True, 0.3
    )
    assert not tangent[:, :, 0].any()
    assert tangent[:, :, 1:].all()


@pytest.mark.kernel
def test_float32_arguments_never_reach_the_reference(monkeypatch):
    """Forward mode and double backward of a call are kernels: the stored formula is for third derivatives."""
    from fastgan.ops import attention

    def fail(*args):
        raise AssertionError("the reference ran")

    query, key, value, _ = tensors((1, 2), 5, 5, 4, dtype=torch.float32, requires_grad=True)
    monkeypatch.setattr(attention, "_probabilities", fail)
    first = torch.autograd.grad(
        F.scaled_dot_product_attention(query, key, value).square().sum(), (query, key, value), create_graph=True
    )
    torch.autograd.grad(sum(g.square().sum() for g in first), (query, key, value))
    function = lambda q: F.scaled_dot_product_attention(q, key.detach(), value.detach()).square().sum()
    jvp(grad(function), (query.detach(),), (query.detach(),))
    with pytest.raises(AssertionError, match="the reference ran"):
        grad(lambda q: grad(lambda q: grad(function)(q).sum())(q).sum())(query.detach())


_MEMORY = """
import sys, torch
from fastgan.nn import functional as F

def peak():  # kilobytes
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

def now():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])

def run(heads, length, width):
    inputs = [torch.randn(1, heads, length, width, requires_grad=True) for _ in range(3)]
    grad = torch.randn(1, heads, length, width)
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
    before = now()
    output = F.scaled_dot_product_attention(*inputs)
    first = torch.autograd.grad(output, inputs, grad, create_graph=True)
    second = torch.autograd.grad(first, inputs, [x.detach() for x in inputs])
    results = [output, *first, *second]
    return peak() - before - sum(r.numel() * 4 for r in results) // 1024

run(1, 256, 16)
print(run(*map(int, sys.argv[1:])))
"""


@pytest.mark.kernel
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("heads", "length", "width", "megabytes"),
    [(1, 4096, 16, 16), pytest.param(8, 8192, 64, 256, marks=pytest.mark.slow)],
)
def test_memory_is_linear_in_the_sequence(heads, length, width, megabytes):
    """Forward, backward and double backward, above their results; the weights alone would be 64 MB, and 2 GB."""
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(heads), str(length), str(width)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < megabytes * 1024, f"{int(done.stdout) / 1024:.0f} MB above the results"
