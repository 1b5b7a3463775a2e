"""PEFT's LoRA around replaced models, beside the same around plain ones: losses, what is trained, generation, files."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")
peft = pytest.importorskip("peft")

import fastgan.hf  # noqa: E402
from fastgan import _lm_heads  # noqa: E402
from tests.test_hf import VOCABULARY, bert, gpt2  # noqa: E402
from tests.test_hf_lm_heads import batch, gradients  # noqa: E402

TARGETS = {"gpt2": ["c_attn", "c_proj"], "bert": ["query", "value"], "classes": ["query", "value"]}


def classes():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=24, max_position_embeddings=32, num_labels=3)  # fmt: skip
    return BertForSequenceClassification._from_config(config, attn_implementation="sdpa")


MAKERS = {"gpt2": gpt2, "bert": bert, "classes": classes}
MODELS = pytest.mark.parametrize("name", list(MAKERS))


def plain(name):
    """A random model on transformers' own attention, without dropout, in training mode."""
    torch.manual_seed(0)
    model = MAKERS[name]()
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for module in model.modules():
        for attribute in ("dropout", "attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def wrapped(model, name, seed=1, **options):
    """LoRA of rank 4, both factors random: fresh ones multiply to zero, and would hide what they do."""
    kinds = {"gpt2": "CAUSAL_LM", "bert": None, "classes": "SEQ_CLS"}
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": TARGETS[name],
                "task_type": kinds[name], "fan_in_fan_out": name == "gpt2", **options}  # fmt: skip
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.train()


def pair(name, before, **options):
    """LoRA around the plain model, and around its replaced copy; replaced before PEFT wraps it, or after."""
    model = plain(name)
    twin = copy.deepcopy(model)
    if before:
        fastgan.replace_modules(twin)
    theirs, ours = wrapped(model, name, **options), wrapped(twin, name, **options)
    if not before:
        assert fastgan.replace_modules(ours) is ours
    assert ours.base_model.model.config._attn_implementation == "fastgan"
    return theirs, ours


def inputs_of(model, name):
    inputs = batch(model.base_model.model)
    if name == "classes":
        inputs["labels"] = torch.tensor([2, 0])
    return inputs


def assert_same_step(theirs, ours, inputs):
    expected, found = theirs(**inputs), ours(**inputs)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    wanted, got = gradients(theirs, expected.loss), gradients(ours, found.loss)
    assert set(got) == set(wanted) == {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert all(bool(each.any()) for each in wanted.values())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    return found


@MODELS
@pytest.mark.parametrize("before", [True, False], ids=["replaced first", "wrapped first"])
def test_loss_and_every_trained_gradient_are_the_plain_models(name, before):
    theirs, ours = pair(name, before)
    found = assert_same_step(theirs, ours, inputs_of(theirs, name))
    assert (found.logits is None) == (name != "classes")
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("before", [True, False], ids=["replaced first", "wrapped first"])
def test_greedy_generation_is_the_plain_models(before):
    theirs, ours = (model.eval() for model in pair("gpt2", before))
    ids = torch.randint(3, VOCABULARY, (2, 5))
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
                "attention_mask": torch.ones_like(ids)}  # fmt: skip
    with_lora = theirs.generate(input_ids=ids, **settings)
    assert torch.equal(ours.generate(input_ids=ids, **settings), with_lora)
    with theirs.disable_adapter(), ours.disable_adapter():
        without = theirs.generate(input_ids=ids, **settings)
        assert torch.equal(ours.generate(input_ids=ids, **settings), without)
    assert not torch.equal(with_lora, without)


@MODELS
def test_merged_they_are_the_plain_models_and_still_fused(name):
    theirs, ours = pair(name, before=True)
    inputs = inputs_of(theirs, name)
    lora = ours.eval()(**inputs).logits.detach()
    theirs, ours = theirs.merge_and_unload(), ours.merge_and_unload()
    assert not [key for key in ours.state_dict() if "lora" in key]
    torch.testing.assert_close(ours(**inputs).logits, lora, rtol=1e-4, atol=1e-5)
    for model in (theirs, ours):
        model.train().requires_grad_()
    found = assert_same_step(theirs, ours, inputs)
    if name != "classes":
        assert _lm_heads.is_fused(ours)
        assert found.logits is None


@MODELS
def test_saved_from_a_replaced_model_and_loaded_into_a_plain_one_and_back(name, tmp_path):
    theirs, ours = pair(name, before=True)
    inputs = inputs_of(theirs, name)
    expected = theirs.eval()(**inputs).logits
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(plain(name), tmp_path / "ours").eval()
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
    loaded = peft.PeftModel.from_pretrained(fastgan.replace_modules(plain(name)), tmp_path / "theirs").eval()
    assert loaded.base_model.model.config._attn_implementation == "fastgan"
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_lora_on_the_head_itself_computes_its_logits_and_says_so():
    """The fused loss reads the head's weight alone, and would leave the adapter out without a word."""
    _lm_heads._say.cache_clear()
    theirs, ours = pair("gpt2", before=True, target_modules=["c_attn", "lm_head"])
    inputs = inputs_of(theirs, "gpt2")
    with pytest.warns(UserWarning, match=r"the head is a peft\.Linear"):
        found = assert_same_step(theirs, ours, inputs)
    assert found.logits is not None


def test_a_head_that_is_trained_whole():
    """``modules_to_save`` wraps the head, and trains a copy of it."""
    _lm_heads._say.cache_clear()
    theirs, ours = pair("gpt2", before=True, modules_to_save=["lm_head"])
    inputs = inputs_of(theirs, "gpt2")
    with pytest.warns(UserWarning, match="ModulesToSaveWrapper"):
        assert_same_step(theirs, ours, inputs)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_gradient_checkpointing_and_dropout_of_the_adapters(name):
    theirs, ours = pair(name, before=True)
    inputs = inputs_of(theirs, name)
    expected = gradients(ours, ours(**inputs).loss)
    ours.enable_input_require_grads()
    ours.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(ours, ours(**inputs).loss), expected, rtol=1e-5, atol=1e-7)
    theirs, ours = pair(name, before=True, lora_dropout=0.5)
    losses = []
    for model in (theirs, ours, ours):  # the adapters' dropout is torch's, on either side
        torch.manual_seed(len(losses) // 2)
        losses.append(model(**inputs).loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    assert losses[2] != losses[1]
