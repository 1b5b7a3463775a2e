"""fastgan::norm_act and batch_norm_act against float64 mathematics and torch's own batch norm."""

import gc
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgan
from fastgan.nn.functional import batch_norm_act
from fastgan.ops import norm_act as ops
from tests.derivatives import check_derivatives

ACTS = ("none", "relu", "leaky_relu")
SLOPE = 0.2


def torch_norm_act(input, running_mean, running_var, weight, bias, training=True, momentum=0.1, eps=1e-5, act="none"):
    z = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return {"none": lambda t: t, "relu": F.relu, "leaky_relu": lambda t: F.leaky_relu(t, SLOPE)}[act](z)


def ours(*args, **kwargs):
    return batch_norm_act(*args, negative_slope=SLOPE, **kwargs)


def make(shape, dtype=torch.float64, mean=1.0):
    channels = shape[1]
    x = (torch.randn(shape, dtype=torch.float64) * 2 + mean).to(dtype)
    weight, bias = torch.randn(2, channels, dtype=torch.float64).to(dtype)
    running_mean, running_var = torch.randn(channels).to(dtype), (torch.rand(channels) + 0.5).to(dtype)
    return x, running_mean, running_var, weight, bias


def everything(function, tensors, grad, dtype=None, **kwargs):
    """Output, running statistics and the three gradients."""
    x, running_mean, running_var, weight, bias = (
        None if t is None else t.detach().to(dtype or t.dtype).clone() for t in tensors
    )
    wanted = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    output = function(x, running_mean, running_var, weight, bias, **kwargs)
    gradients = torch.autograd.grad(output, wanted, grad.to(output.dtype))
    moved = [t for t in (running_mean, running_var) if t is not None]
    return [output.detach(), *moved, *gradients]


def check_against_float64(tensors, ulps=8, **kwargs):
    """Ours errs at most twice as much as torch at the same precision, plus a few ulp."""
    grad = torch.randn(tensors[0].shape, dtype=torch.float64).to(tensors[0].dtype)
    exact = everything(torch_norm_act, tensors, grad, torch.float64, **kwargs)
    mine = everything(ours, tensors, grad, **kwargs)
    theirs = everything(torch_norm_act, tensors, grad, **kwargs)
    for got, peer, want in zip(mine, theirs, exact, strict=True):
        assert got.dtype == peer.dtype
        assert got.shape == peer.shape
        if got.dtype == torch.float64:  # the judge itself is no better
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
            continue
        eps = torch.finfo(got.dtype).eps
        bound = 2 * (peer.double() - want).abs().max() + ulps * eps * (want.abs().max() + 1)
        assert (got.double() - want).abs().max() <= bound


SHAPES = [
    (4, 3, 5, 5),
    (6, 5),
    (2, 7, 1, 1),
    (3, 4, 40, 40),  # a plane of more than one chunk, with a tail
    (64, 6, 2, 2),
    (8, 130, 3, 3),  # more channels than a strip
    (2, 3, 4, 5, 6),
    (2, 20, 7),
]


def layouts(x):
    yield x
    if x.dim() in (4, 5):
        yield x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype):
    tensors = make(shape, dtype)
    for x, training, act in itertools.product(layouts(tensors[0]), (True, False), ACTS):
        check_against_float64((x, *tensors[1:]), training=training, act=act)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_each_instruction_set(dtype, capability):
    for shape in ((3, 4, 20, 21), (4, 19, 3, 3)):
        tensors = make(shape, dtype)
        for x, training in itertools.product(layouts(tensors[0]), (True, False)):
            check_against_float64((x, *tensors[1:]), training=training, act="leaky_relu")


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (8, 130, 3, 3)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_without_weight_bias_or_running_statistics(shape, training):
    x, running_mean, running_var, weight, bias = make(shape, torch.float32)
    for affine in ((weight, None), (None, bias), (None, None)):
        check_against_float64((x, running_mean, running_var, *affine), training=training, act="leaky_relu")
    if training:
        check_against_float64((x, None, None, weight, bias), training=True, act="relu")


@pytest.mark.parametrize("mean", [1e4, -1e6])
def test_mean_far_above_the_deviation(mean):
    for x in layouts(torch.randn(8, 5, 12, 12) + mean):
        exact = torch_norm_act(x.double(), None, None, None, None)
        # The inputs themselves are exact; what float32 cannot hold is only the mean, which must not reach the output.
        assert (ours(x, None, None, None, None, True).double() - exact).abs().max() < 1e-6 * exact.abs().max()


def test_first_values_that_are_outliers_do_not_cancel():
    x = torch.randn(64, 2, 8, 8)
    x[0] += 1e5
    for each in layouts(x):
        variance = torch.zeros(2)
        ours(each, torch.zeros(2), variance, None, None, True, 1.0)
        torch.testing.assert_close(variance.double(), x.double().transpose(0, 1).flatten(1).var(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_input_with_float32_parameters(dtype):
    x, *parameters = make((4, 6, 5, 5), torch.float32)
    for training in (True, False):
        check_against_float64((x.to(dtype), *parameters), training=training, act="relu")


@pytest.mark.parametrize("channels_last", [False, True])
def test_nan_and_infinity_stay_in_their_channel(channels_last):
    x = torch.randn(4, 6, 5, 5)
    x[1, 2, 3, 3], x[2, 4, 0, 0] = float("nan"), float("inf")
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    for act in ACTS:
        leaf = x.clone().requires_grad_()
        output = ours(leaf, None, None, None, None, True, act=act)
        (grad,) = torch.autograd.grad(output.square().sum(), leaf)
        for values in (output, grad):
            assert values[:, [2, 4]].isnan().all()
            assert values[:, [0, 1, 3, 5]].isfinite().all()
        evaluated = ours(x, torch.zeros(6), torch.ones(6), None, None, act=act)
        want = torch_norm_act(x, torch.zeros(6), torch.ones(6), None, None, False, act=act)
        torch.testing.assert_close(evaluated, want, equal_nan=True)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_R43_groups_equal_passes(act, channels_last):
    tensors = make((6, 5, 4, 4))
    x = tensors[0].contiguous(memory_format=torch.channels_last) if channels_last else tensors[0]
    grad = torch.randn_like(x)

    def passes(x, *rest, **kwargs):
        return torch.cat([torch_norm_act(part, *rest, **kwargs) for part in x.chunk(2)])

    got = everything(ours, (x, *tensors[1:]), grad, groups=2, training=True, momentum=0.3, act=act)
    want = everything(passes, (x, *tensors[1:]), grad, training=True, momentum=0.3, act=act)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    with fastgan.use("reference"):
        reference = everything(ours, (x, *tensors[1:]), grad, groups=2, training=True, momentum=0.3, act=act)
    for a, b in zip(got, reference, strict=True):
        torch.testing.assert_close(a, b)


@given(
    shape=st.lists(st.integers(0, 5), min_size=2, max_size=5),
    order=st.randoms(use_true_random=False),
    step=st.integers(1, 2),
    expand=st.booleans(),
    training=st.booleans(),
    act=st.sampled_from(ACTS),
)
@settings(max_examples=60, deadline=None)
def test_any_strides_and_empties(shape, order, step, expand, training, act):
    permutation = list(range(len(shape)))
    order.shuffle(permutation)
    base = torch.randn([shape[i] * step for i in permutation], dtype=torch.float64)
    x = base[tuple(slice(None, None, step) for _ in shape)].permute([permutation.index(i) for i in range(len(shape))])
    if expand and shape[0]:
        x = x[:1].expand_as(x)
    channels = x.shape[1]
    if channels == 0:  # torch has no derivative there
        assert ours(x, *[x.new_zeros(0)] * 4, training, act=act).shape == x.shape
        return
    if training and x.numel() == channels:
        return
    tensors = (x, torch.zeros(channels).double(), torch.ones(channels).double(), None, torch.randn(channels).double())
    grad = torch.randn(shape, dtype=torch.float64).transpose(0, -1).contiguous().transpose(0, -1)
    got = everything(ours, tensors, grad, training=training, act=act)
    want = everything(torch_norm_act, tensors, grad, training=training, act=act)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("channels_last", [False, True])
def test_bits_do_not_depend_on_threads(channels_last, capability):
    x, *rest = make((24, 40, 24, 24), torch.float32)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    grad, results = torch.randn_like(x), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(everything(ours, (x, *rest), grad, training=True, act="leaky_relu", groups=2))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_only_the_gradients_asked_for():
    x, _, _, weight, bias = make((4, 3, 4, 4))
    mean, var = torch.zeros(1, 3).double(), torch.ones(1, 3).double()
    for needs in itertools.product([False, True], repeat=3):
        given = (x, x, weight, bias, mean, var, 1e-5, "relu", 0.0, 1, list(needs))
        for gradients in (ops.norm_act_backward(*given), ops.norm_act_backward_reference(*given)):
            shapes = [x.shape, weight.shape, bias.shape]
            assert [g.shape == s for g, s in zip(gradients, shapes, strict=True)] == list(needs)


# ---- the operator and its derivatives ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, running_mean, running_var, weight, bias = make((4, 3, 4, 4), dtype)
    for each in layouts(x):
        each = each.clone().requires_grad_()
        settings = (1e-5, "leaky_relu", SLOPE)
        torch.library.opcheck(torch.ops.fastgan.norm_act, (each, weight, bias, *settings, 2))
        torch.library.opcheck(
            torch.ops.fastgan.norm_act_eval, (each, running_mean, running_var, weight, None, *settings)
        )
    statistics = torch.zeros(2, 3).double(), torch.ones(2, 3).double()
    needs = [True, True, False]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.fastgan.norm_act_backward,
        (x, x, weight, bias, *statistics, *settings, 2, needs),
        test_utils=tests[:2],
    )
    torch.library.opcheck(
        torch.ops.fastgan.norm_act_eval_backward,
        (x, x, running_mean, running_var, weight, bias, *settings, needs),
        test_utils=tests,
    )


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_twice(act, training):
    x, running_mean, running_var, weight, bias = make((4, 2, 2, 2))
    inputs = tuple(t.requires_grad_() for t in (x, weight, bias))

    def function(x, weight, bias):
        groups = 2 if training else 1
        return ours(x, running_mean.clone(), running_var, weight, bias, training, 0.0, act=act, groups=groups)

    torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(function, inputs, check_batched_grad=True)


@pytest.mark.parametrize("training", [True, False])
def test_derivative_matrix(training):
    x, running_mean, running_var, weight, bias = make((4, 2, 3))

    def through(function):
        # weight and bias depend on the argument too, so that their gradients count; no running statistics under vmap
        def call(x):
            statistics = (None, None) if training else (running_mean, running_var)
            return function(x, *statistics, weight * x.mean(), bias + x[0, 0, 0].sin(), training, act="leaky_relu")

        return call

    def composed(x, running_mean, running_var, weight, bias, training, act):
        # Not F.batch_norm: torch 2.13's own grad of jvp and Hessian are wrong in training.
        mean, var = running_mean, running_var
        if training:
            mean, var = x.mean((0, 2)), x.var((0, 2), correction=0)
        column = lambda t: t.view(1, -1, 1)
        z = (x - column(mean)) / (column(var) + 1e-5).sqrt() * column(weight) + column(bias)
        return F.leaky_relu(z, SLOPE)

    check_derivatives(through(ours), through(composed), x)


def test_compiled_training_moves_running_statistics():
    tensors = make((4, 3, 4, 4), torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    grad = torch.randn(4, 3, 4, 4)
    got = everything(compiled, tensors, grad, training=True, act="relu", groups=2)
    want = everything(ours, tensors, grad, training=True, act="relu", groups=2)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def moving(dtype=torch.float32, step=1):
    running = [torch.randn(3 * step, dtype=dtype)[::step], torch.rand(3 * step, dtype=dtype)[::step]]
    return *running, torch.randn(2, 3, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64), 0.3, 1.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("step", [1, 2])
def test_running_statistics_move_as_the_reference_says(dtype, step):
    arguments = moving(dtype, step)
    other = [tensor.clone() for tensor in arguments[:2]]
    versions = [tensor._version for tensor in arguments[:2]]
    ops.move_running_statistics(*arguments)
    ops.move_reference(*other, *arguments[2:])
    torch.testing.assert_close(arguments[:2], tuple(other), rtol=4 * torch.finfo(dtype).eps, atol=1e-7)
    assert all(tensor._version > before for tensor, before in zip(arguments[:2], versions, strict=True))


def test_moving_is_an_operator():
    torch.library.opcheck(torch.ops.fastgan.norm_act_move, moving(), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.kernel  # the reference's graph saves 1/sigma, not the statistics, and stays right when they move
def test_statistics_that_moved_between_forward_and_backward_are_refused():
    x, running_mean, running_var, weight, bias = make((4, 3, 4, 4), torch.float32)
    evaluated = ours(x.requires_grad_(), running_mean, running_var, weight, bias, False)
    ours(x.detach(), running_mean, running_var, weight, bias, True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        evaluated.sum().backward()


def test_inference_mode_trains_too():
    with torch.inference_mode():
        x, running_mean, running_var, weight, bias = make((4, 3, 4, 4), torch.float32)
        before = running_mean.clone()
        ours(x, running_mean, running_var, weight, bias, True)
        assert not torch.equal(running_mean, before)


def test_autocast_leaves_dtypes_alone():
    x, *rest = make((4, 3, 4, 4), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert ours(x.to(dtype), *rest, True).dtype == torch_norm_act(x.to(dtype), *rest).dtype == dtype


def test_meta():
    x = torch.empty(4, 3, 4, 4, device="meta").contiguous(memory_format=torch.channels_last)
    output = ours(x, None, None, None, None, True, act="relu")
    assert output.is_meta
    assert output.stride() == x.stride()


def test_torchs_own_samples():
    from torch.testing._internal.common_methods_invocations import op_db

    info = next(op for op in op_db if op.name == "nn.functional.batch_norm")
    for dtype in (torch.float64, torch.float32):
        for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
            mine = batch_norm_act(*_copied([sample.input, *sample.args]), **_copied(sample.kwargs))
            theirs = info.op(*_copied([sample.input, *sample.args]), **_copied(sample.kwargs))
            torch.testing.assert_close(mine, theirs, rtol=1e-5 if dtype == torch.float32 else 1e-9, atol=1e-5)


def _copied(values):
    if isinstance(values, dict):
        return {k: _copied([v])[0] for k, v in values.items() if k != "cudnn_enabled"}
    return [v.detach().clone() if isinstance(v, torch.Tensor) else v for v in values]


def test_R45_nothing_is_alive_after_a_penalty():
    gc.collect()
    gc.disable()
    try:
        x, _, _, weight, bias = make((4, 3, 4, 4))
        x.requires_grad_()
        weight.requires_grad_()
        output = ours(x, torch.zeros(3).double(), torch.ones(3).double(), weight, bias, True, act="leaky_relu")
        (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        seen = [weakref.ref(t) for t in (output, grad, x)]
        del output, grad, x
        assert [each() for each in seen] == [None] * 3
    finally:
        gc.enable()


# ---- what is refused ----

REFUSED = [
    (ValueError, "Expected more than 1 value per channel", lambda x, v: ours(x[:1, :, :1, :1], v, v, v, v, True)),
    (ValueError, "more than 1 value per channel", lambda x, v: ours(x[:2, :, :1, :1], v, v, v, v, True, groups=2)),
    (ValueError, "groups must be positive and divide", lambda x, v: ours(x, v, v, v, v, True, groups=3)),
    (ValueError, "act must be one of", lambda x, v: ours(x, v, v, act="gelu")),
    (ValueError, "eps must be positive", lambda x, v: ours(x, v, v, training=True, eps=0.0)),
    (ValueError, "eps must not be negative", lambda x, v: ours(x, v, v, eps=-1.0)),
    (ValueError, "both given or both None", lambda x, v: ours(x, v, None, training=True)),
    (RuntimeError, "must be given in evaluation", lambda x, v: ours(x, None, None)),
    (RuntimeError, "at least 2 dimensions", lambda x, v: ours(x[0, 0, 0], v, v)),
    (RuntimeError, "weight must have shape", lambda x, v: ours(x, v, v, v[:2])),
    (RuntimeError, "running_var must have shape", lambda x, v: ours(x, v, v.repeat(2))),
    (RuntimeError, "bias must have input's dtype", lambda x, v: ours(x, v, v, v, v.double())),
    (RuntimeError, "running_mean must have input's dtype", lambda x, v: ours(x.bfloat16(), v.half(), v.half())),
    (RuntimeError, "bias must be on input's device", lambda x, v: ours(x, v, v, v, v.to("meta"))),
    (NotImplementedError, "input must be float32, .* got torch.int64", lambda x, v: ours(x.long(), v.long(), v.long())),
]


@pytest.mark.parametrize(("kind", "message", "call"), REFUSED, ids=[message for _, message, _ in REFUSED])
def test_refused(kind, message, call):
    with pytest.raises(kind, match=message):
        call(torch.randn(4, 3, 2, 2), torch.ones(3))
