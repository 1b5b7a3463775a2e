"""transformers' language models with their head and loss as one: ``linear_cross_entropy`` instead of logits.

No module swap reaches these losses, which sit in the models' forwards. So the model gets a class of ours, a subclass of
its own with the same name: its forward takes over where it is called with labels in training mode, and passes every
other call on. Being a class, and not a function on the instance, it survives deepcopy, pickle and DataParallel's
replicas. What it computes up to the last hidden state is the model's own base; only the step from there to the loss is
written here, for each class in ``_TABLE``.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutputWithCrossAttentions,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    Seq2SeqLMOutput,
)
from transformers.models.bart.modeling_bart import shift_tokens_right
from transformers.utils.generic import can_return_tuple

from fastgan._hooks import has_hooks
from fastgan.nn._convert import empty
from fastgan.nn.functional import linear_cross_entropy
from fastgan.nn.linear import Linear

Call = dict[str, Any]


@dataclass(frozen=True)
class _Head:
    """How a class comes from its hidden states to its loss.

    Attributes:
        output: the ModelOutput that its forward returns.
        linear: the model → the linear layer to the vocabulary.
        hidden: the model and the call's arguments without labels → the base model's output and the last hidden state.
        features: the model and that state → what the linear layer takes.
        causal: labels are shifted and ``num_items_in_batch`` counts, as in transformers' loss for causal models.
        logits_bias: the name of a buffer (1, V) that is added to the logits.
        on_the_way: names of modules that the original runs and ours goes past; hooks on them would not fire.
        passed_on: what ``output`` takes over from the base model's.
    """

    output: type
    linear: Callable[[Any], Any]
    hidden: Callable[[Any, Call, Tensor], tuple[Any, Tensor]]
    features: Callable[[Any, Tensor], Tensor] = lambda model, hidden: hidden
    causal: bool = False
    logits_bias: str = ""
    on_the_way: tuple[str, ...] = ()
    passed_on: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        names = tuple(each.name for each in fields(self.output) if each.name not in ("loss", "logits"))
        object.__setattr__(self, "passed_on", names)


def _from_base(model: Any, call: Call, labels: Tensor) -> tuple[Any, Tensor]:
    outputs = model.base_model(**call)
    return outputs, outputs[0]


def _from_pair_with_cache(model: Any, call: Call, labels: Tensor) -> tuple[Any, Tensor]:
    _with_decoder_ids(model, call, labels)
    return _from_base(model, call, labels)


def _from_pair(model: Any, call: Call, labels: Tensor) -> tuple[Any, Tensor]:
    """BART's kind: encoder and decoder in one base model."""
    return _from_pair_with_cache(model, call | {"use_cache": False}, labels)


def _from_t5(model: Any, call: Call, labels: Tensor) -> tuple[Any, Tensor]:
    _with_decoder_ids(model, call, labels)
    encoded, mask = call.pop("encoder_outputs", None), call.pop("attention_mask", None)
    ids, embeds = call.pop("input_ids", None), call.pop("inputs_embeds", None)
    decoder = {
        "input_ids": call.pop("decoder_input_ids", None),
        "inputs_embeds": call.pop("decoder_inputs_embeds", None),
        "attention_mask": call.pop("decoder_attention_mask", None),
        "cache": call.pop("cache", None),
        "use_cache": call.pop("use_cache", None),
    }
    if encoded is None:
        encoded = model.encoder(input_ids=ids, inputs_embeds=embeds, attention_mask=mask, **call)
    elif not hasattr(encoded, "last_hidden_state"):  # a tuple
        encoded = BaseModelOutput(encoded[0], *encoded[1:3])
    decoded = model.decoder(encoder_hidden_states=encoded[0], encoder_attention_mask=mask, **decoder, **call)
    outputs = {
        "cache": decoded.cache,
        "decoder_hidden_states": decoded.hidden_states,
        "decoder_attentions": decoded.attentions,
        "cross_attentions": decoded.cross_attentions,
        "encoder_last_hidden_state": encoded.last_hidden_state,
        "encoder_hidden_states": encoded.hidden_states,
        "encoder_attentions": encoded.attentions,
    }
    return outputs, decoded[0]


def _with_decoder_ids(model: Any, call: Call, labels: Tensor) -> None:
    if call.get("decoder_input_ids") is None and call.get("decoder_inputs_embeds") is None:
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            call["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
        else:
            config = model.config
            call["decoder_input_ids"] = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)


def _t5_features(model: Any, hidden: Tensor) -> Tensor:
    # The scale of a head that is tied to the embedding.
    return hidden * model.model_dim**-0.5 if model.config.scale_decoder_outputs else hidden


def _roberta_features(model: Any, hidden: Tensor) -> Tensor:
    return model.lm_head.layer_norm(nn.functional.gelu(model.lm_head.dense(hidden)))


def _distilbert_features(model: Any, hidden: Tensor) -> Tensor:
    return model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))


def _lm_head(model: Any) -> nn.Module:
    return model.lm_head


def _scaled(factor: Callable[[Any], float]) -> _Head:
    """Of logits that are multiplied by a number: the linear layer has no bias, so its input may be instead."""
    return replace(_CAUSAL, features=lambda model, hidden: hidden * factor(model))


_CAUSAL = _Head(CausalLMOutputWithPast, _lm_head, _from_base, causal=True)
_BERT = _Head(
    MaskedLMOutput,
    lambda model: model.cls.predictions.decoder,
    _from_base,
    lambda model, hidden: model.cls.predictions.transform(hidden),
    on_the_way=("cls", "cls.predictions"),
)
_ROBERTA = _Head(
    MaskedLMOutput, lambda model: model.lm_head.decoder, _from_base, _roberta_features, on_the_way=("lm_head",)
)
_T5 = _Head(Seq2SeqLMOutput, _lm_head, _from_t5, _t5_features)
_PAIR = _Head(Seq2SeqLMOutput, _lm_head, _from_pair, logits_bias="final_logits_bias")

#: classes whose forward is that of the one in front, with other names (tests compare the sources)
LIKE = {
    "LlamaForCausalLM": (
        "Apertus Arcee Cwm DiffLlama Ernie4_5 Exaone4 Gemma Glm Glm4 Helium HunYuanDenseV1 Jais2 Lfm2 Ministral "
        "Ministral3 Mistral Nemotron Olmo Olmo2 Olmo3 Persimmon Phi Phi3 Qwen2 Qwen3 Qwen3_5 SeedOss SmolLM3 StableLm "
        "Starcoder2"
    ),
    "CohereForCausalLM": "Cohere2",
    "GraniteForCausalLM": "GraniteSWA",
    "RobertaForMaskedLM": "Camembert Data2VecText RobertaPreLayerNorm XLMRoberta XLMRobertaXL",
    "BertForMaskedLM": "Ernie RoCBert",
    "BartForConditionalGeneration": "Blenderbot BlenderbotSmall MBart Pegasus",
    "T5ForConditionalGeneration": "UMT5",
}
_TABLE: dict[str, _Head] = {
    "GPT2LMHeadModel": _Head(CausalLMOutputWithCrossAttentions, _lm_head, _from_base, causal=True),
    "GPTNeoXForCausalLM": _CAUSAL,
    "GPTJForCausalLM": _CAUSAL,
    "LlamaForCausalLM": _CAUSAL,
    "OPTForCausalLM": _CAUSAL,
    "CohereForCausalLM": _scaled(lambda model: model.logit_scale),
    "GraniteForCausalLM": _scaled(lambda model: 1.0 / model.config.logits_scaling),
    "BertForMaskedLM": _BERT,
    "RobertaForMaskedLM": _ROBERTA,
    "ElectraForMaskedLM": _Head(
        MaskedLMOutput,
        lambda model: model.generator_lm_head,
        _from_base,
        lambda model, hidden: model.generator_predictions(hidden),
    ),
    "DistilBertForMaskedLM": _Head(
        MaskedLMOutput, lambda model: model.vocab_projector, _from_base, _distilbert_features
    ),
    "T5ForConditionalGeneration": _T5,
    "MT5ForConditionalGeneration": _Head(Seq2SeqLMOutput, _lm_head, _from_t5),
    "BartForConditionalGeneration": _PAIR,
    "MarianMTModel": _PAIR,
    "M2M100ForConditionalGeneration": _Head(Seq2SeqLMOutput, _lm_head, _from_pair_with_cache),
}
for _first, _others in LIKE.items():
    _kind = _first[_first.index("For") :]
    _TABLE.update({f"{_name}{_kind}": _TABLE[_first] for _name in _others.split()})
_KINDS = ("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "MTModel")


def is_language_model(model: nn.Module) -> bool:
    """Whether, by its name, it has a language model's head: what ``explain`` gives a row."""
    return isinstance(model, PreTrainedModel) and type(model).__name__.endswith(_KINDS)


def is_fused(model: nn.Module) -> bool:
    return isinstance(model, _Fused)


def why_not(model: nn.Module) -> str:
    """Why the model keeps its own forward; empty if ``fused_class`` has one for it."""
    kind = type(model)
    if kind.__name__ not in _TABLE or not kind.__module__.startswith("transformers.models."):
        return f"no fused loss for {kind.__name__}"
    if "forward" in vars(model):
        return "its forward was overridden on the instance"
    return ""


def _obstacle(model: Any, head: _Head) -> str:
    """Why this call computes the logits nevertheless: looked at in each call, since hooks and heads come and go."""
    linear = head.linear(model)
    if parametrize.type_before_parametrizations(linear) not in (nn.Linear, Linear):
        # PEFT's wrapper of a Linear is called Linear, too.
        package = type(linear).__module__.partition(".")[0]
        own = f"{package}." if type(linear).__name__ == "Linear" else ""
        return f"the head is a {own}{type(linear).__name__}"
    for module in (linear, *(model.get_submodule(name) for name in head.on_the_way)):
        if has_hooks(module):
            return "there are hooks on the head"
        if "forward" in vars(module):
            return "the head's forward was overridden on the instance"
    # Not model.loss_function: for GPT-2 that property logs, which cannot be traced.
    own_loss = getattr(model, "_loss_function", ForCausalLMLoss) is not ForCausalLMLoss
    if head.causal and (own_loss or getattr(model, "loss_type", None) not in (None, "ForCausalLM")):
        return "the model has a loss_function of its own"
    return ""


class _Fused:
    """What the classes made by ``fused_class`` have in common."""

    _original: Any
    _head: _Head

    def __reduce_ex__(self, protocol):
        # The class is made, not found by its name: copies and pickles name the original.
        return empty, (fused_class, self._original), self.__dict__


@functools.cache
def fused_class(original: Any) -> type:
    """The subclass of a transformers class in the table whose forward does without logits."""
    head = _TABLE[original.__name__]
    signature = inspect.signature(original.forward)
    names = list(signature.parameters)[1:]
    # label_smoothing is not shown: what has "label" in its name the Trainer takes for a column that evaluation needs.
    own = [inspect.Parameter("return_logits", inspect.Parameter.KEYWORD_ONLY, default=False)]

    @can_return_tuple
    def forward(self, *args, return_logits=False, label_smoothing=0.0, **kwargs):
        """The model's forward. With ``labels`` in training mode the loss comes straight from the hidden states, and
        ``logits`` is None unless ``return_logits=True``. ``label_smoothing`` holds in training only.
        """
        labels = kwargs["labels"] if "labels" in kwargs else dict(zip(names, args, strict=False)).get("labels")
        kept = kwargs.get("logits_to_keep", 0)
        usual = labels is not None and isinstance(kept, int) and kept == 0 and "past_key_values" not in kwargs
        if not self.training or not usual:
            return original.forward(self, *args, **kwargs)
        why = _obstacle(self, head)
        if why:
            if label_smoothing:
                raise ValueError(f"label_smoothing needs the fused loss, which {original.__name__} cannot use: {why}")
            if not torch.compiler.is_compiling():
                _say(original.__name__, why)
            return original.forward(self, *args, **kwargs)
        call = dict(zip(names, args, strict=False)) | kwargs
        for name in ("labels", "logits_to_keep"):
            call.pop(name, None)
        return _loss(self, head, call, labels, return_logits, label_smoothing)

    # The Trainer reads the signature to know which columns of a data set and which extra arguments it takes.
    parameters = list(signature.parameters.values())
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[*parameters[:at], *own, *parameters[at:]])
    # The same name and module: they are written to config.json and looked up in transformers' tables.
    body = {"forward": forward, "_original": original, "_head": head, "__module__": original.__module__}
    return type(original.__name__, (_Fused, original), body | {"__doc__": original.__doc__})


def _loss(model: Any, head: _Head, call: Call, labels: Any, return_logits: bool, label_smoothing: float) -> Any:
    outputs, hidden = head.hidden(model, dict(call), labels)
    features, linear = head.features(model, hidden), head.linear(model)
    bias = linear.bias
    if head.logits_bias:
        bias = getattr(model, head.logits_bias).reshape(-1).to(features.dtype)
    labels = labels.to(features.device)
    ignore_index, items = -100, None
    if head.causal:
        # Arguments of transformers' own loss, which come in through the forward's **kwargs.
        ignore_index, items = call.get("ignore_index", -100), call.get("num_items_in_batch")
        shifted = call.get("shift_labels")
        # Position n predicts token n + 1, and the last one nothing.
        labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shifted is None else shifted
        labels = labels.to(features.device)
    loss = linear_cross_entropy(
        features,
        linear.weight,
        labels.reshape(features.shape[:-1]),
        bias,
        ignore_index,
        label_smoothing,
        "mean" if items is None else "sum",
    )
    if head.causal:
        loss = loss.float() if loss.dtype != torch.float64 else loss
        if items is not None:
            loss = loss / (items.to(loss.device) if torch.is_tensor(items) else items)
    logits = nn.functional.linear(features, linear.weight, bias) if return_logits else None
    return head.output(loss=loss, logits=logits, **{n: outputs[n] for n in outputs if n in head.passed_on})


@functools.cache
def _say(name: str, why: str) -> None:
    warnings.warn(f"{name} computes its logits: {why}", stacklevel=2)
