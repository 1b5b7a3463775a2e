"""Translation: an encoder and decoder from scratch on parallel lines, or a pretrained pair fine-tuned on them.

    from fastgan.training.finetune import finetune
    from fastgan.training.translate import TRANSLATE, TranslateConfig, translate

    config = TranslateConfig(train=("train.de", "train.en"), validation=("val.de", "val.en"), from_scratch="small")
    finetune(TRANSLATE, config, "runs/de-en")
    translate("runs/de-en", ["Ein Hund läuft."])

From scratch it is transformers' Marian with one byte-level BPE vocabulary for both sides, learnt on the training files,
and one embedding for encoder, decoder and output. Labels are smoothed in the fused head, where the logits are never
stored. The best weights are those with the best BLEU of greedy translations of the validation file; what the result
reports is their BLEU with beam search.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fastgan.data.corpus import train_bpe
from fastgan.data.labelled import read_pairs
from fastgan.metrics import bleu
from fastgan.metrics.results import Evaluation
from fastgan.metrics.translation import _sacrebleu
from fastgan.training.finetune import FinetuneConfig, Prepared, Task
from fastgan.training.hub import load_model, load_tokenizer, most_tokens
from fastgan.training.language import _own_generators, _quiet
from fastgan.training.language_run import check_integers


@dataclass(frozen=True)
class TranslateConfig(FinetuneConfig):
    """What ``fastgan finetune translate`` is told. Defaults suit some ten thousand sentences, from scratch."""

    train: tuple[str, str] = ("", "")  # source and target, line by line parallel, plain or .gz
    validation: tuple[str, str] = ("", "")
    layers: int = 3  # of the encoder, and as many of the decoder
    width: int = 256
    heads: int = 4
    vocab_size: int = 8000  # of the vocabulary that is learnt; --model has its own
    label_smoothing: float = 0.1
    beams: int = 5
    epochs: int = 15
    batch_size: int = 64
    lr: float = 1e-3
    dropout: float | None = 0.3
    length: int = 100
    average: int = 5

    FILES: ClassVar[tuple[str, ...]] = ("train", "validation")

    def __post_init__(self) -> None:
        for name in self.FILES:
            value = getattr(self, name)
            if isinstance(value, str) or len(value) != 2 or not all(value):
                raise ValueError(f"{name} must name two files, source and target")
        super().__post_init__()
        check_integers(self, {"layers": 1, "width": 2, "heads": 1, "vocab_size": 1, "beams": 1})
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be an even multiple of heads, got {self.width} and heads = {self.heads}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and less than 1, got {self.label_smoothing}")


def _prepare(config: TranslateConfig, say: Callable[[str], None]) -> Prepared:
    from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq

    from fastgan._lm_heads import is_fused
    from fastgan.data.grouped import sorted_by_length
    from fastgan.training.language_trainer import Goal, LanguageTrainer

    _sacrebleu()  # that it is missing is said before the work, not after the first epoch
    train, validation = read_pairs(*config.train), read_pairs(*config.validation)
    both = len(set(zip(*validation, strict=True)) & set(zip(*train, strict=True)))
    if both:
        say(f"{both} of {len(validation[0])} validation pairs are in the training files as well: figures flatter")
    if config.model is not None:
        tokenizer = load_tokenizer(config.model)
        model = load_model(
            AutoModelForSeq2SeqLM, config.model, tokenizer, config.attention, "translation", dropout=config.dropout
        )
    else:
        tokenizer = shared_bpe([*train[0], *train[1]], config.vocab_size)
        model = _small(config, tokenizer)
    length = most_tokens(model, tokenizer, config.length)
    rows, lengths, cut = _rows(tokenizer, train, length)
    held, held_lengths, held_cut = _rows(tokenizer, validation, length)
    if cut or held_cut:
        say(f"{cut} training and {held_cut} validation pairs are cut to {length} tokens")

    class BleuTrainer(LanguageTrainer):
        """Adds BLEU of greedy translations to each evaluation."""

        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            output = super().evaluation_loop(*args, **kwargs)
            assert output.metrics is not None
            score = _bleu(self.accelerator.unwrap_model(self.model), 1)
            output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_bleu"] = score
            return output

    def _bleu(network: Any, beams: int) -> float:
        lines = translate((network, tokenizer), validation[0], beams=beams)
        return bleu(lines, [validation[1]], samples=0)["BLEU"]

    fused = is_fused(model)
    counts = {"train": len(rows), "validation": len(held), "train_cut": cut, "validation_cut": held_cut,
              "in_both": both}  # fmt: skip
    return Prepared(
        model=model,
        tokenizer=tokenizer,
        rows=rows,
        lengths=lengths,
        held_out=sorted_by_length(held, held_lengths),
        collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        goal=Goal("bleu", greater=True),
        length=length,
        label="loss per token",
        label_smoothing=config.label_smoothing if fused else 0.0,
        counts=counts,
        # Adam's second moment forgets sooner, as in all of Transformer translation: gradients change quickly at first.
        arguments={"adam_beta2": 0.98, "label_smoothing_factor": 0.0 if fused else config.label_smoothing},
        finish=lambda network, figures: {f"bleu_beam_{config.beams}": _bleu(network, config.beams)},
        trainer=BleuTrainer,
    )


TRANSLATE = Task("translate", TranslateConfig, _prepare)


def shared_bpe(texts: Sequence[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of both languages, which ends every text with its end token."""
    from tokenizers import processors

    tokenizer = train_bpe(texts, vocab_size)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return tokenizer


def _small(config: TranslateConfig, tokenizer: Any) -> Any:
    from transformers import MarianConfig, MarianMTModel

    from fastgan.replace import replace_modules

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
        dropout=config.dropout or 0.0,
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
    model: Any = MarianMTModel._from_config(shape, attn_implementation=config.attention)
    return replace_modules(model) if config.attention == "fastgan" else model


def _rows(
    tokenizer: Any, pairs: tuple[list[str], list[str]], length: int
) -> tuple[list[dict[str, Any]], list[int], int]:
    """Examples, their lengths (both sides), and how many pairs were cut."""
    sides, cut = [], set()
    for name, texts in zip(("text", "text_target"), pairs, strict=True):
        whole = tokenizer(**{name: texts}, verbose=False)["input_ids"]
        for number, ids in enumerate(whole):
            if len(ids) > length:
                cut.add(number)
                whole[number] = tokenizer(**{name: texts[number]}, truncation=True, max_length=length)["input_ids"]
        sides.append(whole)
    rows = [{"input_ids": source, "labels": target} for source, target in zip(*sides, strict=True)]
    return rows, [len(row["input_ids"]) + len(row["labels"]) for row in rows], len(cut)


@torch.no_grad()
def translate(
    model: str | os.PathLike[str] | tuple[Any, Any],
    texts: Sequence[str],
    *,
    beams: int = 5,
    batch_size: int = 64,
    attention: str = "fastgan",
) -> list[str]:
    """The translation of each text, by beam search (greedy with one beam), by transformers' ``generate``.

    ``model``: a folder that :func:`finetune` or transformers wrote, a name on the hub, or a (model, tokenizer) pair.
    Texts longer than the model are cut at its end. Raises ValueError or FileNotFoundError, naming the folder.
    """
    from transformers import AutoModelForSeq2SeqLM

    if beams < 1:
        raise ValueError(f"beams must be at least 1, got {beams}")
    if isinstance(model, tuple):
        network, tokenizer = model
    else:
        with _quiet(), _own_generators(0):
            name = os.fspath(model)
            tokenizer = load_tokenizer(name)
            network = load_model(AutoModelForSeq2SeqLM, name, tokenizer, attention, "translation", whole=True)
        network.to("cuda" if torch.cuda.is_available() else "cpu")
    training, device = network.training, next(network.parameters()).device
    network.eval()
    length = most_tokens(network, tokenizer, 1 << 30)
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    found = [""] * len(texts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer([texts[i] for i in chosen], padding=True, truncation=True, max_length=length,
                          return_tensors="pt").to(device)  # fmt: skip
        batch.pop("token_type_ids", None)
        # A translation is rarely twice as long as its source; a model that does not end should not go on for ever.
        most = min(2 * batch["input_ids"].shape[1] + 10, length - 1 if length < 1 << 30 else 1 << 30)
        with _quiet():
            ids = network.generate(**batch, num_beams=beams, do_sample=False, max_new_tokens=most)
        for index, text in zip(chosen, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            found[index] = text.strip()
    network.train(training)
    return found


def evaluate_translate(
    model: str | os.PathLike[str],
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    beams: int = 5,
    samples: int = 1000,
) -> tuple[Evaluation, list[str]]:
    """BLEU and chrF2 (sacrebleu, cased) of a model's translations of ``source``, and the translations.

    Raises ValueError (TextError for what the files hold) or FileNotFoundError, naming the file or folder.
    """
    from fastgan.metrics import chrf

    texts, references = read_pairs(source, target)
    lines = translate(model, texts, beams=beams)
    measured = [measure(lines, [references], samples=samples).results for measure in (bleu, chrf)]
    return Evaluation([result for results in measured for result in results]), lines
