"""transformers' architectures: each one's words are reached, and nothing else is changed."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

import fastgan.hf  # noqa: E402, F401
from fastgan.adversarial import Attack, preset  # noqa: E402
from fastgan.replace import replace_modules  # noqa: E402

SMALL = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
         "pad_token_id": 0}  # fmt: skip
PAIR = {"vocab_size": 20, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "pad_token_id": 0, "eos_token_id": 1,
        "decoder_start_token_id": 0}  # fmt: skip
MODELS = {
    "BertForSequenceClassification": SMALL,
    "RobertaForSequenceClassification": SMALL,
    "ElectraForSequenceClassification": {**SMALL, "embedding_size": 4},
    "DistilBertForSequenceClassification": {"vocab_size": 20, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8},
    "GPT2ForSequenceClassification": {"vocab_size": 20, "n_embd": 8, "n_layer": 1, "n_head": 2, "pad_token_id": 0},
    "LlamaForCausalLM": {**SMALL, "num_key_value_heads": 1},
    "BertForQuestionAnswering": SMALL,
    "T5ForConditionalGeneration": {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1,
                                   "num_heads": 2, "decoder_start_token_id": 0},
    "BartForConditionalGeneration": {**PAIR, "scale_embedding": True},
    "MarianMTModel": PAIR,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_words_are_reached_and_the_loss_grows_by_its_slope(name):
    """In float64, for a small ε: by ε·m·√n times the norm of each sentence's gradient, read by another hook."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = replace_modules(kind._from_config(kind.config_class(**MODELS[name]), attn_implementation="fastgan"))
    model.double().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    ids = torch.tensor([[2, 5, 6, 7, 8], [2, 9, 4, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if name == "BertForQuestionAnswering":
        batch |= {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([2, 2])}
    elif "CausalLM" in name:
        batch["labels"] = ids
    else:
        batch["labels"] = torch.tensor([1, 0]) if "Sequence" in name else torch.tensor([[5, 6, 7, 8]] * 2)
    attack = Attack(model, preset("fgm", radius=1e-4), [0, 1, 2])
    looked_up = []  # a decoder's has another length
    handle = attack.embeddings.register_forward_hook(
        lambda module, arguments, output: looked_up.append(output) if output.shape[1] == 5 else None
    )
    plain = model(**batch).loss
    handle.remove()
    (gradient,) = torch.autograd.grad(plain, looked_up[0])
    losses = []
    for share in attack.passes(batch, lambda: None, 0):
        loss = model(**batch).loss
        (share * loss).backward()
        losses.append(loss.item())
    assert losses[0] == plain.item()
    words = (ids > 2).unsqueeze(-1)
    reach = 1e-4 * attack.unit * words.sum((1, 2)).sqrt()
    expected = float(((gradient * words).norm(dim=(1, 2)) * reach).sum())
    assert losses[1] - losses[0] == pytest.approx(expected, rel=0.01)
    assert expected > 0
