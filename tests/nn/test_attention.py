"""nn.MultiheadAttention against torch's own, parameter by parameter and mask by mask."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import fastgan
from fastgan.nn import MultiheadAttention, _attention_inputs
from fastgan.nn import functional as F

L, S, N, E, H = 5, 7, 3, 8, 2


def pair(**options):
    """torch's module and ours with the same parameters, in float64 and with nothing left at its initial zero."""
    options = {"embed_dim": E, "num_heads": H, **options}
    theirs = nn.MultiheadAttention(**options).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours = MultiheadAttention(**options).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(batch_first=False, batched=True, kdim=E, vdim=E):
    def draw(length, width):
        shape = ((N, length) if batch_first else (length, N)) if batched else (length,)
        return torch.randn(*shape, width, dtype=torch.float64, requires_grad=True)

    return draw(L, E), draw(S, kdim), draw(S, vdim)


def run(module, arguments, **options):
    """Outputs, and the gradients of everything that has one, of a loss that uses output and weights."""
    out, weights = module(*arguments, **options)
    torch.manual_seed(1)
    loss = (out * torch.randn(out.shape, dtype=out.dtype)).sum()
    if weights is not None:
        loss = loss + (weights * torch.randn(weights.shape, dtype=out.dtype)).sum()
    wanted = [*dict.fromkeys(arguments), *module.parameters()]
    wanted += [m for m in options.values() if isinstance(m, torch.Tensor) and m.requires_grad]
    return (out, weights, *torch.autograd.grad(loss, wanted, allow_unused=True))


def assert_same(theirs, ours, **options):
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, **options)


def masks(kind, batched=True):
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[0, 4:] = True
    padding[2, 0] = True
    forbidden = torch.rand(L, S) < 0.3
    forbidden[:, 1] = False
    forbidden3 = torch.rand(N * H if batched else H, L, S) < 0.3
    forbidden3[:, :, 1] = False
    bias = torch.randn(L, S, dtype=torch.float64, requires_grad=True)
    bias3 = torch.randn(N * H if batched else H, L, S, dtype=torch.float64, requires_grad=True)
    padding = padding if batched else padding[0]
    floating = torch.zeros(padding.shape, dtype=torch.float64).masked_fill(padding, float("-inf"))
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "padding-float": {"key_padding_mask": floating},
        "mask": {"attn_mask": forbidden},
        "mask3": {"attn_mask": forbidden3},
        "bias": {"attn_mask": bias},
        "bias3": {"attn_mask": bias3},
        "mask+padding": {"attn_mask": forbidden, "key_padding_mask": padding},
        "mask3+padding": {"attn_mask": forbidden3, "key_padding_mask": padding},
        "bias+padding": {"attn_mask": bias, "key_padding_mask": floating},
        "bias3+padding": {"attn_mask": bias3, "key_padding_mask": floating},
    }[kind]


KINDS = (
    *("none", "padding", "padding-float", "mask", "mask3", "bias", "bias3"),
    *("mask+padding", "mask3+padding", "bias+padding", "bias3+padding"),
)
WEIGHTS = [
    {"need_weights": False},
    {"need_weights": True},
    {"need_weights": True, "average_attn_weights": False},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", WEIGHTS, ids=["output", "averaged", "per-head"])
@pytest.mark.parametrize(("batched", "batch_first"), [(True, False), (True, True), (False, False)])
def test_equals_torch(kind, weights, batched, batch_first):
    theirs, ours = pair(batch_first=batch_first)
    arguments, options = inputs(batch_first, batched), {**masks(kind, batched), **weights}
    assert_same(run(theirs, arguments, **options), run(ours, arguments, **options))


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 10}, {"add_zero_attn": True}, {"add_bias_kv": True}])
@pytest.mark.parametrize("extra", [{}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("kind", ["none", "mask+padding", "bias3+padding"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_every_constructor_argument_equals_torch(options, extra, kind, need_weights):
    options = {**options, **extra}
    theirs, ours = pair(**options)
    arguments = inputs(kdim=options.get("kdim", E), vdim=options.get("vdim", E))
    call = {**masks(kind), "need_weights": need_weights}
    assert_same(run(theirs, arguments, **call), run(ours, arguments, **call))


@pytest.mark.parametrize("shared", ["self", "key is value"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_projections_equal_torch(shared, bias, batch_first):
    theirs, ours = pair(bias=bias, batch_first=batch_first)
    query, key, _ = inputs(batch_first)
    arguments = (query, query, query) if shared == "self" else (query, key, key)
    for weights in WEIGHTS:
        assert_same(run(theirs, arguments, **weights), run(ours, arguments, **weights))


def test_a_boolean_and_a_float_mask_may_be_mixed():
    theirs, ours = pair()
    arguments = inputs()
    bias, padding = masks("bias")["attn_mask"], masks("padding")["key_padding_mask"]
    with pytest.warns(UserWarning, match="mismatched"):
        expected = run(theirs, arguments, attn_mask=bias, key_padding_mask=padding)
    assert_same(expected, run(ours, arguments, attn_mask=bias, key_padding_mask=padding))


@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_R21_a_dead_row_is_zero_and_weights_never_change_the_output(floating, average):
    _, ours = pair(batch_first=True)
    arguments = inputs(batch_first=True)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1] = True  # the second sample has nothing to attend to
    if floating:
        padding = torch.zeros(N, S, dtype=torch.float64).masked_fill(padding, float("-inf"))
    without = run(ours, arguments, key_padding_mask=padding, need_weights=False)
    out, weights, *grads = run(
        ours, arguments, key_padding_mask=padding, need_weights=True, average_attn_weights=average
    )
    assert torch.equal(out, without[0])
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(L, E))  # nothing but the projection's bias
    assert torch.equal(weights[1], torch.zeros_like(weights[1]))
    live = weights[[0, 2]].sum(-1)
    torch.testing.assert_close(live, torch.ones_like(live))
    for gradient in (*grads, *without[2:]):
        assert gradient.isfinite().all()
    assert torch.equal(grads[0][1], torch.zeros_like(grads[0][1]))  # the dead sample's query


def test_R21_weights_never_change_the_output_with_dropout():
    _, ours = pair(dropout=0.5)
    arguments = inputs()
    outputs = []
    for weights in WEIGHTS:
        torch.manual_seed(3)
        outputs.append(ours(*arguments, **weights)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("kind", ["none", "padding", "mask", "bias3+padding"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_R22_evaluation_is_training_without_dropout(kind, need_weights):
    _, ours = pair(batch_first=True)
    x = torch.randn(N, S, E, dtype=torch.float64)
    options = masks(kind)
    if "attn_mask" in options:  # self-attention: as many queries as keys
        wide = options["attn_mask"].detach()
        options["attn_mask"] = torch.cat([wide, wide[..., : S - L, :]], -2)
    options["need_weights"] = need_weights
    trained = ours(x, x, x, **options)
    ours.dropout = 0.5
    ours.eval()
    with torch.no_grad():
        evaluated = ours(x, x, x, **options)
    assert_same(trained, evaluated, rtol=0, atol=0)


def test_R22_dropout_is_on_in_training_alone():
    _, ours = pair(dropout=0.5)
    arguments = inputs()
    assert not torch.equal(ours(*arguments)[0], ours(*arguments)[0])
    ours.eval()
    assert torch.equal(ours(*arguments)[0], ours(*arguments)[0])


def test_dropout_keeps_the_expectation():
    _, ours = pair(dropout=0.3)
    query, key = (torch.randn(n, 1, E, dtype=torch.float64) for n in (2, 4))
    exact = ours.eval()(query, key, key)[0]
    query, key = (x.expand(-1, 1000, -1) for x in (query, key))
    mean = ours.train()(query, key, key, need_weights=False)[0].mean(1, keepdim=True)
    torch.testing.assert_close(mean, exact, rtol=0.0, atol=0.25)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", WEIGHTS, ids=["output", "averaged", "per-head"])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_R24_causal_in_every_combination(kind, weights, extra):
    """Against the same call with the triangle written into the mask, which torch's own module honours always."""
    theirs, ours = pair(**extra)
    arguments, options = inputs(), masks(kind)
    future = torch.ones(L, S, dtype=torch.bool).triu(1)
    given = options.get("attn_mask")
    if given is None:
        causal = future
        if options and options["key_padding_mask"].is_floating_point():
            causal = torch.zeros(L, S, dtype=torch.float64).masked_fill(future, float("-inf"))
    else:
        causal = given | future if given.dtype == torch.bool else given.masked_fill(future, float("-inf"))
    if "key_padding_mask" in options:  # otherwise row 0 of sample 2 would be dead, where torch gives NaN
        padding = options["key_padding_mask"].clone()
        padding[2, 0] = 0
        options["key_padding_mask"] = padding
    if not extra and given is not None and given.dtype == torch.bool:
        given, causal = (m.clone() for m in (given, causal))
        given[..., 0] = causal[..., 0] = False
        options["attn_mask"] = given
    expected = theirs(*arguments, **{**options, "attn_mask": causal}, **weights)
    assert_same(expected, ours(*arguments, **options, is_causal=True, **weights))


def test_R24_later_tokens_never_change_earlier_outputs():
    _, ours = pair(batch_first=True)
    x = torch.randn(N, S, E, dtype=torch.float64)
    changed = torch.cat([x[:, :4], torch.randn(N, S - 4, E, dtype=torch.float64)], 1)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[:, -1] = True
    triangle = torch.ones(S, S, dtype=torch.bool).triu(1)
    for training, mask, need_weights, kpm in itertools.product(
        (True, False), (None, triangle), (True, False), (None, padding)
    ):
        ours.train(training)
        options = {"attn_mask": mask, "need_weights": need_weights, "key_padding_mask": kpm, "is_causal": True}
        before, after = (ours(y, y, y, **options)[0][:, :4] for y in (x, changed))
        assert torch.equal(before, after)


def test_a_nan_stays_a_nan():
    _, ours = pair(batch_first=True)
    query, key, value = (x.detach() for x in inputs(batch_first=True))
    query[0, 2] = float("nan")
    out, weights = ours(query, key, value)
    assert out[0, 2].isnan().all()
    assert weights[0, 2].isnan().all()
    assert out.isnan().sum() == E


@pytest.mark.parametrize("sizes", [(0, S, N), (L, 0, N), (L, S, 0)])
def test_empty_inputs(sizes):
    length, size, batch = sizes
    ours = MultiheadAttention(E, H)
    query = torch.randn(length, batch, E, requires_grad=True)
    key = torch.randn(size, batch, E, requires_grad=True)
    out, weights = ours(query, key, key)
    assert out.shape == (length, batch, E)
    assert weights.shape == (batch, length, size)
    out.sum().backward()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"query": (L, N, E + 1)}, AssertionError, "query"),
        ({"query": (L, N, E, 1)}, AssertionError, "query"),
        ({"key": (S, E)}, AssertionError, "key"),
        ({"key": (S + 1, N, E)}, AssertionError, "value"),
        ({"key": (S, N + 1, E), "value": (S, N + 1, E)}, RuntimeError, "key"),
        ({"attn_mask": (S, L)}, RuntimeError, "attn_mask"),
        ({"attn_mask": (N, L, S)}, RuntimeError, "attn_mask"),
        ({"attn_mask": (1, 1, L, S)}, AssertionError, "attn_mask"),
        ({"key_padding_mask": (S, N)}, AssertionError, "key_padding_mask"),
    ],
)
def test_refused_as_torch_refuses(change, error, named):
    shapes = {"query": (L, N, E), "key": (S, N, E), "value": (S, N, E), **change}
    arguments = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(error, match=named):
        MultiheadAttention(E, H)(**arguments)
    with pytest.raises((error, RuntimeError)):  # torch has a RuntimeError without the name for some
        nn.MultiheadAttention(E, H)(**arguments)


def test_integer_masks_are_refused():
    x = torch.zeros(S, N, E)
    with pytest.raises(AssertionError, match=r"key_padding_mask.*int64"):
        MultiheadAttention(E, H)(x, x, x, key_padding_mask=torch.zeros(N, S, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    theirs, ours = pair(batch_first=True)
    query, key, _ = (x.detach() for x in inputs(batch_first=True))
    exact = theirs(query, key, key)
    ours.to(dtype)
    out, weights = ours(query.to(dtype), key.to(dtype), key.to(dtype))
    assert out.dtype == weights.dtype == dtype
    assert_same(exact, (out.double(), weights.double()), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("kind", ["none", "mask+padding", "bias"])
def test_autocast(kind):
    theirs, ours = pair(batch_first=True)
    theirs.float(), ours.float()
    query, key, _ = (x.detach().float() for x in inputs(batch_first=True))
    options = masks(kind)
    if kind == "bias":
        options["attn_mask"] = options["attn_mask"].detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = theirs(query, key, key, **options)
        out = ours(query, key, key, **options)
        assert ours(query, key, key, need_weights=False, **options)[0].dtype == torch.bfloat16
    assert_same(expected, out, rtol=0.05, atol=0.1)


def test_penalty_through_the_module_is_twice_differentiable():
    theirs, ours = pair(batch_first=True)
    x = torch.randn(N, S, E, dtype=torch.float64, requires_grad=True)
    found = []
    for module in (theirs, ours):
        out = module(x, x, x, need_weights=module is theirs, is_causal=False)[0]
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        found.append(torch.autograd.grad(penalty, list(module.parameters()), allow_unused=True))
    assert_same(*found)


@pytest.mark.parametrize("need_weights", [False, True])
def test_compiles_whole(need_weights):
    _, ours = pair(batch_first=True, dropout=0.0)
    arguments = inputs(batch_first=True)
    options = {**masks("mask+padding"), "need_weights": need_weights}
    expected = run(ours, arguments, **options)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    out, weights = compiled(*arguments, **options)
    torch.testing.assert_close(out, expected[0])
    assert (weights is None) == (not need_weights)
    torch.manual_seed(1)
    loss = (out * torch.randn(out.shape, dtype=out.dtype)).sum()
    if need_weights:
        loss = loss + (weights * torch.randn(weights.shape, dtype=out.dtype)).sum()
    wanted = [*arguments, *ours.parameters()]
    assert_same(expected[2:], torch.autograd.grad(loss, wanted))


def test_reference_computes_the_same():
    _, ours = pair()
    arguments, options = inputs(), masks("mask+padding")
    expected = run(ours, arguments, **options)
    with fastgan.use("reference"):
        assert_same(expected, run(ours, arguments, **options))


def test_copies_and_pickles():
    _, ours = pair(batch_first=True)
    x = torch.randn(N, S, E, dtype=torch.float64)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is MultiheadAttention
        assert torch.equal(other(x, x, x)[0], ours(x, x, x)[0])


def encoder_layer(**options):
    layer = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True, **options).double()
    for name, parameter in layer.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer_calls_the_module_in_evaluation_too(norm_first):
    """torch's inference path of the whole layer reads the weights and would pass the module by."""
    layer = encoder_layer(norm_first=norm_first)
    plain = copy.deepcopy(layer)
    layer.self_attn.__class__ = MultiheadAttention
    calls = []
    original = MultiheadAttention.forward
    x = torch.randn(N, S, E, dtype=torch.float64)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[0, 4:] = True
    trained = layer(x, src_key_padding_mask=padding)
    torch.testing.assert_close(trained, plain(x, src_key_padding_mask=padding))

    def counted(self, *args, **options):
        calls.append(self)
        return original(self, *args, **options)

    layer.eval(), plain.eval()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(MultiheadAttention, "forward", counted)
        evaluated = layer(x, src_key_padding_mask=padding)
        assert calls == [layer.self_attn]
        torch.testing.assert_close(evaluated, trained, rtol=0, atol=0)
        torch.testing.assert_close(evaluated, plain(x, src_key_padding_mask=padding))


def test_R22_a_sample_of_padding_alone_stays_finite_in_the_encoder_layer():
    layer = encoder_layer()
    layer.self_attn.__class__ = MultiheadAttention
    x = torch.randn(N, S, E, dtype=torch.float64)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1] = True
    trained = layer(x, src_key_padding_mask=padding)
    assert trained.isfinite().all()
    layer.eval()
    with torch.no_grad():
        assert torch.equal(layer(x, src_key_padding_mask=padding), trained)


def test_nested_tensors_go_to_torch():
    theirs, ours = pair(batch_first=True)
    theirs.eval(), ours.eval()
    x = torch.nested.nested_tensor([torch.randn(n, E, dtype=torch.float64) for n in (3, 5, 2)])
    with torch.no_grad():
        expected, out = (m(x, x, x, need_weights=False)[0] for m in (theirs, ours))
    torch.testing.assert_close(out.to_padded_tensor(0.0), expected.to_padded_tensor(0.0))
    assert MultiheadAttention(E, H, batch_first=True)._qkv_same_embed_dim is False


def test_a_few_rows_of_bfloat16_go_to_torchs_kernel_where_there_is_amx_and_no_gradient(monkeypatch):
    asked = []
    torchs = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(_attention_inputs, "_HAS_AMX", True)
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: asked.append(1) or torchs(*a, **k)
    )
    query, key, value = (torch.randn(2, 3, 5, 8, dtype=torch.bfloat16) for _ in range(3))
    torch.testing.assert_close(F.scaled_dot_product_attention(query, key, value), torchs(query, key, value))
    assert len(asked) == 1
    F.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    F.scaled_dot_product_attention(query, key, torch.randn(2, 3, 5, 4, dtype=torch.bfloat16))
    torch.func.vmap(F.scaled_dot_product_attention)(query, key, value)
    F.scaled_dot_product_attention(torch.randn(2, 3, 8, 8, dtype=torch.bfloat16), key, value)
    query.requires_grad_()
    output = F.scaled_dot_product_attention(query, key, value)
    (gradient,) = torch.autograd.grad(output.sum(), query, create_graph=True)
    torch.autograd.grad(gradient.sum(), query)
    assert len(asked) == 1
