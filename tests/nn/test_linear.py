"""``fastgan.nn.Linear`` beside torch's, and the layers of models that generate."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fastgan
from fastgan.nn import Linear, functional


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 512), (2, 3, 512), (33, 512), (512,)])
def test_as_torch(shape, bias):
    torch.manual_seed(0)
    theirs = nn.Linear(512, 256, bias=bias)
    ours = Linear.from_torch(copy.deepcopy(theirs))
    assert isinstance(ours, nn.Linear)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
        assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))
    for each in (ours, theirs):
        each(x).square().sum().backward()
    assert torch.equal(ours.weight.grad, theirs.weight.grad)  # with gradients it is torch's product
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), theirs(x))
    with fastgan.use("reference"), torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_errors_are_torchs():
    x, weight = torch.randn(2, 512), torch.randn(256, 512)
    with torch.no_grad():
        for arguments in (
            (x[:, :9], weight),
            (x, weight, torch.randn(255)),
            (x, weight, torch.randn(256).double()),
            (x.double(), weight),
            ([1.0], weight),
        ):
            with pytest.raises((RuntimeError, TypeError, NotImplementedError)) as theirs:
                nn.functional.linear(*arguments)
            with pytest.raises(theirs.type):
                functional.linear(*arguments)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Linear, got Conv2d"):
        Linear.from_torch(nn.Conv2d(1, 1, 1))


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=1024, n_embd=256, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel, config


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    return transformers.LlamaForCausalLM, config


def t5():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=1024, d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4,
                                   decoder_start_token_id=0)  # fmt: skip
    return transformers.T5ForConditionalGeneration, config


@pytest.mark.parametrize("make", [gpt2, llama, t5])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_equals_the_unreplaced_models(make, settings):
    import fastgan.hf

    kind, config = make()
    torch.manual_seed(0)
    theirs = kind._from_config(config, attn_implementation="sdpa").eval()
    ours = fastgan.replace_modules(copy.deepcopy(theirs))
    ids = torch.randint(3, 1024, (3, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = settings | {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(ours.generate(ids, attention_mask=mask, **settings), expected)


def test_explain_and_what_is_left(tmp_path):
    import fastgan.hf
    from fastgan._hf_layers import Conv1D

    transformers = pytest.importorskip("transformers")
    kind, config = gpt2()
    model = kind._from_config(config, attn_implementation="sdpa")
    model.transformer.h[0].mlp.c_fc.forward = model.transformer.h[0].mlp.c_fc.forward
    before = {row.name: row for row in fastgan.explain(model)}
    assert (before["lm_head"].state, before["lm_head"].becomes) == ("will be swapped", "Linear")
    fastgan.replace_modules(model)
    after = {row.name: row for row in fastgan.explain(model)}
    assert (after["lm_head"].state, after["transformer.h.1.mlp.c_fc"].state) == ("swapped", "swapped")
    assert type(model.lm_head) is Linear
    assert type(model.transformer.h[1].mlp.c_fc) is Conv1D
    assert type(model.transformer.h[0].mlp.c_fc) is transformers.pytorch_utils.Conv1D  # overridden on the instance
    assert after["transformer.h.0.mlp.c_fc"].state == "left"
    del model.transformer.h[0].mlp.c_fc.forward
    model.save_pretrained(tmp_path)
    plain = kind.from_pretrained(tmp_path, local_files_only=True)
    assert type(plain.lm_head) is nn.Linear
    torch.testing.assert_close(plain.state_dict(), model.state_dict())
    # an encoder does not generate, and other models' layers see many rows
    encoder = fastgan.replace_modules(nn.Sequential(nn.Linear(256, 256), nn.TransformerEncoderLayer(32, 2)))
    assert type(encoder[0]) is nn.Linear
    assert type(encoder[1].linear1) is nn.Linear
