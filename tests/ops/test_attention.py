"""The attention operator: its mathematics in every type, its derivatives, its random numbers, its bits."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

import fastgan
from fastgan.nn import functional as F
from fastgan.ops.attention import attention_reference, dropout_mask, philox4x32
from tests.derivatives import check_derivatives

SDPA = torch.nn.functional.scaled_dot_product_attention


def tensors(lead, rows, columns, width, value_width=None, dtype=torch.float64, requires_grad=False, heads_inside=False):
    """query, key, value, grad_output; with ``heads_inside`` (B, H, L, E) lies in memory as (B, L, H, E)."""
    out = []
    value_width = width if value_width is None else value_width
    for length, last in ((rows, width), (columns, width), (columns, value_width), (rows, value_width)):
        if heads_inside:
            tensor = torch.randn(*lead[:-1], length, lead[-1], last, dtype=torch.float64).transpose(-2, -3)
        else:
            tensor = torch.randn(*lead, length, last, dtype=torch.float64)
        out.append(tensor.to(dtype).requires_grad_(requires_grad))
    return out


def close_to_float64(function, peer, inputs, grad, slack=4.0):
    """Output and gradients: our distance to float64 mathematics is at most twice torch's at the same precision.

    ``function`` and ``peer`` take the inputs; ``peer`` in float64 is the mathematics. torch's distance is the larger of
    two: with the inputs as they are, and with the widths reversed, whose sums round otherwise. Where all is float64 the
    judge rounds as well, which the second shows, and the slack is twice as wide. ``slack`` is in ulp of the largest
    number; of a bias with one number a row, whose gradient is zero by mathematics, in ulp of what cancels.
    """

    def run(f, dtype, reverse=False):
        args = [None if x is None else x.detach().to(dtype if x.is_floating_point() else x.dtype) for x in inputs]
        if reverse:
            args[:3] = [x.flip(-1) for x in args[:3]]
        args = [x.requires_grad_() if x is not None and x.is_floating_point() else x for x in args]
        output = f(*args)
        wanted = [x for x in args if x is not None and x.requires_grad]
        along = grad.to(output.dtype)
        results = [output, *torch.autograd.grad(output, wanted, along.flip(-1) if reverse else along)]
        return [r.flip(-1) if reverse and i < 4 else r for i, r in enumerate(results)]

    dtype = inputs[0].dtype
    exact, theirs, ours = run(peer, torch.float64), run(peer, dtype), run(function, dtype)
    reversed_ = run(peer, dtype, reverse=True)
    names = ("output", "query", "key", "value", "bias")
    slack = 2 * slack if dtype == torch.float64 else slack
    for name, e, t, r, o in zip(names, exact, theirs, reversed_, ours, strict=False):
        assert o.dtype == t.dtype
        assert o.shape == e.shape
        if not e.numel():
            continue
        largest = grad.double().abs().max() if name == "bias" and e.shape[-1] == 1 else e.abs().max()
        ulp = torch.finfo(dtype).eps * largest
        torchs = max((x.double() - e).abs().max() for x in (t, r))
        error, bound = (o.double() - e).abs().max(), 2 * torchs + slack * ulp
        assert error <= bound, f"{name}: {error:.2e} from float64, torch {torchs:.2e}, ulp {ulp:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("lead", "rows", "columns", "width", "value_width"),
    [((2, 3), 50, 270, 24, 40), ((1, 1), 200, 65, 64, 64), ((9, 1), 3, 5, 7, 1)],
)
@pytest.mark.parametrize("masks", ["none", "causal", "bool", "bias"])
def test_distance_to_float64(capability, dtype, lead, rows, columns, width, value_width, masks):
    query, key, value, grad = tensors(lead, rows, columns, width, value_width, dtype, heads_inside=True)
    mask = {"bool": torch.rand(rows, columns) > 0.3, "bias": torch.randn(lead[0], 1, rows, columns).to(dtype)}.get(
        masks
    )
    if masks == "bool":
        mask[0] = False
    call = lambda f: lambda *args: f(*args, is_causal=masks == "causal")
    close_to_float64(call(F.scaled_dot_product_attention), call(SDPA), [query, key, value, mask], grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masks", ["none", "bool", "bias"])
def test_distance_to_float64_of_one_query(capability, dtype, masks):
    query, key, value, grad = tensors((2, 2), 1, 299, 77, 150, dtype, heads_inside=True)
    mask = {"bool": torch.rand(2, 1, 1, 299) > 0.3, "bias": torch.randn(2, 1, 1, 299).to(dtype)}.get(masks)
    close_to_float64(F.scaled_dot_product_attention, SDPA, [query, key, value, mask], grad)


def test_one_query_reads_keys_and_values_of_any_strides(capability):
    """Where they are rows of numbers side by side they are read in place; expanded or turned ones are not."""
    query = torch.randn(1, 2, 1, 24)
    rows = torch.randn(1, 2, 40, 24)
    for other in (rows, rows[..., :1].expand_as(rows), rows.mT.contiguous().mT, rows[:, :, :1].expand_as(rows)):
        for key, value in ((other, rows), (rows, other), (other[:, :1], other[:, :1])):
            output = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
            torch.testing.assert_close(output, SDPA(query, key, value, enable_gqa=True))


def test_one_query_of_large_scores_weighs_as_in_its_gradient(capability):
    """The log-sum-exp and the gradient's scores are one sum: the weights of a row, by its gradient, add up to 1."""
    query, key = 12 * torch.randn(1, 1, 1, 64), 12 * torch.randn(1, 1, 700, 64)
    value = torch.randn(1, 1, 700, 8, requires_grad=True)
    output = F.scaled_dot_product_attention(query, key, value)
    (weights,) = torch.autograd.grad(output, value, torch.ones_like(output))
    torch.testing.assert_close(weights.sum(-2), torch.ones(1, 1, 8), atol=5e-7, rtol=0)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck(is_causal):
    query, key, value, _ = tensors((1, 2), 3, 4, 3, 2, requires_grad=True)
    bias = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    function = lambda *args: F.scaled_dot_product_attention(*args, is_causal=is_causal)
    inputs = (query, key[:, :1], value[:, :1], bias)
    assert torch.autograd.gradcheck(
        function, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(function, inputs)


def test_opcheck():
    query, key, value, grad = tensors((2, 4), 3, 5, 8, dtype=torch.float32, requires_grad=True)
    key, value = key[:, :2], value[:, :2]
    mask = torch.rand(1, 1, 3, 5) > 0.3
    bias = torch.randn(2, 1, 3, 1, requires_grad=True)
    philox = torch.tensor([3, 4])
    torch.library.opcheck(torch.ops.fastgan.attention, (query, key, value, mask, bias, philox, 0.2, True, 0.5))
    torch.library.opcheck(
        torch.ops.fastgan.attention, (query.transpose(1, 2)[:, :2], key, value, *[None] * 3, 0.0, False, 1.0)
    )
    output, logsumexp = torch.ops.fastgan.attention(query, key, value, mask, bias, None, 0.0, True, 0.5)
    for wanted in (True, False):
        rest = (mask, bias, None, output.detach(), logsumexp, 0.0, True, 0.5, wanted)
        # all but aot_dispatch: with output held still, the derivative by query is not that of the reference
        torch.library.opcheck(
            torch.ops.fastgan.attention_backward,
            (grad.detach(), query.detach(), key.detach(), value.detach(), *rest),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


def _self_attention(f, is_causal, bias=None):
    """A function of one tensor through which every input of the operator depends on it."""

    def function(x):
        key, value = x.flip(-1) * 0.5 + 0.1, x.square() - 0.3
        return f(x, key, value, None if bias is None else bias + x.mean(), is_causal=is_causal)

    return function


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_derivative_matrix(backend):
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    bias = torch.randn(1, 2, 3, 3, dtype=torch.float64)

    def plain(query, key, value, mask=None, is_causal=False):
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + mask
        scores = scores.masked_fill(~torch.ones(3, 3, dtype=torch.bool).tril(), float("-inf"))
        return scores.softmax(-1) @ value

    ours = _self_attention(F.scaled_dot_product_attention, True, bias)
    check_derivatives(ours, _self_attention(plain, True, bias), x, backends=(backend,))


def _samples():
    (info,) = [
        op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention" and not op.variant_test_name
    ]
    torch.manual_seed(0)
    return list(info.sample_inputs("cpu", torch.float32, requires_grad=False))


def test_torch_samples():
    """The inputs that torch tests its own function with; with dropout the numbers differ, and shapes count."""
    samples = _samples()
    assert len(samples) > 10
    for sample in samples:
        inputs = [sample.input, *sample.args]
        kwargs = dict(sample.kwargs)
        kwargs.pop("dropout_p", None)
        mask = kwargs.pop("attn_mask", None)
        grad = torch.randn_like(SDPA(*inputs, attn_mask=mask, **kwargs))
        call = lambda f, kwargs=kwargs: lambda *args: f(*args, **kwargs)
        # Their inputs reach 9 and their scores 130: a score s is rounded to s·eps, whatever the order of its sum, and
        # that is the relative error of its probability. So torch's own error is what decides; 8 ulp beside.
        close_to_float64(call(F.scaled_dot_product_attention), call(SDPA), [*inputs, mask], grad, slack=8)
        output = F.scaled_dot_product_attention(*inputs, **sample.kwargs)
        assert output.shape == grad.shape


def test_philox_known_answers():
    """The vectors that the authors publish with their generator."""
    word = lambda x: torch.tensor([x])
    cases = [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for seed, counter, words in cases:
        assert tuple(int(w) for w in philox4x32(word(seed), *map(word, counter))) == words


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dropout_mask_is_the_references_bit_for_bit(capability, dtype):
    batch, heads, rows, columns = 2, 3, 70, 301
    philox = torch.tensor([-1234567890123456789, 2**40 + 17])
    query, key = torch.zeros(batch, heads, rows, 1, dtype=dtype), torch.zeros(batch, heads, columns, 1, dtype=dtype)
    value = torch.eye(columns, dtype=dtype).expand(batch, heads, columns, columns)
    output, _ = torch.ops.fastgan.attention(query, key, value, None, None, philox, 0.3, False, 1.0)
    assert torch.equal(output != 0, dropout_mask(philox, batch, heads, rows, columns, 0.3))


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropout_statistics(dropout_p):
    philox = torch.randint(-(2**63), 2**63 - 1, (2,))
    kept = dropout_mask(philox, 2, 2, 256, 256, dropout_p).double()
    deviation = math.sqrt(dropout_p * (1 - dropout_p))
    assert abs(kept.mean() - (1 - dropout_p)) < 5 * deviation / math.sqrt(kept.numel())
    centred = (kept - (1 - dropout_p)) / deviation
    for shift in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 4)):
        correlation = (centred * centred.roll(shift, (0, 1, 2, 3))).mean()
        assert abs(correlation) < 5 / math.sqrt(kept.numel())


def test_dropout_gradients_are_those_of_the_same_mask():
    query, key, value, grad = tensors((1, 2), 40, 50, 8, requires_grad=True)
    philox = torch.tensor([5, 6])
    results = []
    for function in (torch.ops.fastgan.attention, attention_reference):
        output, _ = function(query, key, value, None, None, philox, 0.4, False, 0.3)
        results.append([output, *torch.autograd.grad(output, (query, key, value), grad)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_dropout_follows_the_generator():
    query, key, value, _ = tensors((1, 2), 8, 9, 4, dtype=torch.float32)
    draw = lambda: F.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    torch.manual_seed(7)
    first, second = draw(), draw()
    torch.manual_seed(7)
    assert torch.equal(draw(), first)
    assert not torch.equal(second, first)
    state = torch.get_rng_state()
    F.scaled_dot_product_attention(query, key, value)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn without dropout
    assert not F.scaled_dot_product_attention(query, key, value, dropout_p=1.0).any()


@pytest.mark.parametrize(("lead", "is_causal"), [((1, 1), True), ((1, 8), False), ((3, 1), True)])
def test_same_bits_for_every_number_of_threads(capability, lead, is_causal):
    query, key, value, grad = tensors(lead, 260, 520, 16, dtype=torch.float32, requires_grad=True)
    bias = torch.randn(260, 520, requires_grad=True)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        output = F.scaled_dot_product_attention(query, key, value, bias, is_causal=is_causal)
        results.append([output, *torch.autograd.grad(output, (query, key, value, bias), grad)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_mask_and_bias_together():
    query, key, value, _ = tensors((2, 2), 6, 7, 4)
    mask, bias = torch.rand(2, 1, 1, 7) > 0.4, torch.randn(1, 2, 6, 7, dtype=torch.float64)
    mask[..., 0] = True
    output, _ = torch.ops.fastgan.attention(query, key, value, mask, bias, None, 0.0, False, 0.5)
    joined = bias.masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(output, SDPA(query, key, value, joined, scale=0.5))


def test_autocast_lowers_as_torch_does():
    query, key, value, _ = tensors((1, 2), 5, 5, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = F.scaled_dot_product_attention(query, key.bfloat16(), value, torch.zeros(5, 5))
        raw, _ = torch.ops.fastgan.attention(query, key, value, None, None, None, 0.0, False, 0.5)
        with fastgan.use("reference"):
            reference = F.scaled_dot_product_attention(query, key, value)
    assert output.dtype == raw.dtype == reference.dtype == torch.bfloat16


def test_result_lies_in_memory_as_the_query_does():
    query, key, value, _ = tensors((2, 3), 5, 6, 4, dtype=torch.float32, heads_inside=True)
    for q in (query, query.contiguous()):
        assert F.scaled_dot_product_attention(q, key, value).stride() == SDPA(q, key, value).stride()


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (RuntimeError, {"dropout_p": 1.5}),
        (RuntimeError, {"dropout_p": -0.1}),
        (RuntimeError, {"query": torch.zeros(4)}),
        (RuntimeError, {"key": torch.zeros(2, 2, 5, 3)}),
        (RuntimeError, {"value": torch.zeros(2, 2, 6, 4)}),
        (RuntimeError, {"key": torch.zeros(2, 2, 5, 4).double()}),
        (RuntimeError, {"key": torch.zeros(2, 2, 5, 4, device="meta")}),
        (RuntimeError, {"query": torch.zeros(2, 4, 3, 4)}),
        (RuntimeError, {"query": torch.zeros(2, 3, 3, 4), "enable_gqa": True}),
        (IndexError, {"query": torch.zeros(3, 4), "enable_gqa": True}),
        (RuntimeError, {"attn_mask": torch.zeros(3, 6)}),
        (RuntimeError, {"attn_mask": torch.zeros(2, 2, 2, 3, 5)}),
        (RuntimeError, {"attn_mask": torch.zeros(3, 5, dtype=torch.int64)}),
        (RuntimeError, {"attn_mask": torch.zeros(3, 5, dtype=torch.float64)}),
        (TypeError, {"attn_mask": [[True]]}),
        (TypeError, {"query": None}),
        (TypeError, {"dropout_p": "0.1"}),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_refused(error, change):
    arguments = {"query": torch.zeros(2, 2, 3, 4), "key": torch.zeros(2, 2, 5, 4), "value": torch.zeros(2, 2, 5, 4)}
    F.scaled_dot_product_attention(**arguments)
    with pytest.raises(error, match="scaled_dot_product_attention"):
        F.scaled_dot_product_attention(**(arguments | change))


def test_compiles_whole():
    query, key, value, _ = tensors((2, 2), 5, 6, 8, dtype=torch.float32, requires_grad=True)
    function = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(function(query, key, value), (query, key, value))
    torch.testing.assert_close(torch.autograd.grad(compiled(query, key, value), (query, key, value)), wanted)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_exp_on_every_float32(tmp_path):
    """At most 2 ulp on all bit patterns of its range (the sanitizers' run of the same harness takes samples)."""
    root = Path(__file__).parents[2]
    with open("/proc/cpuinfo") as info:
        flags = ["-mavx2", "-mfma", "-mf16c"] if " avx2 " in info.read() else []
    program = tmp_path / "exp"
    sources = ["-I", root / "csrc", "-I", root / "tests/kernel_harness", root / "tests/kernel_harness/exp_harness.cpp"]
    options = ["-std=gnu++20", "-O2", "-fno-math-errno", "-ffp-contract=fast", "-DFASTGAN_ISA=avx2", "-pthread"]
    subprocess.run(["g++", *options, *flags, *sources, "-o", program], check=True)
    done = subprocess.run([program, "all"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
