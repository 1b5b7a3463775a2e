"""conv_gan_loss: the discriminator's last convolution and its loss, against float64 PyTorch."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.common_methods_invocations import op_db

import fastgan
from fastgan.nn.functional import conv_bce_with_logits, conv_gan_loss
from fastgan.ops.gan_loss import LOSSES
from tests.derivatives import check_derivatives

# N, C, H, W, K, kernel, stride, padding: DCGAN's last layer, several logits an image, patches, odd sizes of everything
SHAPES = [
    (5, 40, 4, 4, 1, (4, 4), 1, 0),
    (2, 33, 9, 7, 1, (4, 4), 1, 1),
    (3, 70, 8, 8, 2, (4, 4), 1, 0),
    (2, 20, 9, 11, 3, (3, 2), (2, 3), (1, 2)),
    (1, 16, 31, 31, 1, (4, 4), 1, 1),
    (2, 3, 5, 6, 4, (1, 1), 1, 0),
    (9, 65, 1, 1, 2, (1, 1), 1, 0),
    (2, 8, 3, 40, 1, (5, 3), (4, 1), 2),
]


def plain(input, weight, bias, target, *, loss="bce", stride=1, padding=0, sample_weight=None, pos_weight=1.0,
          label_smoothing=0.0, reduction="mean"):  # fmt: skip
    """The obvious composition, in whatever dtype comes."""
    logits = F.conv2d(input, weight, bias, stride, padding)
    if isinstance(target, torch.Tensor) and target.dim() == 1:
        target = target.view(-1, 1, 1, 1)
    target = target * (1 - label_smoothing) + label_smoothing / 2
    if loss == "bce":
        target = torch.as_tensor(target, dtype=logits.dtype).expand_as(logits)
        each = F.binary_cross_entropy_with_logits(
            logits, target, pos_weight=torch.as_tensor(pos_weight, dtype=logits.dtype), reduction="none"
        )
    elif loss == "hinge":
        each = pos_weight * target * F.relu(1 - logits) + (1 - target) * F.relu(1 + logits)
    elif loss == "lsgan":
        each = (logits - target) ** 2
    else:
        each = (1 - target) * logits - pos_weight * target * logits
    if sample_weight is not None:
        each = each * (sample_weight.view(-1, 1, 1, 1) if sample_weight.dim() == 1 else sample_weight)
    return {"mean": each.mean, "sum": each.sum, "none": lambda: each}[reduction](), logits


def tensors(shape, dtype=torch.float32, memory_format=torch.contiguous_format):
    n, c, h, w, k, kernel, _, _ = shape
    scale = (c * kernel[0] * kernel[1]) ** -0.5
    input = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=memory_format)
    return [
        input.requires_grad_(),
        (torch.randn(k, c, *kernel) * 2 * scale).to(dtype).requires_grad_(),
        torch.randn(k).to(dtype).requires_grad_(),
    ]


def results(function, arguments, target, seed=0, **options):
    """(loss, logits, the gradients of both together)."""
    value, logits = function(*arguments, target, **options)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(logits.shape, generator=generator).to(logits.dtype)
    scalar = (value.sum() if value.dim() else value).to(logits.dtype) * 3 + (weights * logits).sum()
    return [value, logits, *torch.autograd.grad(scalar, arguments)]


def assert_at_most_twice(got, peer, want, name, summed=None):
    """The error of ``got`` against ``want`` (float64) beside that of ``peer``, torch at the same precision.

    ``summed``: what ``want`` would be, had none of its terms cancelled. The rounding of a sum is that of its terms:
    where they cancel, torch's own error is small by luck, and 8 ulp of what was left would measure that luck.
    """
    error, allowed = (got.double() - want).abs().max(), (peer.double() - want).abs().max()
    scale = (want if summed is None else summed).abs().max()
    assert error <= 2 * allowed + 8 * torch.finfo(got.dtype).eps * scale, (name, error, allowed, scale)


def without_cancellation(arguments, target, options):
    """The five results of ``results`` in float64 with every term of every sum made positive."""
    input, weight, bias = (t.detach().double() for t in arguments)
    geometry = (options.get("stride", 1), options.get("padding", 0))
    logits = F.conv2d(input, weight, bias, *geometry).requires_grad_()
    passed = torch.eye(weight.shape[0], dtype=torch.float64).view(*weight.shape[:1], -1, 1, 1)
    rest = {name: value for name, value in options.items() if name not in ("stride", "padding", "reduction")}
    # The loss alone, through a convolution that changes nothing; its gradient, and that of the logits beside it.
    each, _ = plain(logits, passed, None, target, reduction="none", **rest)
    scale = 1 / max(logits.numel(), 1) if options.get("reduction", "mean") == "mean" else 1.0
    (slope,) = torch.autograd.grad(each.sum(), logits)
    slope = slope.abs() * 3 * scale + 1
    value = each.detach().abs() * scale
    return [
        value if options.get("reduction") == "none" else value.sum(),
        F.conv2d(input.abs(), weight.abs(), bias.abs(), *geometry),
        torch.nn.grad.conv2d_input(input.shape, weight.abs(), slope, *geometry),
        torch.nn.grad.conv2d_weight(input.abs(), weight.shape, slope, *geometry),
        slope.sum((0, 2, 3)),
    ]


def check(arguments, target, **options):
    """At most twice the error of plain PyTorch at the same precision, plus a few ulp."""
    ours = results(conv_gan_loss, arguments, target, **options)
    exact = lambda t: t.detach().double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
    judged = {name: exact(value) for name, value in options.items()}
    judge = results(plain, [exact(a).requires_grad_() for a in arguments], exact(target), **judged)
    dtype = arguments[0].dtype
    cast = {n: v.to(dtype) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    theirs = results(plain, arguments, target.to(dtype) if isinstance(target, torch.Tensor) else target, **cast)
    summed = without_cancellation(arguments, exact(target), judged)
    names = ("loss", "logits", "input", "weight", "bias")
    for name, got, peer, want, scale in zip(names, ours, theirs, judge, summed, strict=True):
        assert got.shape == want.shape, name
        assert got.dtype == dtype, name
        if got.numel() == 0:
            continue
        assert_at_most_twice(got, peer, want, name, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_against_float64(dtype, memory_format):
    for i, shape in enumerate(SHAPES):
        arguments = tensors(shape, dtype, memory_format)
        target = [1.0, 0.0, torch.rand(shape[0]).to(dtype).double()][i % 3]
        check(arguments, target, stride=shape[6], padding=shape[7])


def test_every_instruction_set(capability):
    for shape in SHAPES:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            check(tensors(shape, memory_format=memory_format), 1.0, stride=shape[6], padding=shape[7])
    check(tensors(SHAPES[1], torch.float16), 1.0, padding=1)
    check(tensors(SHAPES[1], torch.bfloat16), 1.0, padding=1)
    check(tensors(SHAPES[1], torch.float64), 1.0, padding=1)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_and_options(loss, reduction):
    shape = (3, 20, 6, 7, 2, (4, 4), 1, 1)
    options = {"loss": loss, "reduction": reduction, "padding": 1, "label_smoothing": 0.2}
    per_logit, per_image = torch.rand(3, 2, 5, 6), torch.rand(3)
    positive = {} if loss == "lsgan" else {"pos_weight": torch.rand(2, 1, 1) * 3}
    for target in (1, 0.25, per_image, per_logit, torch.tensor(0.5)):
        check(tensors(shape), target, **options)
    check(tensors(shape), per_logit, sample_weight=torch.rand(3), **positive, **options)
    check(tensors(shape), per_image, sample_weight=torch.rand(2, 1, 6), **positive, **options)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_shapes_and_strides(data):
    draw = data.draw
    n, c, k = draw(st.integers(0, 4)), draw(st.integers(1, 40)), draw(st.integers(1, 4))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride, padding = draw(st.tuples(st.integers(1, 3), st.integers(1, 3))), draw(st.tuples(*[st.integers(0, 3)] * 2))
    h = draw(st.integers(max(1, kernel[0] - 2 * padding[0]), 12))
    w = draw(st.integers(max(1, kernel[1] - 2 * padding[1]), 20))
    input, weight, bias = tensors((n, c, h, w, k, kernel, stride, padding))
    kind = draw(st.sampled_from(["nchw", "nhwc", "transposed", "every second", "expanded", "storage offset"]))
    with torch.no_grad():
        if kind == "nhwc":
            input = input.contiguous(memory_format=torch.channels_last)
        elif kind == "transposed":
            input = torch.randn(n, c, w, h).transpose(2, 3)
        elif kind == "every second":
            input = torch.randn(n, 2 * c, h, 2 * w)[:, ::2, :, 1::2]
        elif kind == "expanded":
            input = torch.randn(1, c, h, 1).expand(n, c, h, w)
        elif kind == "storage offset":
            input = torch.randn(n + 1, c, h, w)[1:]
        if draw(st.booleans()):
            weight = weight.contiguous(memory_format=torch.channels_last)
    arguments = [input.detach().requires_grad_(), weight.detach().requires_grad_(), bias]
    loss = draw(st.sampled_from(LOSSES))
    target = draw(st.sampled_from([1.0, 0.0, torch.rand(n)]))
    check(
        arguments, target, loss=loss, stride=stride, padding=padding, reduction=draw(st.sampled_from(["sum", "none"]))
    )


def test_empty_batch():
    arguments = tensors((0, 8, 4, 4, 1, (4, 4), 1, 0))
    loss, logits = conv_bce_with_logits(*arguments, 1.0)
    assert loss.isnan()  # as torch's mean over nothing
    assert logits.shape == (0, 1, 1, 1)
    loss, _ = conv_bce_with_logits(*arguments, 1.0, reduction="sum")
    loss.backward()
    assert loss == 0
    assert not arguments[1].grad.any()


@pytest.mark.kernel
def test_same_bits_for_every_thread_count():
    for shape in [(9, 72, 9, 9, 2, (4, 4), 1, 1), (13, 128, 4, 4, 1, (4, 4), 1, 0), (1, 64, 40, 40, 1, (4, 4), 2, 1)]:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            arguments, runs = tensors(shape, memory_format=memory_format), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                runs.append(results(conv_gan_loss, arguments, 1.0, stride=shape[6], padding=shape[7]))
            for other in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


# ---- derivatives ----


def small(dtype=torch.float64):
    shape = (2, 3, 5, 4, 2, (3, 2), (2, 1), 1)
    return [t.detach().requires_grad_() for t in tensors(shape, dtype)], {"stride": (2, 1), "padding": 1}


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss):
    arguments, options = small()
    target = (torch.rand(2, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    sample_weight = torch.rand(2, dtype=torch.float64).requires_grad_()
    pos_weight = None if loss == "lsgan" else torch.rand(2, 1, 1, dtype=torch.float64).requires_grad_()

    def function(input, weight, bias, target, sample_weight, pos_weight=None):
        return conv_gan_loss(
            input, weight, bias, target, loss=loss, sample_weight=sample_weight, pos_weight=pos_weight, **options
        )

    inputs = (*arguments, target, sample_weight, *([] if pos_weight is None else [pos_weight]))
    assert torch.autograd.gradcheck(
        function,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )
    assert torch.autograd.gradgradcheck(function, inputs, check_batched_grad=True, fast_mode=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_derivative_matrix(loss):
    weight, bias = torch.randn(1, 4, 4, 3, dtype=torch.float64), torch.randn(1, dtype=torch.float64)

    def through(function):
        def f(x):  # every differentiable argument depends on x
            value, logits = function(x, weight * x.mean(0), bias + x.mean(), 0.75, loss=loss, padding=1)
            return torch.cat([value.reshape(1), logits.flatten()])

        return f

    x = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    check_derivatives(through(conv_gan_loss), through(plain), x)


def test_opcheck():
    (input, weight, bias), _ = small(torch.float32)
    target, ones = torch.rand(2, 1, 1, 1), torch.rand(2, 1, 1)
    forward, backward = torch.ops.fastgan.conv_gan_loss, torch.ops.fastgan.conv_gan_loss_backward
    torch.library.opcheck(forward, (input, weight, bias, target, 0.0, None, ones, 0, [2, 1], [1, 1], 0.1, 1, False))
    last = input.detach().contiguous(memory_format=torch.channels_last)
    half = [t.detach().bfloat16() for t in (last, weight)]
    cheap = ("test_schema", "test_autograd_registration", "test_faketensor")
    rest = (None, None, 1.0, target, None, 1, [2, 1], [1, 1], 0.0, 0, True)
    torch.library.opcheck(forward, (*half, *rest), test_utils=cheap)
    _, logits = forward(input.detach(), weight, bias, None, 1.0, None, None, 0, [2, 1], [1, 1], 0.0, 1, False)
    rest = (logits.detach(), target, 0.0, None, ones, 0, [2, 1], [1, 1], 0.1, 1)
    grad_logits = torch.randn_like(logits)
    scalar = torch.tensor(2.0)
    torch.library.opcheck(backward, (scalar, grad_logits, input, weight, bias, *rest, [True, True, True]))
    skipping = (scalar, None, last, weight, bias, *rest, [True, False, False])
    torch.library.opcheck(backward, skipping, test_utils=cheap)


def test_gradients_in_every_mode():
    """Compiled as one graph with a target tensor, and as one number, under vmap and autocast."""
    (input, weight, bias), options = small(torch.float32)
    target = torch.rand(2)
    for t in (target, 1.0):
        step = torch.compile(
            lambda *a, t=t: conv_bce_with_logits(*a, t, **options), fullgraph=True, backend="aot_eager"
        )
        for got, want in zip(step(input, weight, bias), plain(input, weight, bias, t, **options), strict=True):
            torch.testing.assert_close(got, want)
    stack = torch.randn(3, *input.shape)
    mapped = torch.vmap(lambda x: conv_bce_with_logits(x, weight, bias, target, **options))(stack)
    for i in range(3):
        for got, want in zip(mapped, plain(stack[i], weight, bias, target, **options), strict=True):
            torch.testing.assert_close(got[i], want)
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = conv_bce_with_logits(input, weight, bias, target, **options)
        peer_logits = F.conv2d(input, weight, bias, **options)
        peer = F.binary_cross_entropy_with_logits(peer_logits, target.view(-1, 1, 1, 1).expand_as(peer_logits))
    assert (loss.dtype, logits.dtype) == (peer.dtype, peer_logits.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(loss, peer, rtol=1e-2, atol=1e-2)
    loss.backward()
    assert input.grad.dtype == torch.float32


def test_meta_and_reference():
    (input, weight, bias), options = small(torch.float32)
    loss, logits = conv_bce_with_logits(*(t.to("meta") for t in (input, weight, bias)), 1.0, **options)
    assert loss.is_meta
    with fastgan.use("reference"):
        want = conv_bce_with_logits(input, weight, bias, 1.0, **options)
    assert logits.shape == want[1].shape
    for got, expected in zip(conv_bce_with_logits(input, weight, bias, 1.0, **options), want, strict=True):
        torch.testing.assert_close(got, expected)


# ---- torch's own samples, and what people met ----


@pytest.mark.kernel
def test_torchs_own_samples():
    """nn.functional.binary_cross_entropy_with_logits through a convolution that changes nothing."""
    (operator,) = [op for op in op_db if op.name == "nn.functional.binary_cross_entropy_with_logits"]
    tried = 0
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for sample in operator.sample_inputs("cpu", dtype, requires_grad=True):
            target, options = sample.args[0], dict(sample.kwargs)
            want = F.binary_cross_entropy_with_logits(sample.input, target, **options)
            # To (N, 1, H, W), each tensor broadcast first, for the leading dimensions of ours are others.
            rows = sample.input.numel() // max(sample.input.shape[-1], 1) if sample.input.dim() else 1
            shape = (rows, 1, 1, sample.input.numel() // max(rows, 1))
            spread = lambda t, s=sample, shape=shape: t.expand_as(s.input).reshape(shape)
            got, logits = conv_bce_with_logits(
                sample.input.reshape(shape),
                torch.ones(1, 1, 1, 1, dtype=dtype),
                None,
                spread(target),
                sample_weight=spread(options["weight"]) if options.get("weight") is not None else None,
                pos_weight=spread(options["pos_weight"]) if options.get("pos_weight") is not None else None,
                reduction=options.get("reduction", "mean"),
            )
            assert torch.equal(logits.reshape(sample.input.shape), sample.input)
            exact = sample.input.detach().double().requires_grad_()
            wide = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in options.items()}
            judge = F.binary_cross_entropy_with_logits(exact, target.double(), **wide)
            assert_at_most_twice(got.reshape(want.shape), want, judge, "loss")
            gradients = [torch.autograd.grad(v.sum(), t)[0] for v, t in
                         ((got, sample.input), (want, sample.input), (judge, exact))]  # fmt: skip
            assert_at_most_twice(*gradients, "input")
            tried += 1
    assert tried > 20


def test_R33_several_logits_an_image():
    input, weight, bias = tensors((4, 16, 8, 8, 1, (4, 4), 1, 0))
    logits = F.conv2d(input, weight, bias)
    assert logits.shape == (4, 1, 5, 5)
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0])
    for target, spread in ((1.0, torch.ones(4, 1, 5, 5)), (labels, labels.view(4, 1, 1, 1).expand(4, 1, 5, 5))):
        loss, _ = conv_bce_with_logits(input, weight, bias, target)
        torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, spread))
    for wrong in (torch.ones(5), torch.ones(4, 1), torch.ones(4, 25), torch.ones(1, 1, 5, 5)):
        with pytest.raises(RuntimeError, match=r"\(4, 1, 5, 5\).*" + str(tuple(wrong.shape)).replace("(", r"\(")[:-1]):
            conv_bce_with_logits(input, weight, bias, wrong)


def test_R36_a_linear_network_has_a_second_backward():
    for loss in ("wasserstein", "bce"):
        (input, weight, bias), options = small()
        logits = conv_gan_loss(input, weight, bias, 1.0, loss=loss, **options)[1]
        (first,) = torch.autograd.grad(logits.sum(), input, create_graph=True)
        assert first.requires_grad
        first.square().sum().backward()
        copies = [t.detach().clone().requires_grad_() for t in (input, weight, bias)]
        (want,) = torch.autograd.grad(F.conv2d(*copies, **options).sum(), copies[0], create_graph=True)
        want.square().sum().backward()
        torch.testing.assert_close(first, want)
        torch.testing.assert_close(weight.grad, copies[1].grad)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_R37_a_confident_discriminator(label, capability):
    sizes = torch.tensor([0.3, 1.0, 5.0, 17.0, 20.0, 21.0, 60.0, 88.0, 100.0, 104.0, 1e3, 1e10, 1e30])
    logits = torch.cat([sizes, -sizes]).view(-1, 1, 1, 1).requires_grad_()
    loss, out = conv_bce_with_logits(logits, torch.ones(1, 1, 1, 1), None, label, reduction="none")
    assert torch.equal(out, logits)
    exact = logits.detach().double().requires_grad_()
    wanted = F.softplus(exact * (1 - 2 * label), threshold=600)
    (want,) = torch.autograd.grad(wanted.sum(), exact)
    (got,) = torch.autograd.grad(loss.sum(), logits)
    tiny = torch.finfo(torch.float32).tiny
    torch.testing.assert_close(loss.double(), wanted, rtol=4e-7, atol=tiny)
    torch.testing.assert_close(got.double(), want, rtol=4e-7, atol=tiny)


def test_R45_a_penalty_leaves_nothing_behind():
    gc.collect()
    gc.disable()
    try:
        (input, weight, bias), options = small()
        features = input * 1.0
        loss, logits = conv_bce_with_logits(features, weight, bias, 1.0, **options)
        (first,) = torch.autograd.grad(loss + logits.sum(), features, create_graph=True)
        first.square().sum().backward()
        alive = [weakref.ref(t) for t in (features, loss, logits, first)]
        del features, loss, logits, first
        assert all(reference() is None for reference in alive)
    finally:
        gc.enable()


@pytest.mark.kernel
def test_a_penalty_skips_the_weight_gradient(monkeypatch):
    from fastgan.ops import gan_loss

    asked, operator = [], gan_loss._backward_operator
    monkeypatch.setattr(gan_loss, "_backward_operator", lambda *args: (asked.append(args[-1]), operator(*args))[1])
    arguments, options = small()
    copies = [t.detach().clone().requires_grad_() for t in arguments]
    penalties = []
    for function, (input, weight, bias) in ((conv_gan_loss, arguments), (plain, copies)):
        loss, logits = function(input, weight, bias, 1.0, **options)
        (first,) = torch.autograd.grad(logits.sum() + loss, input, create_graph=True)
        penalties.append(first.square().sum())
    assert asked == [[True, False, False]]
    for penalty in penalties:
        penalty.backward()
    torch.testing.assert_close(penalties[0], penalties[1])
    for ours, theirs in zip(arguments, copies, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_nan_stays_a_nan():
    for loss in LOSSES:
        input, weight, bias = tensors((3, 16, 4, 4, 1, (4, 4), 1, 0))
        with torch.no_grad():
            input[1, 3, 2, 2] = float("nan")
        value, logits = conv_gan_loss(input, weight, bias, 1.0, loss=loss, reduction="none")
        assert value.isnan().flatten().tolist() == logits.isnan().flatten().tolist() == [False, True, False]
        mean, _ = conv_gan_loss(input, weight, bias, 1.0, loss=loss)
        assert mean.isnan()
        mean.backward()
        assert weight.grad[0, 3, 2, 2].isnan()


def test_refused():
    input, weight, bias = tensors((4, 8, 4, 4, 1, (4, 4), 1, 0))
    refused = [
        (ValueError, "target", (input, weight, bias, 1.5), {}),
        (ValueError, "target", (input, weight, bias, -0.1), {"loss": "hinge"}),
        (ValueError, "target", (input, weight, bias, float("nan")), {}),
        (TypeError, "target", (input, weight, bias, "real"), {}),
        (RuntimeError, "target", (input, weight, bias, torch.tensor([0.0, 1.0, 2.0, 0.5])), {}),
        (RuntimeError, "target", (input, weight, bias, torch.tensor(-1.0)), {"loss": "wasserstein"}),
        (ValueError, "label_smoothing", (input, weight, bias, 1.0), {"label_smoothing": 1.2}),
        (ValueError, "reduction", (input, weight, bias, 1.0), {"reduction": "average"}),
        (ValueError, "loss", (input, weight, bias, 1.0), {"loss": "ns"}),
        (ValueError, "pos_weight", (input, weight, bias, 1.0), {"loss": "lsgan", "pos_weight": 2.0}),
        (RuntimeError, "sample_weight", (input, weight, bias, 1.0), {"sample_weight": torch.ones(3)}),
        (RuntimeError, "pos_weight", (input, weight, bias, 1.0), {"pos_weight": torch.ones(3)}),
        (RuntimeError, "input", (input[0], weight, bias, 1.0), {}),
        (RuntimeError, "input", (input.long(), weight.long(), None, 1.0), {}),
        (RuntimeError, "channels", (input[:, :5], weight, bias, 1.0), {}),
        (RuntimeError, "dtype", (input, weight.double(), bias, 1.0), {}),
        (RuntimeError, "bias", (input, weight, torch.zeros(2), 1.0), {}),
        (RuntimeError, "kernel", (input[:, :, :3], weight, bias, 1.0), {}),
        (RuntimeError, "stride", (input, weight, bias, 1.0), {"stride": 0}),
        (RuntimeError, "padding", (input, weight, bias, 1.0), {"padding": -1}),
        (RuntimeError, "device", (input, weight.to("meta"), bias, 1.0), {}),
    ]
    for error, name, arguments, options in refused:
        for implementation in ("kernels", "reference"):
            with fastgan.use(implementation), pytest.raises(error, match=name):
                conv_gan_loss(*arguments, **options)
    conv_gan_loss(input, weight, bias, -1.0, loss="lsgan")  # Mao et al. label with -1, 0 and 1
    conv_gan_loss(input, weight, bias, torch.tensor(-1.0), loss="lsgan")
