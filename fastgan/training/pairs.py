"""Encoders with a decoder, trained on pairs of texts: what translation and summaries have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastgan.data.corpus import train_bpe
from fastgan.data.grouped import batches_of_like_length, sorted_by_length
from fastgan.training.finetune import FinetuneConfig, Prepared
from fastgan.training.hub import encode, evaluating, from_scratch, load_model, load_tokenizer, most_tokens
from fastgan.training.language import _quiet
from fastgan.training.language_run import check_integers

Pairs = tuple[list[str], list[str]]


@dataclass(frozen=True)
class PairConfig(FinetuneConfig):
    """What both tasks are told."""

    layers: int = 3  # of the encoder, and as many of the decoder
    width: int = 256
    heads: int = 4
    vocab_size: int = 8000  # of the vocabulary that is learnt; --model has its own
    label_smoothing: float = 0.1
    beams: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"layers": 1, "width": 2, "heads": 1, "vocab_size": 1, "beams": 1})
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be an even multiple of heads, got {self.width} and heads = {self.heads}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and less than 1, got {self.label_smoothing}")


def prepare_pairs(
    config: PairConfig,
    train: Pairs,
    validation: Pairs,
    target_length: int,
    measure: Callable[[Any, int], dict[str, float]],
    metric: str,
    say: Callable[[str], None],
) -> Prepared:
    """Model and examples. ``measure((model, tokenizer), beams)`` gives figures; ``metric`` of them chooses the best."""
    from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq

    from fastgan._lm_heads import is_fused
    from fastgan.training.language_trainer import Goal, LanguageTrainer

    both = len(set(zip(*validation, strict=True)) & set(zip(*train, strict=True)))
    if both:
        say(f"{both} of {len(validation[0])} validation pairs are in the training data as well: figures flatter")
    if config.model is not None:
        tokenizer = load_tokenizer(config.model)
        model = load_model(
            AutoModelForSeq2SeqLM, config.model, tokenizer, config.attention, "pairs of texts", dropout=config.dropout
        )
    else:
        tokenizer = shared_bpe([*train[0], *train[1]], config.vocab_size)
        model = small_pair(config, tokenizer)
    length = most_tokens(model, tokenizer, config.length)
    rows, lengths, cut = pair_rows(tokenizer, train, length, min(length, target_length))
    held, held_lengths, held_cut = pair_rows(tokenizer, validation, length, min(length, target_length))
    if cut or held_cut:
        say(f"{cut} training and {held_cut} validation pairs are cut to {length} tokens, their second sides to "
            f"{min(length, target_length)}")  # fmt: skip

    class MeasuredTrainer(LanguageTrainer):
        """Adds the figures of greedy outputs to each evaluation."""

        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            output = super().evaluation_loop(*args, **kwargs)
            assert output.metrics is not None
            prefix = kwargs.get("metric_key_prefix", "eval")
            figures = measure((self.accelerator.unwrap_model(self.model), tokenizer), 1)
            output.metrics.update({f"{prefix}_{name}": figure for name, figure in figures.items()})
            return output

    def finish(network: Any, figures: dict[str, float]) -> dict[str, float]:
        return {f"{name}_beam_{config.beams}": figure
                for name, figure in measure((network, tokenizer), config.beams).items()}  # fmt: skip

    fused = is_fused(model)
    return Prepared(
        model=model,
        tokenizer=tokenizer,
        rows=rows,
        lengths=lengths,
        held_out=sorted_by_length(held, held_lengths),
        collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        goal=Goal(metric, greater=True),
        length=length,
        label="loss per token",
        label_smoothing=config.label_smoothing if fused else 0.0,
        counts={"train": len(rows), "validation": len(held), "train_cut": cut, "validation_cut": held_cut,
                "in_both": both},
        # Adam's second moment forgets sooner, as in all of Transformer translation: gradients change quickly at first.
        arguments={"adam_beta2": 0.98, "label_smoothing_factor": 0.0 if fused else config.label_smoothing},
        finish=finish,
        trainer=MeasuredTrainer,
    )  # fmt: skip


def shared_bpe(texts: Sequence[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of both sides, which ends every text with its end token."""
    from tokenizers import processors

    tokenizer = train_bpe(texts, vocab_size)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return tokenizer


def small_pair(config: PairConfig, tokenizer: Any) -> Any:
    """transformers' Marian at step 0."""
    from transformers import MarianConfig, MarianMTModel

    shape = MarianConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=config.length,
        encoder_layers=config.layers,
        decoder_layers=config.layers,
        encoder_attention_heads=config.heads,
        decoder_attention_heads=config.heads,
        encoder_ffn_dim=4 * config.width,
        decoder_ffn_dim=4 * config.width,
        d_model=config.width,
        dropout=0.1 if config.dropout is None else config.dropout,
        activation_function="relu",
        # The embedding is the output's matrix too: with its scale, inputs and logits both begin near 1.
        init_std=float(config.width**-0.5),
        scale_embedding=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return from_scratch(MarianMTModel, shape, config.attention)


def pair_rows(
    tokenizer: Any, pairs: Pairs, length: int, target_length: int
) -> tuple[list[dict[str, Any]], list[int], int]:
    """Examples, their lengths (both sides), and how many pairs were cut."""
    sources, cut = encode(tokenizer, pairs[0], length)
    targets, cut_too = encode(tokenizer, pairs[1], target_length, "text_target")
    rows = [{"input_ids": source, "labels": target} for source, target in zip(sources, targets, strict=True)]
    return rows, [len(row["input_ids"]) + len(row["labels"]) for row in rows], len(cut | cut_too)


@torch.no_grad()
def write(
    model: str | os.PathLike[str] | tuple[Any, Any],
    texts: Sequence[str],
    *,
    beams: int = 5,
    max_tokens: int | None = None,
    batch_size: int = 64,
    attention: str = "fastgan",
) -> list[str]:
    """The second side of each text, by beam search (greedy with one beam), by transformers' ``generate``.

    ``max_tokens``: at most; None is twice as many as the first side has, and ten.
    ``model``: a folder that :func:`finetune` or transformers wrote, a name on the hub, or a (model, tokenizer) pair.
    Texts longer than the model are cut at its end. Raises ValueError or FileNotFoundError, naming the folder.
    """
    if beams < 1:
        raise ValueError(f"beams must be at least 1, got {beams}")
    found = [""] * len(texts)
    with evaluating(model, "AutoModelForSeq2SeqLM", attention, "pairs of texts") as (network, tokenizer):
        device, length = next(network.parameters()).device, most_tokens(network, tokenizer, 1 << 30)
        for chosen in batches_of_like_length([len(text) for text in texts], batch_size):
            batch = tokenizer([texts[i] for i in chosen], padding=True, truncation=True, max_length=length,
                              return_tensors="pt").to(device)  # fmt: skip
            batch.pop("token_type_ids", None)
            # A translation is rarely twice as long as its source; one that does not end should not go on for ever.
            wanted = 2 * batch["input_ids"].shape[1] + 10 if max_tokens is None else max_tokens
            most = min(wanted, length - 1 if length < 1 << 30 else 1 << 30)
            with _quiet():
                ids = network.generate(**batch, num_beams=beams, do_sample=False, max_new_tokens=most)
            for index, text in zip(chosen, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                found[index] = text.strip()
    return found
