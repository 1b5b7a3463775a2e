"""The fast convolutions: three operators against float64, their derivatives, and what they must not do."""

import gc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgan
from fastgan.nn.functional import conv2d, conv_transpose2d
from fastgan.ops import conv as ops
from tests.convolutions import (
    LAYOUTS,
    Names,
    check_bounds,
    check_half,
    check_magnitudes,
    check_nonfinite,
    check_penalty,
    check_threads,
    draw_padding_and_size,
    draw_strides,
    exact,
    operands,
    three,
)
from tests.derivatives import check_derivatives

KINDS = {"winograd F(4,2)": (4, 2), "winograd F(4,3)": (3, 1)}


def _operands(kind, *sizes, **options):
    return operands(*KINDS[kind], *sizes, **options)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("sizes", [(3, 64, 48, (24, 20)), (66, 256, 32, (8, 8)), (2, 16, 40, (70, 9))], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_those_documented(kind, sizes, layout, capability):
    check_bounds(_operands(kind, *sizes, layout=layout), ops.ERRORS[kind], layout)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_any_size_padding_and_stride_of_memory(data, kind):
    padding, size = draw_padding_and_size(data, KINDS[kind][0], 19)
    numbers = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)))
    *tensors, s, p = _operands(kind, *numbers, size, padding=padding)
    arguments = (*draw_strides(data, *tensors), s, p)
    for got, right in zip(three(*arguments), exact(*arguments), strict=True):
        torch.testing.assert_close(got.double(), right, rtol=0, atol=1e-5 * max(1.0, right.abs().max().item()))


def _take_any_channels(monkeypatch):
    name = ops.algorithm_name
    monkeypatch.setattr(ops, "algorithm_name", lambda *args: name(*args[:4], 16, 16))


@pytest.mark.kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_torchs_own_samples_on_the_kernel(name, kind, monkeypatch):
    from torch.testing._internal.common_methods_invocations import op_db

    calls = []
    monkeypatch.setattr(ops, "pays", lambda *args: calls.append(args) or True)
    _take_any_channels(monkeypatch)
    ours, theirs = {"conv2d": (conv2d, F.conv2d), "conv_transpose2d": (conv_transpose2d, F.conv_transpose2d)}[name]
    kernel, stride = KINDS[kind]
    info = next(op for op in op_db if op.name == f"nn.functional.{name}")
    for sample in info.sample_inputs("cpu", torch.float32, requires_grad=True):
        weight, *rest = sample.args
        plain = sample.kwargs.get("groups", 1) == 1 and not isinstance(sample.kwargs.get("padding", 0), str)
        if sample.input.dim() != 4 or not plain or rest[1:]:
            continue
        # torch's samples have other kernels: theirs are cut or padded to ours
        weight = F.pad(weight, (0, kernel - weight.shape[3], 0, kernel - weight.shape[2])).detach().requires_grad_()
        options = {key: value for key, value in sample.kwargs.items() if key in ("padding", "output_padding")}
        if stride == 1:
            options.pop("output_padding", None)
        x = F.pad(sample.input, (2, 2, 2, 2)).detach().requires_grad_()
        got = ours(x, weight, *rest, stride=stride, **options)
        exact = theirs(
            x.double(), weight.double(), *(b if b is None else b.double() for b in rest), stride=stride, **options
        )
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-3)
        grad = torch.randn_like(got)
        for a, b in zip(
            torch.autograd.grad(got, (x, weight), grad),
            torch.autograd.grad(exact, (x, weight), grad.double()),
            strict=True,
        ):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-3)
    assert calls


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_every_number_of_threads(kind):
    check_threads(_operands(kind, 40, 40, 48, (14, 11)))


OPERATORS = {
    "conv": lambda x, w, y, s, p: (ops.conv, (x, w, torch.randn(w.shape[0]).to(x), s, p, False)),
    "conv_input_gradient": lambda x, w, y, s, p: (
        ops.conv_input_gradient,
        (y, w, torch.randn(w.shape[1]).to(x), list(x.shape[2:]), s, p, False),
    ),
    "conv_weight_gradient": lambda x, w, y, s, p: (ops.conv_weight_gradient, (y, x, list(w.shape[2:]), s, p, True)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [3, 9], ids=["direct", "winograd"])
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_contract(name, channels, kind):
    operator, arguments = OPERATORS[name](*_operands(kind, 2, channels, channels + 1, (6, 5)))
    float32 = tuple(a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments)
    torch.library.opcheck(operator, float32)
    exact = tuple(a.double().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments)
    tensors = [a for a in exact if isinstance(a, torch.Tensor)]
    rest = [a for a in exact if not isinstance(a, torch.Tensor)]

    def call(*tensors):
        return operator(*tensors, *rest)

    assert torch.autograd.gradcheck(call, tensors, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_kind_of_derivative(name):
    _, w, _, s, p = _operands("winograd F(4,2)", 1, 2, 2, (4, 4))
    w, y = w.double(), torch.randn(2, 2, 2, 2, dtype=torch.float64)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    # Every tensor of the call depends on the argument, so that all gradients count.
    functions = {
        "conv": lambda f: lambda z: f(z, w * z.sum(), z.mean((0, 2, 3)), s, p, False),
        "conv_input_gradient": lambda f: lambda z: f(y * z.mean(), z, z.mean((0, 2, 3)), [4, 4], s, p, False),
        "conv_weight_gradient": lambda f: lambda z: f(y * z.mean(), z, [4, 4], s, p, False),
    }
    reference = getattr(ops, f"{name}_reference")
    check_derivatives(functions[name](getattr(ops, name)), functions[name](reference), x)


def _layer(transposed, channels=32, outputs=48):
    x = torch.randn(24, outputs if transposed else channels, 8, 8) if transposed else torch.randn(24, channels, 16, 16)
    w = torch.randn(outputs, channels, 4, 4) * 0.1
    b = torch.randn(channels if transposed else outputs)
    return x, w, b, conv_transpose2d if transposed else conv2d


@pytest.mark.kernel
@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("transposed", [False, True], ids=["conv2d", "conv_transpose2d"])
def test_R36_penalty_runs_on_the_kernel_and_equals_float64(transposed, layout):
    tensors = [t.contiguous(memory_format=layout) if t.dim() == 4 else t for t in _layer(transposed)[:3]]
    ours, theirs = (conv_transpose2d, F.conv_transpose2d) if transposed else (conv2d, F.conv2d)
    assert ops.pays((24, 32, 16, 16), (48, 32, 4, 4), (8, 8), "winograd F(4,2)")

    check_penalty(ours, theirs, tensors, 2, 1)


@pytest.mark.kernel
@pytest.mark.parametrize("transposed", [False, True], ids=["conv2d", "conv_transpose2d"])
def test_only_the_gradients_asked_for(transposed):
    x, w, b, function = _layer(transposed)
    x, w, b = (t.requires_grad_() for t in (x, w, b))
    other = "fastgan.conv" if transposed else "fastgan.conv_input_gradient"
    for wanted, expected, absent in (
        ((x,), other, "fastgan.conv_weight_gradient"),
        ((w,), "fastgan.conv_weight_gradient", other),
        ((b,), "aten.sum.dim_IntList", other),
    ):
        out = function(x, w, b, 2, 1)
        with Names() as names:
            torch.autograd.grad(out.sum(), wanted, create_graph=True)
        assert expected in names.seen
        assert absent not in names.seen


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nonfinite_stays_where_it_belongs(kind, value):
    check_nonfinite(lambda: _operands(kind, 2, 20, 24, (13, 10)), value, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_large_numbers_do_not_overflow_inside(kind):
    # sums of 1e38 that cancel: the transforms' own sums would be infinite
    x, w, _, stride, padding = _operands(kind, 2, 16, 16, (8, 8))
    x = torch.full_like(x, 2e38)
    w = torch.zeros_like(w)
    w[:, 0, 1, 1] = 1.0
    assert ops.conv(x, w, None, stride, padding, False).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_and_mixed_magnitudes(kind):
    check_magnitudes(_operands(kind, 3, 64, 64, (16, 16)), 8, 1e-6)


def test_compiles_whole_and_keeps_the_layout():
    for transposed in (False, True):
        x, w, b, function = _layer(transposed)
        for layout in LAYOUTS:
            leaves = [x.contiguous(memory_format=layout).requires_grad_(), w.clone().requires_grad_(), b]

            def step(x, w, b, function=function):
                out = function(x, w, b, 2, 1)
                return out.detach(), *torch.autograd.grad(out.square().sum(), (x, w))

            with torch._dynamo.config.patch(trace_autograd_ops=True):
                got = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
            for a, expected in zip(got, step(*leaves), strict=True):
                assert torch.equal(a, expected)
                assert a.stride() == expected.stride()
            assert got[0].is_contiguous(memory_format=layout)


def test_R13_vmap_autocast_and_empty():
    x, w, b, _ = _layer(False)

    def ours(w, x):
        return ops.conv(x[None], w, None, [2, 2], [1, 1], False).square().sum()

    def theirs(w, x):
        return F.conv2d(x[None], w, None, 2, 1).square().sum()

    each = torch.func.vmap(torch.func.grad(ours), (None, 0))
    loss = [torch.func.grad(theirs)(w.double(), image) for image in x[:2].double()]
    torch.testing.assert_close(each(w, x[:2]).double(), torch.stack(loss), rtol=1e-4, atol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv2d(x, w, b, 2, 1).dtype == torch.bfloat16
        assert ops.conv(x, w, b, [2, 2], [1, 1], False).dtype == torch.bfloat16
    assert conv2d(x[:0], w, b, 2, 1).shape == (0, 48, 8, 8)
    assert ops.conv(x[:0], w, b, [2, 2], [1, 1], False).shape == (0, 48, 8, 8)
    assert ops.conv_weight_gradient(x[:0, :, :8, :8], x[:0], [4, 4], [2, 2], [1, 1], False).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_float32_inside(kind, dtype):
    check_half(_operands(kind, 5, 33, 18, (11, 12)), dtype)


@pytest.mark.kernel
def test_the_algorithm_is_chosen():
    x, w, b, _ = _layer(False)
    fast, exact = conv2d(x, w, b, 2, 1), F.conv2d(x, w, b, 2, 1)
    assert not torch.equal(fast, exact)
    assert fastgan.get_conv_algorithm() == "auto"
    try:
        fastgan.set_conv_algorithm("exact")
        assert torch.equal(conv2d(x, w, b, 2, 1), exact)
        assert fastgan.explain(torch.nn.Conv2d(32, 32, 4, 2))[0].reason == "torch"
    finally:
        fastgan.set_conv_algorithm("auto")
    assert fastgan.explain(torch.nn.Conv2d(32, 32, 4, 2))[0].reason == "winograd F(4,2)"
    assert fastgan.explain(fastgan.nn.ConvTranspose2d(32, 32, 3, 1))[0].reason == "winograd F(4,3)"
    assert fastgan.explain(torch.nn.Conv2d(3, 32, 4, 2))[0].reason == "direct"
    assert fastgan.explain(fastgan.nn.ConvTranspose2d(32, 3, 4, 2))[0].reason == "direct"
    assert fastgan.explain(torch.nn.Conv2d(32, 3, 3))[0].reason == "direct"
    assert fastgan.explain(torch.nn.Conv2d(32, 3, 4, 2))[0].reason == "torch"
    assert fastgan.explain(torch.nn.Conv2d(12, 32, 4, 2))[0].reason == "torch"
    with pytest.raises(ValueError, match="algorithm must be 'auto' or 'exact', got 'fast'"):
        fastgan.set_conv_algorithm("fast")
    with fastgan.use("reference"):
        assert torch.equal(conv2d(x, w, b, 2, 1), exact)
    # few images, few channels, other kernels: torch's
    assert torch.equal(conv2d(x[:1, :4], w[:, :4], b, 2, 1), F.conv2d(x[:1, :4], w[:, :4], b, 2, 1))
    assert torch.equal(conv2d(x, w, b, 3, 1), F.conv2d(x, w, b, 3, 1))


def test_R45_nothing_is_kept_after_a_penalty():
    import weakref

    x, w, b, function = _layer(False)
    x, w = x.requires_grad_(), w.requires_grad_()
    gc.disable()
    try:
        out = function(x, w, b, 2, 1)
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        alive = [weakref.ref(t) for t in (out, grad)]
        del out, grad
        assert not any(ref() is not None for ref in alive)
    finally:
        gc.enable()


@pytest.mark.parametrize("channels", [6, 9], ids=["direct", "winograd"])
def test_R34_every_output_padding_on_the_kernel(channels, monkeypatch):
    monkeypatch.setattr(ops, "pays", lambda *args: True)
    _take_any_channels(monkeypatch)
    x, w = torch.randn(2, 5, 4, 7), torch.randn(5, channels, 4, 4)
    for padding in range(6):
        for extra in ((0, 0), (1, 0), (1, 1)):
            options = {"stride": 2, "padding": padding, "output_padding": extra}
            try:
                exact = F.conv_transpose2d(x.double(), w.double(), **options)
            except RuntimeError:
                with pytest.raises(RuntimeError):
                    conv_transpose2d(x, w, **options)
                continue
            torch.testing.assert_close(conv_transpose2d(x, w, **options).double(), exact, rtol=1e-4, atol=1e-4)
