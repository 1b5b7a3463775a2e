"""Language models with head and loss fused, beside the same models unchanged: losses, every gradient, and the rest."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")

import fastgan.hf  # noqa: E402
from fastgan import _lm_heads  # noqa: E402
from tests.test_hf import VOCABULARY, bart, bert, gpt2, llama, t5  # noqa: E402

QWEN = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
LLAMA = {name: value for name, value in QWEN.items() if name != "head_dim"}
ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
PAIR = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}


def _of(name, config, **settings):
    def make():
        made = getattr(transformers, config)(vocab_size=VOCABULARY, **settings)
        return getattr(transformers, name)._from_config(made, attn_implementation="fastgan")

    make.__name__ = name
    return make


MODELS = [
    gpt2,
    llama,
    _of("GPTNeoXForCausalLM", "GPTNeoXConfig", **ENCODER),
    _of("GPTJForCausalLM", "GPTJConfig", n_embd=16, n_layer=1, n_head=2, n_positions=32, rotary_dim=4),
    _of("OPTForCausalLM", "OPTConfig", ffn_dim=24, word_embed_proj_dim=16, **ENCODER),
    _of("CohereForCausalLM", "CohereConfig", logit_scale=0.3, **LLAMA),
    _of("GraniteForCausalLM", "GraniteConfig", logits_scaling=3.0, **LLAMA),
    _of("Qwen2ForCausalLM", "Qwen2Config", **LLAMA),
    _of("Qwen3ForCausalLM", "Qwen3Config", tie_word_embeddings=True, **QWEN),
    bert,
    _of("RobertaForMaskedLM", "RobertaConfig", pad_token_id=1, **ENCODER),
    _of("ElectraForMaskedLM", "ElectraConfig", embedding_size=12, **ENCODER),
    _of("DistilBertForMaskedLM", "DistilBertConfig", dim=16, n_layers=1, n_heads=2, hidden_dim=24),
    t5,
    _of("T5ForConditionalGeneration", "T5Config", tie_word_embeddings=False, **T5),
    _of("MT5ForConditionalGeneration", "MT5Config", **T5),
    bart,
    _of("MBartForConditionalGeneration", "MBartConfig", **PAIR),
    _of("MarianMTModel", "MarianConfig", **PAIR),
    _of("M2M100ForConditionalGeneration", "M2M100Config", encoder_layerdrop=0.0, decoder_layerdrop=0.0, **PAIR),
]  # fmt: skip


def is_pair(model):
    return model.config.is_encoder_decoder


def is_causal(model):
    return type(model).__name__ in ("GPT2LMHeadModel",) or type(model).__name__.endswith("ForCausalLM")


def pair_of(make):
    """The same random model twice, plain and fused, in training mode without dropout."""
    torch.manual_seed(0)
    plain = make()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        if hasattr(plain, "final_logits_bias"):
            plain.final_logits_bias.normal_()
    for module in plain.modules():  # some have dropout as a number
        for name in ("dropout", "attention_dropout", "activation_dropout", "residual_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return plain.train(), fastgan.replace_modules(copy.deepcopy(plain)).train()


def batch(model):
    """Two padded sequences of 7 and 4 tokens and labels, some of them ignored."""
    ids = torch.randint(3, VOCABULARY, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = torch.randint(3, VOCABULARY, (2, 5)) if is_pair(model) else ids.masked_fill(mask == 0, -100)
    if not is_causal(model) and not is_pair(model):
        labels = labels.masked_fill(torch.rand(labels.shape) < 0.4, -100)
    labels[0, -1] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _alike():
    """A maker for each class that ``_lm_heads.LIKE`` says is as one that has a row above."""
    sizes = {
        "Llama": QWEN,
        "Cohere": LLAMA | {"logit_scale": 0.3},
        "Granite": LLAMA | {"logits_scaling": 3.0},
        "Roberta": ENCODER,
        "Bert": ENCODER,
        "Bart": PAIR,
        "T5": T5,
    }
    rope = {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_type": "default"}
    special = {
        "Nemotron": {"rope_parameters": rope},
        "RoCBert": {"pronunciation_vocab_size": 9, "shape_vocab_size": 9},
        "Lfm2": {"layer_types": ["full_attention"]},
        "Qwen3_5": {"layer_types": ["full_attention"]},
    }
    for first, others in _lm_heads.LIKE.items():
        family, _, kind = first.partition("For")
        for name in others.split():
            config = "Qwen3_5TextConfig" if name == "Qwen3_5" else f"{name}Config"
            settings = {"pad_token_id": 0} | sizes[family] | special.get(name, {})
            if not hasattr(getattr(transformers, config)(), "head_dim"):
                settings.pop("head_dim", None)
            yield _of(f"{name}For{kind}", config, **settings)


@pytest.mark.parametrize("make", [*MODELS, *_alike()], ids=lambda make: make.__name__)
def test_loss_and_every_gradient_equal_the_plain_models(make):
    plain, fused = pair_of(make)
    assert _lm_heads.is_fused(fused)
    inputs = batch(plain)
    expected, outputs = plain(**inputs), fused(**inputs)
    assert type(outputs) is type(expected)
    assert outputs.logits is None
    assert expected.logits is not None
    assert [name for name in expected if name != "logits"] == list(outputs)
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-5, atol=1e-6)
    ours, theirs = gradients(fused, outputs.loss), gradients(plain, expected.loss)
    assert any(name.endswith("bias") for name in theirs) or is_causal(plain) or is_pair(plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    # logits on request, and in evaluation
    asked = fused(**inputs, return_logits=True)
    torch.testing.assert_close((asked.loss, asked.logits), (expected.loss, expected.logits), rtol=1e-4, atol=1e-5)
    evaluated, exact = fused.eval()(**inputs), plain.eval()(**inputs)
    # The same operations, but for a GELU that is one in place of eight.
    rounding = 1e-5 if any(type(m).__name__ == "NewGELUActivation" for m in plain.modules()) else 0.0
    torch.testing.assert_close(evaluated.logits, exact.logits, rtol=rounding, atol=rounding)
    torch.testing.assert_close(evaluated.loss, exact.loss, rtol=rounding, atol=rounding)
    without = fused.train()(**{k: v for k, v in inputs.items() if k != "labels"} | _decoder(fused, inputs))
    assert without.loss is None
    assert without.logits.shape[-1] == VOCABULARY


def _decoder(model, inputs):
    return {"decoder_input_ids": inputs["labels"].clamp(min=0)} if is_pair(model) else {}


@pytest.mark.parametrize("make", [gpt2, bert, t5, bart], ids=lambda make: make.__name__)
def test_label_smoothing_equals_cross_entropys_on_the_logits(make):
    plain, fused = pair_of(make)
    inputs = batch(plain)
    logits, labels = plain(**inputs).logits, inputs["labels"]
    if is_causal(plain):
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    loss = fused(**inputs, label_smoothing=0.1).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(fused, loss), gradients(plain, expected), rtol=1e-4, atol=1e-6)
    assert torch.equal(fused.eval()(**inputs, label_smoothing=0.1).loss, plain.eval()(**inputs).loss)


@pytest.mark.parametrize(
    "extra",
    [
        {"num_items_in_batch": 11},
        {"num_items_in_batch": torch.tensor(11)},
        {"ignore_index": 5},
        {"shift_labels": torch.arange(3, 17).view(2, 7)},
    ],
    ids=["items", "items as a tensor", "ignore_index", "shift_labels"],
)
@pytest.mark.parametrize("make", [gpt2, llama], ids=lambda make: make.__name__)
def test_arguments_of_the_causal_loss(make, extra):
    plain, fused = pair_of(make)
    inputs = batch(plain) | extra
    if "ignore_index" in extra:
        inputs["labels"] = inputs["labels"].clamp(min=5)
    loss, expected = fused(**inputs).loss, plain(**inputs).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(fused, loss), gradients(plain, expected), rtol=1e-4, atol=1e-6)


def test_positional_arguments_tuples_and_hidden_states():
    plain, fused = pair_of(gpt2)
    ids = batch(plain)["input_ids"]
    expected = plain(ids, labels=ids, output_hidden_states=True, output_attentions=True)
    outputs = fused(ids, labels=ids, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(outputs.hidden_states, expected.hidden_states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs.attentions, expected.attentions, rtol=1e-5, atol=1e-5)
    (loss,) = fused(ids, labels=ids, return_dict=False, use_cache=False)
    torch.testing.assert_close(loss, expected.loss)
    place = list(inspect.signature(plain.forward).parameters).index("labels")
    assert fused(*[ids, *[None] * (place - 1), ids]).logits is None


def test_encoder_outputs_may_be_given_to_a_pair():
    plain, fused = pair_of(t5)
    inputs = batch(plain)
    encoded = plain.encoder(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    rest = {name: inputs[name] for name in ("attention_mask", "labels")}
    for given in (encoded, (encoded[0],)):
        torch.testing.assert_close(fused(encoder_outputs=given, **rest).loss, plain(**inputs).loss)


@pytest.mark.parametrize("make", [gpt2, bert, t5], ids=lambda make: make.__name__)
def test_gradient_checkpointing(make):
    plain, fused = pair_of(make)
    inputs = batch(plain)
    expected = gradients(plain, plain(**inputs).loss)
    fused.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(fused, fused(**inputs).loss), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [gpt2, bert], ids=lambda make: make.__name__)
def test_compiled_whole(make):
    plain, fused = pair_of(make)
    inputs = batch(plain)
    if make is gpt2:
        inputs["use_cache"] = False
    expected = plain(**inputs).loss
    loss = torch.compile(fused, backend="aot_eager", fullgraph=True)(**inputs).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(fused, loss), gradients(plain, expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_fused_and_tied_and_their_own(copied):
    _, fused = pair_of(gpt2)
    inputs = batch(fused)
    twin = copied(fused)
    assert type(twin) is type(fused)
    assert twin.lm_head.weight is twin.transformer.wte.weight
    before = fused(**inputs).loss
    with torch.no_grad():
        fused.lm_head.weight.zero_()
    outputs = twin(**inputs)
    assert outputs.logits is None
    assert torch.equal(outputs.loss, before)


@pytest.mark.parametrize("make", [gpt2, bert, t5, bart], ids=lambda make: make.__name__)
def test_saved_models_are_plain_transformers(make, tmp_path):
    plain, fused = pair_of(make)
    fused.save_pretrained(tmp_path)
    assert fused.config.architectures == [type(plain).__name__]
    loaded = type(plain).from_pretrained(tmp_path)
    assert type(loaded) is type(plain)
    inputs = batch(plain)
    torch.testing.assert_close(loaded.eval()(**inputs).loss, fused.eval()(**inputs).loss)
    again = fastgan.replace_modules(type(fused).from_pretrained(tmp_path))
    assert again.train()(**inputs).logits is None


@pytest.mark.parametrize("make", [gpt2, bart], ids=lambda make: make.__name__)
def test_generation_is_the_plain_models(make):
    plain, fused = pair_of(make)
    ids = torch.randint(3, VOCABULARY, (2, 5))
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings["attention_mask"] = torch.ones_like(ids)
    assert torch.equal(fused.eval().generate(ids, **settings), plain.eval().generate(ids, **settings))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_makes_the_same_steps(smoothing, tmp_path):
    """Accumulated batches of unequal numbers of labels: num_items_in_batch. Trainer's smoothing takes logits."""
    ids = torch.randint(3, VOCABULARY, (8, 6))
    data = [
        {"input_ids": row, "labels": row.masked_fill(torch.arange(6) > 1 + n % 5, -100)} for n, row in enumerate(ids)
    ]
    ends = []
    for model in pair_of(gpt2):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, label_smoothing_factor=smoothing, save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant",
        )  # fmt: skip
        transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
        ends.append(dict(model.state_dict()))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)


def test_what_would_not_be_the_same_computes_its_logits_and_says_so():
    _lm_heads._say.cache_clear()
    plain, fused = pair_of(gpt2)
    inputs = batch(plain)
    handle = fused.lm_head.register_forward_hook(lambda module, arguments, output: output * 2)
    with pytest.warns(UserWarning, match="hooks on the head"):
        assert fused(**inputs).logits is not None
    handle.remove()
    fused.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 7
    with pytest.warns(UserWarning, match="loss_function of its own"):
        assert fused(**inputs).loss == 7
    with pytest.raises(ValueError, match="label_smoothing needs the fused loss"):
        fused(**inputs, label_smoothing=0.1)
    assert fused(**inputs, logits_to_keep=0).loss == 7


def test_a_resized_vocabulary_is_followed():
    plain, fused = pair_of(gpt2)
    torch.manual_seed(1)
    plain.resize_token_embeddings(60, mean_resizing=False)
    fused.resize_token_embeddings(60, mean_resizing=False)
    fused.load_state_dict(plain.state_dict())
    inputs = batch(plain)
    torch.testing.assert_close(fused(**inputs).loss, plain(**inputs).loss)


def test_explain_and_unknown_classes():
    model = gpt2()
    (row,) = [row for row in fastgan.explain(model) if row.name == ""]
    assert (row.state, row.becomes) == ("will be swapped", "fused head and loss")
    fastgan.replace_modules(model)
    kind = type(model)
    assert fastgan.explain(model)[0].state == "swapped"
    assert isinstance(model, transformers.GPT2LMHeadModel)
    assert type(fastgan.replace_modules(model)) is kind

    class MyLMHeadModel(transformers.GPT2LMHeadModel):
        pass

    unknown = [
        MyLMHeadModel(gpt2().config),
        _of("BloomForCausalLM", "BloomConfig", hidden_size=16, n_layer=1, n_head=2)(),
    ]  # fmt: skip
    for other in unknown:
        kind = type(other)
        assert type(fastgan.replace_modules(other)) is kind
        (row,) = [row for row in fastgan.explain(other) if row.name == ""]
        assert row.state == "left"
        assert kind.__name__ in row.reason


def test_bfloat16_and_autocast():
    plain, fused = pair_of(gpt2)
    inputs = batch(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, expected = fused(**inputs).loss, plain(**inputs).loss
    assert loss.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    loss, expected = fused.bfloat16()(**inputs).loss, plain.bfloat16()(**inputs).loss
    assert loss.dtype == expected.dtype
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)


def test_gpt2s_gelu_is_one_operation_with_the_same_loss_and_gradients():
    from fastgan._hf_layers import NewGELUActivation

    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16,
                                     resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).train()
    ours = fastgan.replace_modules(copy.deepcopy(theirs))
    activation = ours.transformer.h[1].mlp.act
    assert type(activation) is NewGELUActivation
    assert {row.state for row in fastgan.explain(ours) if row.type == "NewGELUActivation"} == {"swapped"}
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    torch.testing.assert_close(activation(x), theirs.transformer.h[1].mlp.act(x), rtol=1e-12, atol=1e-13)
    ids = torch.randint(0, 50, (3, 9))
    losses = [model(ids, labels=ids).loss for model in (ours, theirs)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)
