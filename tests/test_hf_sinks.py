"""Attention sinks, and keys that a model chooses itself, with attn_implementation="fastgan" against eager."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")

import fastgan  # noqa: E402
import fastgan.hf  # noqa: E402

VOCABULARY = 53
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}


def gpt_oss():
    return transformers.GptOssForCausalLM, transformers.GptOssConfig(
        head_dim=8, num_local_experts=4, sliding_window=4, **EXPERTS, **SIZES
    )


def granite():
    return transformers.GraniteSWAForCausalLM, transformers.GraniteSWAConfig(sliding_window=4, **SIZES)


def chosen_keys():
    sizes = {**SIZES, "num_key_value_heads": 4}
    return transformers.GlmMoeDsaForCausalLM, transformers.GlmMoeDsaConfig(
        head_dim=4, index_topk=3, index_head_dim=8, index_n_heads=2, n_routed_experts=4, moe_intermediate_size=16,
        first_k_dense_replace=1, **EXPERTS, **LATENT, **sizes,
    )  # fmt: skip


def made(make, implementation):
    torch.manual_seed(0)
    kind, config = make()
    model = kind._from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():  # initialised so small that attention would hardly matter
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def run(model, mask):
    """Logits of real tokens, and the gradients of a loss that reads them all."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, mask.shape)
    model.zero_grad()
    logits = model(ids, attention_mask=mask).logits[mask.bool()]
    logits.log_softmax(-1)[..., 3].mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("make", [gpt_oss, granite, chosen_keys])
def test_logits_and_gradients_equal_eager(make, padded):
    mask = torch.ones(2, 9, dtype=torch.int64)
    if padded:
        mask[1, :4] = 0
    model = made(make, "fastgan")
    ours = run(model, mask)
    if make is not chosen_keys:
        assert any("sinks" in name for name in ours[1])
    model.set_attn_implementation("eager")
    torch.testing.assert_close(ours, run(model, mask), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("make", [gpt_oss, granite, chosen_keys])
def test_generation_with_a_cache_equals_eager(make):
    model = made(make, "fastgan").eval()
    ids = torch.randint(3, VOCABULARY, (2, 6))
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"output_scores": True, "return_dict_in_generate": True, "attention_mask": torch.ones_like(ids)}
    ours = model.generate(ids, **settings)
    model.set_attn_implementation("eager")
    theirs = model.generate(ids, **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-5)


def test_replaced_models_keep_to_the_keys_that_they_choose():
    model = made(chosen_keys, "sdpa")
    mask = torch.ones(2, 9, dtype=torch.int64)
    before = run(model, mask)
    fastgan.replace_modules(model)
    assert model.config._attn_implementation == "fastgan"
    torch.testing.assert_close(run(model, mask), before, rtol=2e-4, atol=2e-5)
    model.config.index_topk = 9
    for layer in model.model.layers:
        layer.self_attn.indexer.index_topk = 9
    assert not torch.allclose(run(model, mask)[0], before[0], rtol=1e-2)  # three keys of nine made a difference


def test_a_model_for_which_there_is_only_eager_is_replaced():
    torch.manual_seed(0)
    kind, config = gpt_oss()
    model = kind(config)
    assert model.config._attn_implementation == "eager"
    mask = torch.ones(2, 9, dtype=torch.int64)
    before = run(model, mask)
    assert "GptOssAttention" in str(fastgan.explain(model))
    fastgan.replace_modules(model)
    assert model.config._attn_implementation == "fastgan"
    torch.testing.assert_close(run(model, mask), before, rtol=2e-4, atol=2e-5)


def test_chosen_blocks_are_asked_of_the_models_indexer():
    class Indexer:
        def build_block_mask(self, blocks, mask, columns, dtype, device, positions):
            assert (mask, columns, positions.tolist()) == (None, 6, [[2, 3, 4, 5]])
            keep = blocks.repeat_interleave(2, -1).bool()
            return torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)

    module = torch.nn.Module()
    module.indexer = Indexer()
    query, key, value = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    blocks = torch.tensor([1, 0, 1]).expand(1, 1, 4, 3)
    got, _ = fastgan.hf.attention_forward(module, query, key, value, None, is_causal=False, block_indices=blocks)
    seen = torch.tensor([0, 1, 4, 5])
    expected = torch.nn.functional.scaled_dot_product_attention(query, key[:, :, seen], value[:, :, seen])
    torch.testing.assert_close(got.transpose(1, 2), expected)


# ---- the function itself ----


def formula(query, key, value, mask, sink, scale):
    """The softmax with one more score, in float64; mask is added."""
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scale + mask
    weights = torch.cat([scores, sink.expand(*scores.shape[:3], 1)], -1).softmax(-1)[..., :-1]
    return (weights @ value).transpose(1, 2), weights


def tensors(rows=5, columns=5, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = (2, 4, rows, 8), (2, 2, columns, 8), (2, 2, columns, 8)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def added(mask, rows, columns):
    """A mask of either kind, or "causal", as what is added to scores."""
    if mask is None:
        return torch.zeros(rows, columns, dtype=torch.float64)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    return mask.double()


MASKS = {
    "none": None,
    "boolean": torch.ones(5, 5, dtype=torch.bool).tril().view(1, 1, 5, 5),
    "added": torch.linspace(-2, 2, 50, dtype=torch.float64).view(2, 1, 5, 5),
    "a row that sees nothing": (torch.arange(5) != 2).view(1, 1, 5, 1).expand(1, 1, 5, 5),
}


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("mask", [*MASKS, "causal"])
def test_a_sink_is_one_more_score(mask, graph, per_row):
    query, key, value = tensors()
    shape = (2, 4, 5, 1) if per_row else (4,)
    sink = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    given = {"sinks" if per_row else "s_aux": sink}
    seen = MASKS["boolean"] if mask == "causal" else MASKS[mask]
    expected, weights = formula(
        query, key, value, added(seen, 5, 5), sink if per_row else sink.reshape(1, -1, 1, 1), 0.3
    )
    settings = {"scaling": 0.3, "is_causal": mask == "causal", **given}
    with torch.set_grad_enabled(graph):
        passed = None if mask == "causal" else MASKS[mask]
        got, _ = fastgan.hf.attention_forward(torch.nn.Module(), query, key, value, passed, **settings)
        _, maps = fastgan.hf.attention_forward(
            torch.nn.Module(), query, key, value, passed, output_attentions=True, **settings
        )
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(maps, weights)
    if graph:
        inputs = (query, key, value, sink)
        direction = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(got, inputs, direction), torch.autograd.grad(expected, inputs, direction)
        )


def test_a_sink_beside_a_position_bias():
    query, key, value = tensors(rows=3, columns=6)
    bias = torch.randn(1, 4, 3, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 1, 3, 6) > 0.3
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)
    got, _ = fastgan.hf.attention_forward(
        torch.nn.Module(), query, key, value, mask, scaling=0.3, is_causal=False, position_bias=bias, s_aux=sink
    )
    expected, _ = formula(query, key, value, bias + added(mask, 3, 6), sink.reshape(1, -1, 1, 1), 0.3)
    torch.testing.assert_close(got, expected)
    inputs = (query, key, value, sink, bias)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs)
    )


def test_dropout_leaves_the_sinks_share_out():
    query, key, _ = tensors(rows=64, columns=64)
    value = torch.ones(2, 2, 64, 8, dtype=torch.float64)  # so that the output is what is left of a row's weights
    module = torch.nn.Module().train()
    settings = {"scaling": 0.3, "is_causal": False, "s_aux": torch.full((4,), 3.0, dtype=torch.float64)}
    whole, _ = fastgan.hf.attention_forward(module, query, key, value, None, **settings)
    for graph in (True, False):
        with torch.set_grad_enabled(graph):
            torch.manual_seed(0)
            dropped, _ = fastgan.hf.attention_forward(module, query, key, value, None, dropout=0.5, **settings)
        assert not torch.allclose(dropped, whole)
        assert (dropped.mean() - whole.mean()).abs() < 0.02 * whole.mean()
