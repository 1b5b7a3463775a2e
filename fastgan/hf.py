"""Hugging Face transformers: importing this module registers the attention implementation ``"fastgan"``.

    import fastgan.hf
    model = AutoModel.from_pretrained("bert-base-uncased", attn_implementation="fastgan")

or, on a model that is there, ``model.set_attn_implementation("fastgan")`` (and ``"eager"`` back). Where transformers
was imported before fastgan, ``import fastgan`` registers by itself. Needs transformers 5.24 or newer.

``fastgan.replace_modules(model)`` also fuses the head and the loss of the language models listed in
``fastgan._lm_heads``: called with labels in training mode they return ``loss`` and ``logits=None``, and logits too with
``return_logits=True``; ``label_smoothing=0.1`` is an argument of the same call. Linear layers of models that generate
text, and GPT-2's GELU, become those of ``fastgan._hf_layers``.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from fastgan._hf_sinks import SINKS_ALONE, attention_with_sink, sink_of
from fastgan.nn import _attention_inputs, functional
from fastgan.nn._functional.attention import _attention_with_logsumexp

MINIMUM = (5, 24)
_HOW = "pip install 'transformers>=5.24' (or fastgan[text])"

try:
    import transformers
except ImportError as error:
    raise ImportError(f"fastgan.hf needs transformers, which could not be imported ({error}): {_HOW}") from error
if (
    tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in transformers.__version__.split(".")[:2])
    < MINIMUM
):
    raise ImportError(f"fastgan.hf needs transformers 5.24 or newer, found {transformers.__version__}: {_HOW}")

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel  # noqa: E402
from transformers.masking_utils import eager_mask, sdpa_mask  # noqa: E402
from transformers.utils import output_capturing  # noqa: E402

from fastgan import _hf_layers, _lm_heads  # noqa: E402, F401  replace_modules finds them


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: query (B, H, L, E), key and value (B, K, S, E) -> ((B, L, H, E), maps or None).

    ``attention_mask`` is boolean (True takes part) or added to the scores, and broadcasts to (B, H, L, S). K may divide
    H: grouped heads are read in place, not repeated. Where attention maps are asked for they are computed as in plain
    PyTorch, and the output from them. Sinks (``s_aux``, ``sinks``) are ``_hf_sinks``'; keys that the model has chosen
    (``indices``, ``block_indices``) are a mask. Raises ValueError for ``softcap``, which the kernel does not have.

    A flattened batch, ``DataCollatorWithFlattening(return_flash_attn_kwargs=True)``, says by cu_seq_lens_q,
    cu_seq_lens_k, max_length_q and max_length_k where its sequences are, and only the scores within them are computed.
    Its mask says the same and is not read; one that hides a token from itself, padding, is refused by ValueError (not
    looked for on CUDA or under torch.compile).
    """
    if kwargs.get("softcap") is not None:
        raise ValueError("attn_implementation='fastgan' does not support softcap; use 'eager' for this model")
    sink = sink_of(query, kwargs)
    rows, columns = query.shape[2], key.shape[2]
    sequences = _sequences(module, query, value, attention_mask, position_bias, is_causal, kwargs)
    if sequences is not None:
        dropout_p = float(dropout) if module.training else 0.0
        return _within_sequences(query, key, value, sequences, dropout_p, scaling), None
    if attention_mask is not None and attention_mask.shape[-1] > columns:
        attention_mask = attention_mask[..., :columns]
    if is_causal is None:
        # Those of transformers' own modules that do not say so (LayoutLM, Splinter, MarkupLM, ...) are encoders'; of
        # others it is assumed, as for "sdpa".
        is_causal = getattr(module, "is_causal", not type(module).__module__.startswith("transformers."))
    # A mask that was made holds causality already; one query is the last position, which sees everything.
    is_causal = bool(is_causal) and attention_mask is None and rows > 1
    attention_mask = _and_chosen(module, attention_mask, columns, query, kwargs)
    if is_causal and columns > rows:
        # The last of the queries alone (Gemma 4 cuts the others off where only the last logits are wanted): for a cache
        # of fixed length, whose first step also has more columns, there is a mask.
        lower = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
        attention_mask = lower[None, None] if attention_mask is None else attention_mask & lower
        is_causal = False
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    dropout = float(dropout) if module.training else 0.0
    weights = None
    arguments = (query, key, value, attention_mask, position_bias, dropout, is_causal, scaling)
    if _maps_are_wanted(kwargs):
        output, weights = _with_maps(*arguments, sink)
    elif sink is not None:
        output = attention_with_sink(_attention, *arguments, sink)
    else:
        output = _attention(*arguments)
    return output.transpose(1, 2).contiguous(), weights


def _and_chosen(module, mask, columns, query, kwargs) -> Tensor | None:
    """The mask, less what the model's indexer has not chosen.

    Models of sparse attention (DeepSeek-V3.2 and what follows it, MiniMax-M3) make that mask themselves for "eager" and
    "sdpa" alone, and hand their choice to any other function: (B, L, keys), or blocks, which their indexer knows.
    """
    blocks, indices = kwargs.get("block_indices"), kwargs.get("indices")
    if blocks is not None:
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(columns - query.shape[2], columns, device=query.device)
        positions = positions.reshape(-1, query.shape[2]).expand(query.shape[0], -1)
        return module.indexer.build_block_mask(blocks, mask, columns, query.dtype, query.device, positions) == 0
    if indices is None:
        return mask
    chosen = torch.zeros((*indices.shape[:2], columns), dtype=torch.bool, device=query.device)
    chosen = chosen.scatter(-1, indices.long(), True).unsqueeze(1)
    if mask is None:
        return chosen
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, float("-inf"))


def _sequences(module, query, value, mask, position_bias, is_causal, kwargs) -> tuple | None:
    """Where the sequences of a flattened batch are, and whether they are causal; None: by the mask, if at all.

    So it is where a mask says more than that: a window, chunks, a bias.
    """
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    where = [kwargs.get(name) for name in names]
    if any(kwargs.get(name) is not None for name in ("s_aux", "sinks", "indices", "block_indices")):
        return None
    is_causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if any(given is None for given in where) or is_causal is None or position_bias is not None:
        return None
    config = getattr(module, "config", None)
    for reach in (kwargs.get("sliding_window"), getattr(config, "attention_chunk_size", None)):
        if reach is not None and reach < where[3]:
            return None
    if _maps_are_wanted(kwargs) or not _attention_inputs.has_varlen_kernel(query, value):
        return None
    if mask is not None:
        if mask.dtype != torch.bool:
            return None
        if (
            mask.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and not mask.diagonal(dim1=-2, dim2=-1).all()
        ):
            raise ValueError(
                "attn_implementation='fastgan': an attention_mask that hides tokens came with cu_seq_lens_q; a "
                "flattened batch has no padding, and takes one or the other"
            )
    return (*where[:2], *(int(length) for length in where[2:]), bool(is_causal))


def _within_sequences(query, key, value, sequences, dropout, scaling) -> Tensor:
    """(B, H, L, E) as one row of tokens, (B · L, H, E), which is how it lies in memory -> (B, L, H, E)."""
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    *where, is_causal = sequences
    output = functional.varlen_attention(
        *flat, *where, scale=scaling, enable_gqa=True, is_causal=is_causal, dropout_p=dropout
    )
    return output.unflatten(0, (query.shape[0], query.shape[2]))


def _attention(query, key, value, mask, bias, dropout, is_causal, scaling) -> Tensor:
    if mask is not None and bias is not None:
        if mask.dtype == torch.bool:
            # T5: a boolean mask (B, 1, L, S) and a learned bias (1, H, L, S). The operator takes both; joined they
            # would be one (B, H, L, S) tensor, kept for the backward.
            results = _attention_with_logsumexp(query, key, value, mask, bias, dropout, is_causal, scaling)
            if results is not None:
                return results[0]
            bias = torch.where(mask, bias, float("-inf"))
        else:
            bias = bias + mask
        mask = None
    joined = mask if bias is None else bias
    return functional.scaled_dot_product_attention(
        query, key, value, joined, dropout, is_causal, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )


def _maps_are_wanted(kwargs: dict) -> bool:
    """Whether this call's attention maps will be collected.

    transformers collects them with hooks on the attention modules; the module itself is not told. A map that is not
    returned would leave an empty tuple in the model's output.
    """
    if kwargs.get("output_attentions"):
        return True
    if torch.compiler.is_compiling():
        return False  # the hooks' context variable cannot be traced, so transformers collects nothing either
    collected = output_capturing._active_collector.get()
    return collected is not None and any("attentions" in name for name in collected)


def _with_maps(query, key, value, mask, bias, dropout, is_causal, scaling, sink) -> tuple[Tensor, Tensor]:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3)) * scaling
    if bias is not None:
        scores = scores + bias
    if is_causal:
        below = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~below, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if sink is not None:
        scores = torch.cat([scores, sink], -1)
    # In a row with nothing to attend to, softmax of -inf alone would be NaN; it is zero, as in the kernel.
    dead = (scores == float("-inf")).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(dead, 0.0), -1, dtype=torch.float32).to(query.dtype)
    weights = weights.masked_fill(dead, 0.0)
    weights = weights if sink is None else weights[..., :-1]
    weights = torch.nn.functional.dropout(weights, dropout)
    return weights @ value, weights


@torch.compiler.assume_constant_result
def _is_written_for_sdpa(configuration: str) -> bool:
    """Whether a model of the file beside this configuration's says that SDPA may run it."""
    modeling = sys.modules.get(configuration.replace(".configuration_", ".modeling_"))
    return modeling is not None and any(
        value._supports_sdpa
        for value in vars(modeling).values()
        if isinstance(value, type) and issubclass(value, PreTrainedModel) and value.__module__ == modeling.__name__
    )


def attention_mask(*, config=None, **kwargs) -> Tensor | None:
    """The mask that a model's attention gets, (B, 1, L, S).

    transformers' sdpa mask: True takes part, and None where it would say nothing, or only "causal" of as many queries
    as keys, which the attention module says then. Models that SDPA may not run get the eager mask, which is added to
    scores: some never say that they are causal (PegasusX), some add the mask themselves and never ask for an attention
    function (BLOOM, MPT, XGLM), or add to it (DeepSeek-V4).
    """
    if kwargs["q_length"] not in (1, kwargs["kv_length"]):
        kwargs["allow_is_causal_skip"] = False
    written_for_it = config is None or config.model_type in SINKS_ALONE or _is_written_for_sdpa(type(config).__module__)
    make = sdpa_mask if written_for_it else eager_mask
    return make(config=config, **kwargs)


def register() -> None:
    """Register ``attn_implementation="fastgan"``: the function, and the mask that goes with it.

    Without the mask function transformers makes no mask at all, and a causal model sees the future.
    """
    AttentionInterface.register("fastgan", attention_forward)
    AttentionMaskInterface.register("fastgan", attention_mask)


register()
