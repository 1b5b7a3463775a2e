"""Pretraining a language model in a run folder: BERT by masked words, GPT-2 by the next, ELECTRA by replaced ones.

::

    run.json                    what was asked for, and the hash of the data
    checkpoints/checkpoint-N/   the last checkpoint, as transformers writes them, with the hash of each file
    best-N/                     the best weights so far, where early stopping needs them
    metrics.jsonl  loss.png     losses over the steps
    config.json  model.safetensors  tokenizer.json ...   the model, when it is done; for ``from_pretrained``
    result.json                 figures of the end

The order of the text, masks and dropout are pure functions of (seed, step), so that a run that was killed goes on to
the same weights, bit for bit. Needs ``pip install 'fastgan[text]'``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgan.data.corpus import Corpus, vocabulary_digest
from fastgan.training.checkpoint import RunError
from fastgan.training.hub import from_scratch, gpt2_shape
from fastgan.training.language import _own_generators, _quiet, _register
from fastgan.training.language_run import check_integers, check_settings, held, read_document, refuse_used
from fastgan.training.run import Reporter, Silent, _stop_when_asked
from fastgan.training.run_folder import changed

FORMAT = "fastgan-pretraining"
VERSION = 1
OBJECTIVES = ("mlm", "clm", "rtd")
#: what a resumed run may change; ``data`` only in its place
CHANGEABLE = ("data", "max_steps", "eval_every", "early_stopping", "report_to")


@dataclass(frozen=True)
class PretrainConfig:
    """What ``fastgan pretrain`` is told; every default is here and nowhere else."""

    objective: str
    data: str  # a folder that prepare_text made
    model: str | None = None  # a folder to go on from; its own layers, width and heads hold then
    layers: int = 4
    width: int = 256
    heads: int = 4
    length: int = 128  # tokens of an example
    batch_size: int = 16  # examples of a process at a time
    max_steps: int = 1000
    lr: float = 5e-4
    warmup: int = 100  # steps from 0 to lr; from there it falls linearly to 0
    dropout: float = 0.1
    weight_decay: float = 0.01
    mlm_probability: float = 0.15
    generator_share: float = 0.25  # rtd: of the discriminator's heads and width that its generator has
    rtd_weight: float = 50.0  # rtd: of the discriminator's loss
    precision: str = "float32"
    seed: int = 0
    gradient_accumulation: int = 1
    eval_every: int = 100  # steps between evaluations, which are followed by a checkpoint
    early_stopping: int = 0  # evaluations without a better loss before it stops; 0: never
    report_to: str = "none"  # transformers' integrations, parted by commas: tensorboard, wandb, ...
    attention: str = "fastgan"

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", os.fspath(self.data))
        if self.model is not None:
            object.__setattr__(self, "model", os.fspath(self.model))
        least = {"layers": 1, "width": 1, "heads": 1, "length": 4, "batch_size": 1, "max_steps": 1, "warmup": 0,
                 "gradient_accumulation": 1, "eval_every": 1, "early_stopping": 0, "seed": 0}  # fmt: skip
        check_integers(self, least)
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got width = {self.width} and heads = {self.heads}")
        check_settings(self)
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"mlm_probability must be between 0 and 1, got {self.mlm_probability}")
        if not 0 < self.generator_share <= 1:
            raise ValueError(f"generator_share must be more than 0 and at most 1, got {self.generator_share}")
        if not (self.rtd_weight > 0 and math.isfinite(self.rtd_weight)):
            raise ValueError(f"rtd_weight must be positive and finite, got {self.rtd_weight}")
        if self.objective == "rtd" and self.model is not None:
            raise ValueError("model cannot be gone on from with objective rtd, which begins from scratch")


@dataclass(frozen=True)
class Pretrained:
    """How a run ended. ``validation_loss`` is the kept weights' (nats per token), None without validation text."""

    folder: Path
    step: int
    total: int
    interrupted: bool = False
    stopped_early: bool = False
    validation_loss: float | None = None
    validation_loss_per_character: float | None = None  # causal models only
    parameters: int = 0
    figures: dict[str, float] = dataclasses.field(default_factory=dict)  # rtd: each player's, of the last evaluation


def pretrain(config: PretrainConfig, out: str | os.PathLike[str], *, reporter: Reporter | None = None) -> Pretrained:
    """Pretrains a model in the new folder ``out`` (which may exist, empty).

    SIGINT, SIGTERM and SIGHUP end it after the current step, saved. Raises RunError, ValueError, FileNotFoundError or
    OSError, each naming the file or the argument.
    """
    folder = Path(out)
    refuse_used(folder)
    return _run(config, folder, None, None, reporter or Silent())


def resume_pretrain(
    out: str | os.PathLike[str], changes: dict[str, Any] | None = None, *, reporter: Reporter | None = None
) -> Pretrained:
    """Goes on with the run in ``out`` from its last checkpoint, to the same weights as if it had never stopped.

    ``changes`` may name the fields of ``CHANGEABLE`` (another ``max_steps`` is another learning rate from there on,
    since it falls to 0 at the end); others must be as they were. A finished run is left as it is.
    """
    folder = Path(out)
    document = read_document(folder, FORMAT, VERSION, "pretraining")
    try:
        before = PretrainConfig(**document["config"])
    except (TypeError, ValueError, KeyError) as error:
        raise RunError(f"{folder / 'run.json'}: damaged ({error})") from error
    config = changed(before, changes, CHANGEABLE, folder)
    from fastgan.training.language_trainer import LOSS, find_checkpoint

    checkpoint, history = find_checkpoint(folder)
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint is not None else 0
    done = step >= config.max_steps or LOSS.exhausted(history, config.early_stopping)
    if done and (folder / "result.json").exists():
        saved = json.loads((folder / "result.json").read_text())
        return Pretrained(**{**saved, "folder": folder, "total": config.max_steps})
    return _run(config, folder, checkpoint, document, reporter or Silent())


def _run(
    config: PretrainConfig, folder: Path, checkpoint: Path | None, document: dict[str, Any] | None, reporter: Reporter
) -> Pretrained:
    corpus = Corpus(config.data)
    if document is not None and document.get("data_sha256") != corpus.digest():
        raise RunError(f"{config.data}: holds other text or another vocabulary than the run in {folder} was begun with")
    _register(config.attention)
    with _own_generators(config.seed), _quiet():
        tokenizer = corpus.tokenizer()
        _check(config, corpus, tokenizer)
        model = make_model(config, corpus, tokenizer)
        asked = {"format": FORMAT, "version": VERSION, "config": dataclasses.asdict(config),
                 "data_sha256": corpus.digest()}  # fmt: skip
        with held(folder, asked):
            from fastgan.training.language_trainer import train

            with _stop_when_asked() as stopping:
                return train(config, folder, corpus, tokenizer, model, checkpoint, reporter, stopping)


def _check(config: PretrainConfig, corpus: Corpus, tokenizer: Any) -> None:
    if config.objective != "clm" and tokenizer.mask_token_id is None:
        raise ValueError(f"{config.data}: its tokenizer has no mask token, which objective {config.objective} needs")
    body = config.length - (2 if config.objective != "clm" and tokenizer.cls_token_id is not None else 0)
    tokens = corpus.counts["train"]["tokens"]
    if tokens < body:
        raise ValueError(f"{config.data}: its {tokens:,} tokens do not fill one block of length {config.length}")
    if config.early_stopping and corpus.counts["validation"]["tokens"] < body:
        raise ValueError(
            f"early_stopping needs validation text; {config.data} holds out only "
            f"{corpus.counts['validation']['tokens']:,} tokens, less than a block of {config.length}"
        )


def make_model(config: PretrainConfig, corpus: Corpus, tokenizer: Any) -> Any:
    """BERT, GPT-2 or ELECTRA's two at step 0, from torch's generator; or that of ``config.model``, once checked."""
    from fastgan.replace import replace_modules

    if config.model is not None:
        model = _given_model(config, corpus, tokenizer)
        return replace_modules(model) if config.attention == "fastgan" else model
    if config.objective == "rtd":
        from fastgan.training.rtd import make_players

        return make_players(config, corpus.vocabulary, tokenizer.pad_token_id)
    if config.objective == "mlm":
        from transformers import BertConfig, BertForMaskedLM

        settings = BertConfig(
            vocab_size=corpus.vocabulary,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            max_position_embeddings=config.length,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            # BERT's 0.02 is made for a width of 768; as small a number starves the attention of a narrow model.
            initializer_range=config.width**-0.5,
            pad_token_id=tokenizer.pad_token_id,
        )
        return from_scratch(BertForMaskedLM, settings, config.attention)
    else:
        from transformers import GPT2LMHeadModel

        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        causal = gpt2_shape(config, corpus.vocabulary, config.dropout, end, tokenizer.pad_token_id)
        return from_scratch(GPT2LMHeadModel, causal, config.attention)


def _given_model(config: PretrainConfig, corpus: Corpus, tokenizer: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    kind = AutoModelForMaskedLM if config.objective == "mlm" else AutoModelForCausalLM
    folder = Path(str(config.model))
    if not folder.is_dir():
        raise FileNotFoundError(2, "no such folder; a model of the hub must be downloaded first", str(folder))
    try:
        model = kind.from_pretrained(
            folder, attn_implementation=config.attention, local_files_only=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{folder}: holds no model for objective {config.objective} ({first})") from error
    if model.config.vocab_size < corpus.vocabulary:
        raise ValueError(
            f"{folder}: the model's vocabulary has {model.config.vocab_size:,} tokens, fewer than the "
            f"{corpus.vocabulary:,} of {config.data}"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and config.length > positions:
        raise ValueError(f"length must be at most {positions}, the positions of {folder}, got {config.length}")
    if (folder / "tokenizer.json").exists():
        own = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if vocabulary_digest(own) != vocabulary_digest(tokenizer):
            raise ValueError(
                f"{config.data}: was made with another tokenizer than that of {folder}; make it anew with "
                f"fastgan prepare text --tokenizer {folder}"
            )
    return model
