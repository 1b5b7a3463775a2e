"""A small BERT from nothing, on two cores: pretraining by masked words, guesses, fine-tuning to tell classes apart.

The models, the collator and the training loop are transformers' own; fastgan's part is the attention implementation,
registered by ``fastgan.hf`` and chosen with ``attn_implementation="fastgan"``. Needs ``pip install 'fastgan[text]'``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from fastgan.data.text import list_of_texts, pack, split_by_hash

Guess = tuple[str, float]


@dataclass
class Pretraining:
    """What :func:`pretrain_bert` measured; ``loss.json`` in its folder holds the same.

    ``history`` is (step, mean loss of the steps since the entry before); ``validation_before`` and
    ``validation_after`` are losses on held-out blocks under one fixed choice of masked words; ``guesses`` maps each
    probe to its best words before and after.
    """

    folder: str
    steps: int
    seconds: float
    parameters: int
    history: list[tuple[int, float]]
    validation_before: float
    validation_after: float
    guesses: dict[str, dict[str, list[Guess]]] = field(default_factory=dict)


@dataclass
class Finetuning:
    """What :func:`finetune_classifier` measured: accuracy on held-out sentences beside that of always guessing the
    commonest class."""

    folder: str
    steps: int
    seconds: float
    history: list[tuple[int, float]]
    accuracy: float
    commonest: float
    training_sentences: int
    validation_sentences: int


def pretrain_bert(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    out: str | os.PathLike[str],
    layers: int = 2,
    width: int = 128,
    heads: int = 4,
    length: int = 64,
    batch_size: int = 16,
    steps: int = 1000,
    lr: float = 2e-3,
    dropout: float = 0.0,
    mlm_probability: float = 0.15,
    validation: float = 0.05,
    probes: Sequence[str] = (),
    seed: int = 0,
    attn_implementation: str = "fastgan",
    progress: bool = False,
) -> Pretraining:
    """Pretrain a BERT by predicting masked words, with transformers' ``BertForMaskedLM`` and ``Trainer``.

    Args:
        texts: paragraphs or documents; packed into blocks of ``length`` tokens.
        tokenizer: a fast tokenizer with a mask token, such as :func:`fastgan.data.text.train_tokenizer` makes.
        out: folder for the model and tokenizer (``from_pretrained`` reads it), ``loss.json`` and ``loss.png``.
        layers, width, heads: of the encoder; its inner width is four times ``width``.
        length, batch_size, steps, lr: blocks of a batch, and AdamW with a warm-up of a tenth of the steps and a
            linear decay.
        dropout: in hidden states and attention.
        mlm_probability: how many of the tokens are to be predicted.
        validation: share of the texts that is held out, chosen by hash.
        probes: texts with one mask each, guessed before and after.
        seed: of the weights, the order, the masks. Python's, numpy's and torch's own generators are left as they were.
        attn_implementation: ``"fastgan"``, or one of transformers' own.
        progress: a bar on a terminal, a line for each entry of the history elsewhere.

    Raises ValueError for texts that do not fill a block, or a width that ``heads`` does not divide.
    """
    from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling

    if width % heads:
        raise ValueError(f"width must be a multiple of heads, got width={width} and heads={heads}")
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token")
    _register(attn_implementation)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model_max_length = length

    texts = list_of_texts(texts)
    training, held_out = split_by_hash(texts, validation)
    if not training:  # one text alone, and its hash says to hold it out
        training, held_out = held_out, []
    blocks = _blocks(tokenizer, [texts[index] for index in training], length)
    try:
        held_out_blocks = _blocks(tokenizer, [texts[index] for index in held_out], length)
    except ValueError:  # too little text to hold a whole block out
        held_out_blocks = blocks[:0]

    with _own_generators(seed), _quiet():
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=length,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            # BERT's 0.02 is made for a width of 768; as small a number starves the attention of a narrow model.
            initializer_range=width**-0.5,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = BertForMaskedLM._from_config(config, attn_implementation=attn_implementation)
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability)
        before = _masked_loss(model, collator, held_out_blocks, seed)
        guesses = {probe: {"before": fill_mask((model, tokenizer), probe)} for probe in probes}
        started = time.perf_counter()
        history = _run_trainer(model, collator, blocks, folder, batch_size, steps, lr, seed, progress)
        seconds = time.perf_counter() - started
        after = _masked_loss(model, collator, held_out_blocks, seed)
        for probe in probes:
            guesses[probe]["after"] = fill_mask((model, tokenizer), probe)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    result = Pretraining(str(folder), steps, seconds, parameters, history, before, after, guesses)
    (folder / "loss.json").write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")
    plot_losses(
        history, folder / "loss.png", "masked-word loss", {"held out, before": before, "held out, after": after}
    )
    return result


def _blocks(tokenizer: Any, texts: list[str], length: int) -> torch.Tensor:
    # A text longer than the model is what pack() is for, so the tokenizer's warning about it says nothing.
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return pack(ids, length, tokenizer.cls_token_id, tokenizer.sep_token_id)


def _run_trainer(
    model: Any,
    collator: Any,
    blocks: torch.Tensor,
    folder: Path,
    batch_size: int,
    steps: int,
    lr: float,
    seed: int,
    progress: bool,
) -> list[tuple[int, float]]:
    from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        weight_decay=0.01,
        warmup_steps=max(1, steps // 10),
        lr_scheduler_type="linear",
        logging_steps=max(1, steps // 40),
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )
    attention_mask = torch.ones_like(blocks[0])
    examples = [{"input_ids": block, "attention_mask": attention_mask} for block in blocks]
    trainer = Trainer(model=model, args=arguments, data_collator=collator, train_dataset=examples)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    with _bar("pretraining", steps, progress) as advance:
        trainer.add_callback(_progress_callback(advance))
        trainer.train()
    return [(int(entry["step"]), float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry]


def _progress_callback(advance: Any) -> Any:
    from transformers import TrainerCallback

    class Advance(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            advance(state.global_step, None)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                advance(state.global_step, float(logs["loss"]))

    return Advance()


@torch.no_grad()
def _masked_loss(model: Any, collator: Any, blocks: torch.Tensor, seed: int) -> float:
    """Mean loss over the masked tokens of ``blocks``, the same tokens masked in every call; NaN for no blocks."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    total, count = 0.0, 0
    with _own_generators(seed + 1):
        for chunk in blocks.split(32):
            batch = collator([{"input_ids": block} for block in chunk])
            masked = int((batch["labels"] != -100).sum())
            if masked:
                loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
                total, count = total + float(loss) * masked, count + masked
    model.train(training)
    return total / count if count else math.nan


def fill_mask(model: str | os.PathLike[str] | tuple[Any, Any], text: str, top: int = 5) -> list[Guess]:
    """The ``top`` best words for the one mask in ``text`` with their probabilities, best first.

    ``model``: a folder that ``from_pretrained`` reads, or a (model, tokenizer) pair. Raises ValueError if ``text``
    does not hold exactly one mask token.
    """
    if isinstance(model, tuple):
        network, tokenizer = model
    else:
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(model)
            network = AutoModelForMaskedLM.from_pretrained(model)
    device = next(network.parameters()).device
    inputs = tokenizer(text, return_tensors="pt", truncation=True).to(device)
    where = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten()
    if len(where) != 1:
        raise ValueError(f"text must hold one {tokenizer.mask_token}, got {len(where)} in {text!r}")
    training = network.training
    network.eval()
    with torch.no_grad():
        probabilities = network(**inputs).logits[0, where[0]].float().softmax(-1)
    network.train(training)
    best = probabilities.topk(min(top, len(probabilities)))
    words = tokenizer.convert_ids_to_tokens(best.indices.tolist())
    return list(zip(words, best.values.tolist(), strict=True))


def finetune_classifier(
    model_dir: str | os.PathLike[str],
    sentences: Sequence[str],
    labels: Sequence[int],
    *,
    out: str | os.PathLike[str],
    label_names: Sequence[str] | None = None,
    epochs: int = 8,
    batch_size: int = 16,
    lr: float = 5e-4,
    length: int | None = None,
    validation: float = 0.2,
    seed: int = 0,
    attn_implementation: str = "fastgan",
    progress: bool = False,
) -> Finetuning:
    """Fine-tune a BERT to tell sentences' classes apart: tokenizer and labels in, ``outputs.loss`` and ``.logits`` out.

    ``model_dir`` is a folder (or name) that ``from_pretrained`` reads, ``labels`` are 0 to K - 1. About ``validation``
    of the sentences, chosen by hash so that equal ones stay together, are held out and give the accuracy. ``out``
    receives model, tokenizer, ``loss.json`` and ``loss.png``. Raises ValueError for unequal lengths, labels that are
    not 0 to K - 1, or a side of the split without a sentence.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if len(sentences) != len(labels):
        raise ValueError(f"as many labels as sentences are needed, got {len(labels)} and {len(sentences)}")
    classes = len(label_names) if label_names is not None else max(labels, default=-1) + 1
    if not labels or min(labels) < 0 or max(labels) >= classes:
        raise ValueError(f"labels must be 0 to {classes - 1}, got {sorted(set(labels))}")
    names = list(label_names) if label_names is not None else [str(label) for label in range(classes)]
    training, held_out = split_by_hash(sentences, validation)
    if not training or not held_out:
        raise ValueError(f"{len(training)} sentences to train on and {len(held_out)} to validate on: both must be some")
    _register(attn_implementation)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    history: list[tuple[int, float]] = []
    with _own_generators(seed), _quiet():
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        model = AutoModelForSequenceClassification.from_pretrained(
            model_dir,
            num_labels=classes,
            id2label=dict(enumerate(names)),
            label2id={name: label for label, name in enumerate(names)},
            attn_implementation=attn_implementation,
        ).to(device)
        limit = min(length or 10**9, model.config.max_position_embeddings, tokenizer.model_max_length)

        def batch(indices: Sequence[int]) -> Any:
            texts = [sentences[index] for index in indices]
            return tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(device)

        steps = epochs * math.ceil(len(training) / batch_size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
        warmup = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        )
        started = time.perf_counter()
        model.train()
        recent: list[float] = []
        with _bar("fine-tuning", steps, progress) as advance:
            for _ in range(epochs):
                for chunk in torch.randperm(len(training)).split(batch_size):
                    chosen = [training[index] for index in chunk.tolist()]
                    target = torch.tensor([labels[index] for index in chosen], device=device)
                    outputs = model(**batch(chosen), labels=target)
                    outputs.loss.backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                    recent.append(float(outputs.loss.detach()))
                    step = (history[-1][0] if history else 0) + len(recent)
                    advance(step, None)
                    if len(recent) == max(1, steps // 40) or step == steps:
                        history.append((step, sum(recent) / len(recent)))
                        advance(step, history[-1][1])
                        recent.clear()
        model.eval()
        right = 0
        with torch.no_grad():
            for start in range(0, len(held_out), 64):
                chosen = held_out[start : start + 64]
                logits = model(**batch(chosen)).logits
                right += int((logits.argmax(-1).cpu() == torch.tensor([labels[index] for index in chosen])).sum())
        seconds = time.perf_counter() - started
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    held_out_labels = [labels[index] for index in held_out]
    commonest_class = max(range(classes), key=[labels[index] for index in training].count)
    result = Finetuning(
        str(folder),
        steps,
        seconds,
        history,
        accuracy=right / len(held_out),
        commonest=held_out_labels.count(commonest_class) / len(held_out),
        training_sentences=len(training),
        validation_sentences=len(held_out),
    )
    (folder / "loss.json").write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")
    plot_losses(history, folder / "loss.png", "classification loss", {})
    return result


def plot_losses(
    history: Sequence[tuple[int, float]],
    path: str | os.PathLike[str] | IO[bytes],
    label: str,
    levels: dict[str, float],
    validation: Sequence[tuple[int, float]] = (),
    more: dict[str, Sequence[tuple[int, float]]] | None = None,
) -> None:
    """Draw a loss curve as a PNG, with horizontal lines at the finite ``levels`` and ``more`` curves by their names; no
    display is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([step for step, _ in history], [loss for _, loss in history], label=label)
    if validation:
        axes.plot([step for step, _ in validation], [loss for _, loss in validation], label="validation")
    for name, curve in (more or {}).items():
        axes.plot([step for step, _ in curve], [loss for _, loss in curve], label=name)
    for number, (name, level) in enumerate(levels.items()):
        if math.isfinite(level):
            axes.axhline(level, linestyle="--", linewidth=1, color=f"C{number + 1}", label=f"{name}: {level:.2f}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


def _register(attn_implementation: str) -> None:
    if attn_implementation == "fastgan":
        import fastgan.hf  # noqa: F401  registers the implementation


@contextlib.contextmanager
def _own_generators(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's generators for the enclosed code, and put them back afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks on new heads and its bars for loading: both are expected here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _bar(name: str, steps: int, wanted: bool) -> Iterator[Any]:
    """A function advance(step, loss or None): a bar on a terminal, lines elsewhere, nothing where not wanted."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not wanted:
        yield lambda step, loss: None
    elif not console.is_terminal:
        lines = 0

        def line(step: int, loss: float | None) -> None:
            nonlocal lines
            if loss is not None and (step * 8 // steps > lines or step == steps):
                lines = step * 8 // steps
                console.print(f"{name}: step {step}/{steps}, loss {loss:.3f}", highlight=False)

        yield line
    else:
        columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"))
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task("", total=steps, loss="-")

            def move(step: int, loss: float | None) -> None:
                if loss is None:
                    bar.update(task, completed=step)
                else:
                    bar.update(task, completed=step, loss=f"{loss:.3f}")

            yield move
