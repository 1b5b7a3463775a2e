"""replace_modules on models of attention: torch's Transformer layers, and transformers."""

import copy

import pytest
import torch
from torch import nn

from fastgan import explain, replace_modules
from fastgan.nn import MultiheadAttention


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def padded_encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double()
    x, padding = noise(3, 6, 8), torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 4:] = True
    padding[2, 2:] = True
    return model, x, padding


def test_R22_the_encoder_evaluates_as_it_trains():
    model, x, padding = padded_encoder()
    plain = copy.deepcopy(model).eval()
    replace_modules(model)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        if isinstance(m, MultiheadAttention):
            m.dropout = 0.0
    trained = model(x, src_key_padding_mask=padding)
    model.eval()
    with torch.no_grad():
        evaluated = model(x, src_key_padding_mask=padding)
        expected = plain(x, src_key_padding_mask=padding)
    torch.testing.assert_close(evaluated, trained, rtol=0, atol=0)
    torch.testing.assert_close(evaluated[~padding], expected[~padding])


def test_the_encoders_switch_is_explained():
    model, _, _ = padded_encoder()
    row = explain(model)[0]
    assert (row.state, row.becomes) == ("will be swapped", "use_nested_tensor=False")
    replace_modules(model)
    assert model.use_nested_tensor is False
    assert {row.name: row.state for row in explain(model)}["layers.1.self_attn"] == "swapped"


def test_hooks_on_attention_fire_in_both_modes():
    model, x, padding = padded_encoder()
    replace_modules(model)
    fired = []
    model.layers[0].self_attn.register_forward_hook(lambda *_: fired.append(0))
    model.layers[1].linear1.register_forward_hook(lambda *_: fired.append(1))
    model(x, src_key_padding_mask=padding)
    model.eval()
    with torch.no_grad():
        model(x, src_key_padding_mask=padding)
    assert fired == [0, 1, 0, 1]


@pytest.mark.parametrize("batch_first", [True, False])
def test_whole_transformer_with_causal_decoder(batch_first):
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=batch_first).double()
    plain = copy.deepcopy(model)
    replace_modules(model)
    src, tgt = noise(2, 5, 8), noise(2, 4, 8)
    if not batch_first:
        src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
    options = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64),
        "tgt_is_causal": True,
    }
    found = []
    for module in (plain, model):
        out = module(src, tgt, **options)
        found.append(
            [
                ("out", out),
                *(
                    (str(i), g)
                    for i, g in enumerate(torch.autograd.grad(out.square().sum(), list(module.parameters())))
                ),
            ]
        )
    for (name, theirs), (_, ours) in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")
    plain.eval(), model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(src, tgt, **options), plain(src, tgt, **options))


def test_transformers_attention_is_switched_where_fastgan_is_registered(monkeypatch):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=9, **sizes)
    model = transformers.BertModel(config)
    model.set_attn_implementation("sdpa")
    mapping = ALL_ATTENTION_FUNCTIONS._global_mapping

    def states():
        return [(row.state, row.reason) for row in explain(model) if row.name.endswith("attention.self")]

    monkeypatch.delitem(mapping, "fastgan", raising=False)
    assert states() == [("left", 'attn_implementation is "sdpa"; import fastgan.hf first')]
    assert replace_modules(model).config._attn_implementation == "sdpa"
    monkeypatch.setitem(mapping, "fastgan", mapping["sdpa"])
    assert states() == [("will be swapped", "")]
    assert replace_modules(model).config._attn_implementation == "fastgan"
    assert states() == [("swapped", "")]
    model.set_attn_implementation("eager")
    assert replace_modules(model).config._attn_implementation == "eager"


@pytest.mark.parametrize("implementation", ["fastgan", "eager"])
def test_deberta_is_said_to_compute_attention_itself(implementation):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("fastgan.hf")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.DebertaConfig(vocab_size=9, attn_implementation=implementation, **sizes)
    rows = [row for row in explain(transformers.DebertaModel(config)) if "Attention" in row.type]
    assert [(row.type, row.state) for row in rows] == [("DisentangledSelfAttention", "left")]
    assert "never asks for attn_implementation" in rows[0].reason
