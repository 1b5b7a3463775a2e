"""dropout_add_layer_norm as a function, as a module, and at the ends of BERT's layers."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastgan
from fastgan.nn import DropoutAddLayerNorm
from fastgan.nn import functional as F

SHAPE = (9, 16, 128)


def given(seed=0):
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(*SHAPE, generator=draws) for _ in range(2)] + [
        torch.randn(128, generator=draws) for _ in range(2)
    ]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("prenorm", [False, True])
def test_the_same_as_the_operations_one_by_one(p, prenorm):
    """The same places are dropped: both draw the same two numbers."""
    leaves = [[each.requires_grad_() for each in given()] for _ in range(2)]
    grad = torch.randn(SHAPE)
    found = []
    for fused, (x, r, weight, bias) in zip((True, False), leaves, strict=True):
        torch.manual_seed(5)
        if fused:
            output = F.dropout_add_layer_norm(x, r, weight, bias, p, 1e-6, prenorm=prenorm)
        else:
            sum = F.dropout(x, p) + r
            output = torch.nn.functional.layer_norm(sum, (128,), weight, bias, 1e-6)
            output = (output, sum) if prenorm else output
        outputs = output if prenorm else (output,)
        torch.autograd.backward([each.sin() for each in outputs], [grad] * len(outputs))
        found.append([*outputs, *(leaf.grad for leaf in (x, r, weight, bias)), torch.rand(1)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.kernel
def test_one_operation_where_it_pays():
    x, r, weight, bias = given()
    calls = {
        "fused": lambda: F.dropout_add_layer_norm(x, r, weight, bias, 0.1),
        "small": lambda: F.dropout_add_layer_norm(x[:1], r[:1], weight, bias, 0.1),
        "without weight": lambda: F.dropout_add_layer_norm(x, r, None, None, 0.1),
        "all dropped": lambda: F.dropout_add_layer_norm(x, r, weight, bias, 1.0),
    }
    for name, call in calls.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            call()
        names = {event.key for event in seen.key_averages()}
        assert ("fastgan::dropout_add_layer_norm" in names) == (name == "fused"), name
        assert ("aten::layer_norm" in names) == (name != "fused"), name
    everything = F.dropout_add_layer_norm(x, r, weight, bias, 1.0)
    torch.testing.assert_close(everything, torch.nn.functional.layer_norm(r, (128,), weight, bias))


@pytest.mark.kernel
def test_what_it_keeps_is_one_tensor():
    leaves = [each.requires_grad_() for each in given()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        F.dropout_add_layer_norm(leaves[0] * 1.0, leaves[1] * 1.0, *leaves[2:], 0.1)
    assert sum(count == leaves[0].numel() for count in kept) <= 1


def test_in_transforms_and_compiled():
    x, r, weight, bias = given()
    jacobian = torch.func.grad(lambda t: F.dropout_add_layer_norm(t, r, weight, bias).square().sum())(x)
    leaf = x.clone().requires_grad_()
    F.dropout_add_layer_norm(leaf, r, weight, bias).square().sum().backward()
    torch.testing.assert_close(jacobian, leaf.grad, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(F.dropout_add_layer_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, r, weight, bias), F.dropout_add_layer_norm(x, r, weight, bias))


def test_autocast_is_torchs():
    x, r, weight, bias = given()
    with torch.autocast("cpu", torch.bfloat16):
        found = F.dropout_add_layer_norm(x.bfloat16(), r.bfloat16(), weight, bias)
        want = torch.nn.functional.layer_norm(x.bfloat16() + r.bfloat16(), (128,), weight, bias)
    assert found.dtype == want.dtype
    torch.testing.assert_close(found, want)


def test_refused():
    x, r, weight, bias = given()
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\], got 1.5"):
        F.dropout_add_layer_norm(x, r, weight, bias, 1.5)
    with pytest.raises(RuntimeError, match=r"residual must have input's shape, got \(9, 16, 1\)"):
        F.dropout_add_layer_norm(x, r[..., :1], weight, bias)
    with pytest.raises(RuntimeError):
        F.dropout_add_layer_norm(x, r, weight[:5], bias)
    with pytest.raises(ValueError, match=r"normalized_shape must be one number, got \(3, 4\)"):
        DropoutAddLayerNorm((3, 4))
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\]"):
        DropoutAddLayerNorm(3, -0.1)


def test_module():
    x, r, weight, bias = given()
    module = DropoutAddLayerNorm(128, p=0.5, prenorm=True, eps=1e-3)
    module.load_state_dict({"weight": weight, "bias": bias})
    torch.manual_seed(1)
    output, sum = module(x, r)
    torch.manual_seed(1)
    assert torch.equal(sum, F.dropout(x, 0.5) + r)
    torch.testing.assert_close(output, torch.nn.functional.layer_norm(sum, (128,), weight, bias, 1e-3))
    output, sum = module.eval()(x, r)
    assert torch.equal(sum, x + r)
    assert "p=0.5, prenorm=True" in repr(module)
    assert isinstance(module, nn.LayerNorm)


# ---- transformers ----

KINDS = ["Bert", "Roberta", "Electra", "XLMRoberta", "Camembert", "Ernie", "LayoutLM", "BertGeneration"]


def model_of(kind, **more):
    transformers = pytest.importorskip("transformers")
    import fastgan.hf  # noqa: F401

    shape = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 80, "max_position_embeddings": 80, "pad_token_id": 0, "bos_token_id": 1,
             "eos_token_id": 2, **more}  # fmt: skip
    name = "BertGenerationEncoder" if kind == "BertGeneration" else f"{kind}Model"
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**shape))


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_of_berts_layers(kind):
    from fastgan import _hf_layers

    plain = model_of(kind).train()
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fused = fastgan.replace_modules(copy.deepcopy(plain))
    ends = [type(module) for module in fused.modules() if isinstance(module, _hf_layers._LayerEnd)]
    assert len(ends) == 4
    assert {end.__name__ for end in ends} == {f"{kind}SelfOutput", f"{kind}Output"}
    assert sum("residual and norm" in row.reason for row in fastgan.explain(fused)) == 4
    assert sum("bias and GELU" in row.reason for row in fastgan.explain(fused)) == 2
    assert fused.state_dict().keys() == plain.state_dict().keys()
    ids = torch.randint(3, 50, (2, 64))
    grads = []
    for model in (copy.deepcopy(plain).double(), plain, fused):
        model(ids)[0].sin().sum().backward()
        grads.append({name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None})
    exact, plains, ours = grads
    assert exact.keys() == ours.keys()
    largest = max(grad.abs().max().item() for grad in exact.values())
    for name, grad in exact.items():  # as near to float64 as the model unchanged
        error, allowed = ((each[name] - grad).abs().max().item() for each in (ours, plains))
        assert error < 2 * allowed + 1e-6 * largest, name
    whole = pickle.loads(pickle.dumps(fused))
    assert [type(m) for m in whole.modules() if isinstance(m, _hf_layers._LayerEnd)] == ends
    assert fastgan.replace_modules(fused) is fused


def test_a_hook_on_what_is_fused_still_fires():
    model = fastgan.replace_modules(model_of("Bert")).eval()
    ids = torch.randint(3, 50, (2, 64))
    expected = model(ids)[0]
    layer, seen = model.encoder.layer[0], []
    layer.output.LayerNorm.register_forward_hook(lambda module, args, output: seen.append(output))
    layer.attention.output.dropout.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layer.intermediate.dense.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(model(ids)[0], expected)
    assert len(seen) == 3


@pytest.mark.parametrize("act", ["relu", "gelu_new", "silu"])
def test_another_activation_is_called(act):
    plain = model_of("Bert", hidden_act=act).eval()
    ids = torch.randint(3, 50, (2, 64))
    torch.testing.assert_close(fastgan.replace_modules(copy.deepcopy(plain))(ids)[0], plain(ids)[0])


def test_what_is_not_torchs_norm_is_called():
    class Norm(nn.LayerNorm):
        def forward(self, x):
            return torch.zeros_like(x)

    model = model_of("Bert").eval()
    for layer in model.encoder.layer:
        layer.output.LayerNorm = Norm(64)
    output = fastgan.replace_modules(model)(torch.randint(3, 50, (2, 64)))[0]
    assert torch.equal(output, torch.zeros_like(output))


def test_no_other_class_of_that_name():
    from fastgan import _hf_layers

    with pytest.raises(AttributeError, match="no attribute 'NoSuchOutput'"):
        _hf_layers.NoSuchOutput  # noqa: B018
    Impostor = type("BertOutput", (nn.Module,), {"__module__": "elsewhere"})
    assert _hf_layers._layer_part(Impostor) is None
