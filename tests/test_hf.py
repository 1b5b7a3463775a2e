"""Small random transformers with attn_implementation="fastgan" against eager: logits, gradients, caches and masks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")

import fastgan.hf  # noqa: E402
from fastgan.nn import functional  # noqa: E402

VOCABULARY = 53
SMALL = {"vocab_size": VOCABULARY, "attn_implementation": "fastgan"}


def bert():
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        **SMALL,
    )
    return BertForMaskedLM(config)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2, **SMALL)
    return GPT2LMHeadModel(config)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        pad_token_id=0,
        **SMALL,
    )
    return LlamaForCausalLM(config)


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0, **SMALL
    )
    return T5ForConditionalGeneration(config)


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        forced_eos_token_id=None,
        decoder_start_token_id=2,
        **SMALL,
    )
    return BartForConditionalGeneration(config)


MODELS = [bert, gpt2, llama, t5, bart]
CAUSAL = [gpt2, llama]
TWO_SIDED = [t5, bart]


def made(make, training=False):
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():  # initialised so small that attention would hardly matter
            parameter.add_(torch.randn_like(parameter) * 0.2)
    assert model.config._attn_implementation == "fastgan"
    return model.train(training)


def batch(make, side="right", targets=5):
    """Ids, mask and, for encoder-decoders, decoder ids of two sequences of 7 and 4 tokens."""
    ids = torch.randint(3, VOCABULARY, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    if side == "left":
        mask = mask.flip(1)
    out = {"input_ids": ids, "attention_mask": mask}
    if make in TWO_SIDED:
        out["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, targets))
    elif side == "left":
        out["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return out


def kept(make, inputs, logits):
    """Logits of real tokens: what stands in a padded query's place differs, and nobody reads it."""
    return logits if make in TWO_SIDED else logits[inputs["attention_mask"].bool()]


def run(model, make, inputs):
    """Logits, and the gradients of a loss that reads all of the real ones."""
    model.zero_grad()
    logits = kept(make, inputs, model(**inputs).logits)
    (logits.log_softmax(-1)[..., 3]).mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("side", ["right", "left", "none"])
@pytest.mark.parametrize("make", MODELS)
def test_logits_and_gradients_equal_eager(make, side):
    model, inputs = made(make), batch(make, side)
    if side == "none":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    ours = run(model, make, inputs)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(ours, run(model, make, inputs), rtol=2e-4, atol=2e-5)


def test_an_encoder_that_does_not_say_whether_it_is_causal():
    from transformers import SplinterConfig, SplinterModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model, ids = made(lambda: SplinterModel(SplinterConfig(**sizes, **SMALL))), torch.randint(3, VOCABULARY, (2, 7))
    with torch.no_grad():
        ours = model(ids).last_hidden_state
        model.set_attn_implementation("eager")
        torch.testing.assert_close(ours, model(ids).last_hidden_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_R29_a_decoder_that_does_not_say_that_it_is_causal(compiled):
    from transformers import PegasusXConfig, PegasusXForConditionalGeneration

    config = PegasusXConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        block_size=4,
        num_global_tokens=2,
        max_position_embeddings=32,
        **SMALL,
    )
    model = made(lambda: PegasusXForConditionalGeneration(config))
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (2, 8)), "decoder_input_ids": torch.tensor([[3, 4, 5, 6]] * 2)}
    call = torch.compile(model, backend="eager") if compiled else model
    with torch.no_grad():
        ours = call(**inputs).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(ours, model(**inputs).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["BloomForCausalLM", "MPNetModel"])
def test_R29_a_model_that_never_asks_for_an_attention_function_gets_the_mask_that_it_adds(name):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    kind = getattr(transformers, name)
    config = kind.config_class(**SMALL, **sizes)
    model, inputs = made(lambda: kind(config)), batch(bert)
    with torch.no_grad():
        ours = model(**inputs)[0]
        eager = kind(kind.config_class(**{**SMALL, "attn_implementation": "eager"}, **sizes)).eval()
        eager.load_state_dict(model.state_dict())
        torch.testing.assert_close(ours, eager(**inputs)[0], rtol=1e-4, atol=1e-5)
    rows = [row for row in fastgan.explain(model) if row.type.endswith("Attention")]
    assert {(row.state, "never asks" in row.reason) for row in rows} == {("left", True)}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make", [bert, *CAUSAL])
def test_R26_padding_changes_nothing(make, side):
    model, inputs = made(make), batch(make, side)
    with torch.no_grad():
        together = model(**inputs).logits[1]
        real = inputs["attention_mask"][1].bool()
        alone = model(inputs["input_ids"][1:, real]).logits[0]
    torch.testing.assert_close(together[real], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", MODELS)
def test_R28_attention_maps_equal_eagers(make):
    model, inputs = made(make), batch(make)
    names = ["attentions"] if make not in TWO_SIDED else [f"{n}_attentions" for n in ("encoder", "decoder", "cross")]
    with torch.no_grad():
        plain = model(**inputs).logits
        ours = model(**inputs, output_attentions=True)
        model.set_attn_implementation("eager")
        eager = model(**inputs, output_attentions=True)
    torch.testing.assert_close(ours.logits, plain, rtol=1e-4, atol=1e-5)
    for name in names:
        assert len(ours[name]) == 2
        torch.testing.assert_close(tuple(ours[name]), tuple(eager[name]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("make", CAUSAL)
def test_R29_later_tokens_change_no_earlier_logits(make, with_mask):
    model = made(make)
    ids = torch.randint(3, VOCABULARY, (1, 8))
    other = ids.clone()
    other[0, 5:] = (other[0, 5:] + 7) % VOCABULARY
    mask = {"attention_mask": torch.ones_like(ids)} if with_mask else {}
    with torch.no_grad():
        first, second = model(ids, **mask).logits, model(other, **mask).logits
    torch.testing.assert_close(first[:, :5], second[:, :5], rtol=0, atol=1e-6)
    assert not torch.allclose(first[:, 5:], second[:, 5:], atol=1e-3)


@pytest.mark.parametrize("targets", [1, 4])
@pytest.mark.parametrize("make", TWO_SIDED)
def test_R30_cross_attention_without_masks_equals_eager(make, targets):
    model, inputs = made(make), batch(make, targets=targets)
    del inputs["attention_mask"]
    with torch.no_grad():
        ours = model(**inputs).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(ours, model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_R32_a_live_t5_goes_to_eager_and_back():
    model, inputs = made(t5), batch(t5)
    with torch.no_grad():
        logits = []
        for implementation in ("fastgan", "eager", "sdpa", "fastgan"):
            model.set_attn_implementation(implementation)
            logits.append(model(**inputs).logits)
    for each in logits[1:]:
        torch.testing.assert_close(each, logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.kernel
def test_t5_keeps_mask_and_bias_apart(monkeypatch):
    """Joined they would be a (B, H, L, S) tensor in every layer."""
    monkeypatch.setattr(functional, "scaled_dot_product_attention", None)
    model, inputs = made(t5), batch(t5)
    with torch.no_grad():
        model.encoder(inputs["input_ids"], attention_mask=inputs["attention_mask"])


@pytest.mark.parametrize("make", [gpt2, llama, t5, bart])
def test_generation_with_a_cache_equals_eager(make):
    model, inputs = made(make), batch(make, "left")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ours = model.generate(**inputs, **settings)
    model.set_attn_implementation("eager")
    assert torch.equal(ours, model.generate(**inputs, **settings))


def test_generation_with_a_static_cache_equals_a_dynamic_one():
    model = made(llama)
    ids = torch.randint(3, VOCABULARY, (2, 6))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    dynamic = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    static = model.generate(
        ids, attention_mask=torch.ones_like(ids), cache_implementation="static", disable_compile=True, **settings
    )
    assert torch.equal(dynamic, static)


@pytest.mark.parametrize("make", MODELS)
def test_dropout_in_training_only(make):
    model, inputs = made(make, training=True), batch(make)
    names = ("dropout", "attention_dropout", "attn_dropout", "dropout_prob", "activation_dropout")
    for of_attention in (False, True):  # attention's own dropout alone remains
        for module in model.modules():
            is_attention = type(module).__name__.endswith("Attention")
            for name in names:
                held = getattr(module, name, None)
                if of_attention and not is_attention:
                    continue
                if isinstance(held, torch.nn.Dropout):
                    held.p = 0.3 if of_attention else 0.0
                elif isinstance(held, float):
                    setattr(module, name, 0.3 if of_attention else 0.0)
            if isinstance(module, torch.nn.Dropout) and not of_attention:
                module.p = 0.0
    first, second = model(**inputs).logits, model(**inputs).logits
    assert first.isfinite().all()
    assert not torch.allclose(first, second, atol=1e-3)
    model.eval()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_R14_gradient_checkpointing_draws_the_same_dropout(reentrant):
    model, inputs = made(bert, training=True), batch(bert)
    torch.manual_seed(5)
    plain = run(model, bert, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(5)
    torch.testing.assert_close(run(model, bert, inputs), plain, rtol=1e-4, atol=1e-5)


def test_bfloat16_and_compile():
    model, inputs = made(bert), batch(bert)
    with torch.no_grad():
        expected = model(**inputs).logits
        compiled = torch.compile(model, backend="aot_eager")(**inputs).logits
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
        half = model.bfloat16()(**inputs).logits
    assert torch.nn.functional.cosine_similarity(half.float().flatten(), expected.flatten(), dim=0) > 0.99


def test_what_the_kernel_lacks_is_refused():
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="softcap"):
        fastgan.hf.attention_forward(torch.nn.Module(), q, q, q, None, softcap=30.0)


def test_import_fastgan_registers_where_transformers_is_loaded():
    code = (
        "import transformers, fastgan; from transformers import AttentionInterface as A, AttentionMaskInterface as M; "
        "assert 'fastgan' in A().valid_keys() and 'fastgan' in M().valid_keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


@pytest.mark.parametrize("version", ["5.23.1", None])
def test_an_old_or_missing_transformers_is_named(version, monkeypatch):
    import importlib

    if version is None:
        monkeypatch.setitem(sys.modules, "transformers", None)
    else:
        monkeypatch.setattr(importlib.import_module("transformers"), "__version__", version)
    with pytest.raises(ImportError, match=r"fastgan\.hf needs transformers.*pip install"):
        importlib.reload(fastgan.hf)


def test_the_example_of_the_article_learns_its_sentences(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "film", "warmth", "watch", "again", "cast", "wonderful"]
    words += ["two", "hours", "not", "plot", "no", "sense", "dull", "loud", "long", "a", "of", "i", "the", "it", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    script = Path(__file__).parent.parent / "examples" / "bert_classification.py"
    ran = subprocess.run(
        [sys.executable, str(script), "--model", str(tmp_path), "--steps", "25", "--lr", "1e-2"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr
    losses = [float(line.split()[-1]) for line in ran.stdout.splitlines() if line.startswith("step")]
    assert len(losses) == 25
    assert losses[-1] < losses[0] / 2
    assert "right: 6 of 6" in ran.stdout


def flattened(lengths, **changes):
    """The batch of transformers' collator for flattened batches, and the same examples padded."""
    from transformers import DataCollatorWithFlattening

    examples = [{"input_ids": torch.randint(3, VOCABULARY, (n,)).tolist()} for n in lengths]
    flat = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(examples, return_tensors="pt")
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, example in zip(ids, examples, strict=True):
        row[: len(example["input_ids"])] = torch.tensor(example["input_ids"])
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    padded = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return flat | changes, padded


def counted(monkeypatch):
    calls = []
    kernel = functional.varlen_attention

    def varlen_attention(*args, **kwargs):
        calls.append(kwargs)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(functional, "varlen_attention", varlen_attention)
    return calls


def loss_and_gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", CAUSAL)
def test_a_flattened_batch_equals_the_padded_one(make, monkeypatch):
    model, calls = made(make), counted(monkeypatch)
    flat, padded = flattened((7, 3, 11, 1))
    ours = loss_and_gradients(model, flat)
    assert [call["is_causal"] for call in calls] == [True, True]
    of_padded = loss_and_gradients(model, padded)
    model.set_attn_implementation("eager")
    assert len(calls) == 2
    for other in (of_padded, loss_and_gradients(model, padded)):
        torch.testing.assert_close(ours, other, rtol=2e-4, atol=2e-5)


def test_a_flattened_batch_needs_no_positions_for_its_sequences():
    """The offsets say it all: without position_ids, which transformers' own masks are made from, GPT-2 counts on, and
    each sequence is still alone."""
    model = made(gpt2)
    flat, _ = flattened((5, 6))
    del flat["position_ids"]
    first = model(**flat).logits[0, 5:]
    flat["input_ids"][0, :5] = 3
    torch.testing.assert_close(model(**flat).logits[0, 5:], first)


def test_a_flattened_batch_of_an_encoder(monkeypatch):
    model, calls = made(bert), counted(monkeypatch)
    flat, padded = flattened((7, 4, 2))
    kept = padded["attention_mask"].bool()
    ours = model(**flat).logits[0]
    assert [call["is_causal"] for call in calls] == [False, False]
    model.set_attn_implementation("eager")
    torch.testing.assert_close(ours, model(**padded).logits[kept], rtol=2e-4, atol=2e-5)


def test_a_flattened_batch_compiles_whole():
    model = made(llama)
    flat, _ = flattened((7, 4))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**flat).logits, model(**flat).logits, rtol=2e-4, atol=2e-5)


def test_a_flattened_batch_with_a_window_goes_by_its_mask(monkeypatch):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    make = lambda: MistralForCausalLM(MistralConfig(num_hidden_layers=1, sliding_window=3, **sizes, **SMALL))
    model, calls = made(make), counted(monkeypatch)
    flat, _ = flattened((9, 4))
    ours = loss_and_gradients(model, flat)
    assert not calls
    model.set_attn_implementation("eager")
    torch.testing.assert_close(ours, loss_and_gradients(model, flat), rtol=2e-4, atol=2e-5)


def test_a_flattened_batch_with_padding_is_refused():
    flat, _ = flattened((5, 6))
    mask = torch.ones_like(flat["input_ids"])
    model = made(gpt2)
    model(**flat, attention_mask=mask)
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        model(**flat, attention_mask=mask)


def test_the_last_queries_alone_are_the_last():
    """Gemma 4 cuts the other queries off where only the last logits are wanted; causality is the function's then."""
    config = transformers.Gemma4TextConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24,
        head_dim=8, global_head_dim=8, max_position_embeddings=32, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY, num_kv_shared_layers=2, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2, **SMALL,
    )  # fmt: skip
    model = made(lambda: transformers.Gemma4ForCausalLM(config))
    ids = torch.randint(3, VOCABULARY, (2, 9))
    with torch.no_grad():
        whole, last = model(ids).logits, model(ids, logits_to_keep=3).logits
    torch.testing.assert_close(last, whole[:, -3:], rtol=1e-4, atol=1e-5)
