"""transformers' Trainer for ``fastgan.training.pretrain``: what it does not do by itself.

Three things: a checkpoint is written whole or not at all (transformers writes into the folder that it would resume
from), dropout's random numbers are a pure function of (seed, step), and the best weights are chosen by what a
checkpoint holds, so that a run that was killed chooses the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from fastgan.data.blocks import Blocks, make_blocks
from fastgan.data.corpus import Corpus
from fastgan.training.checkpoint import RunError, fsync_folder, replace_file
from fastgan.training.pretrain import PretrainConfig, Pretrained
from fastgan.training.run import Reporter
from fastgan.training.streams import DROPOUT, mixed_seed

_EVALUATED = 1024  # blocks at most: an evaluation must not take longer than the training between two
MANIFEST = "fastgan.json"


# ---- what a history of losses says ----


def evaluations(history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, validation loss) of transformers' log history."""
    return [(int(row["step"]), float(row["eval_loss"])) for row in history if "eval_loss" in row]


def best_of(history: list[dict[str, Any]]) -> tuple[int, float] | None:
    finite = [entry for entry in evaluations(history) if math.isfinite(entry[1])]
    return min(finite, key=lambda entry: (entry[1], entry[0])) if finite else None


def exhausted(history: list[dict[str, Any]], patience: int) -> bool:
    """Whether ``patience`` evaluations in a row were no better than the best before them; never for 0."""
    best = best_of(history)
    return patience > 0 and best is not None and sum(step > best[0] for step, _ in evaluations(history)) >= patience


# ---- checkpoints ----


def _hash(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _seal(folder: Path) -> None:
    """Forces every file to disk, and records their hashes beside them."""
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    replace_file(folder / MANIFEST, json.dumps({path.name: _hash(path) for path in files}, indent=1).encode())
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    fsync_folder(folder)


def _move(source: Path, target: Path) -> None:
    """Gives a sealed folder its name."""
    shutil.rmtree(target, ignore_errors=True)
    os.rename(source, target)
    fsync_folder(target.parent)


def find_checkpoint(folder: Path) -> tuple[Path | None, list[dict[str, Any]]]:
    """The last checkpoint, checked, and its log history; (None, []) if there is none. RunError where it is damaged."""
    found = [path for path in folder.glob("checkpoints/checkpoint-*") if path.name[11:].isdecimal()]
    if not found:
        return None, []
    path = max(found, key=lambda each: int(each.name[11:]))
    check_whole(path)
    return path, json.loads((path / "trainer_state.json").read_bytes())["log_history"]


def check_whole(path: Path) -> None:
    try:
        recorded = json.loads((path / MANIFEST).read_bytes())
        missing = {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} - set(recorded)
        if path.name.startswith("checkpoint") and missing:
            raise ValueError(f"{sorted(missing)[0]} is missing")
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path / MANIFEST}: damaged ({error})") from error
    for name, expected in recorded.items():
        file = path / name
        if not file.is_file() or _hash(file) != expected:
            raise RunError(f"{file}: damaged or changed, its content is not what {MANIFEST} recorded")


class LanguageTrainer(Trainer):
    """Trainer whose checkpoints appear in ``folder/checkpoints`` when they are whole."""

    folder: Path
    _staging: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        place = self.folder / "checkpoints"
        name, saved = f"checkpoint-{self.state.global_step}", place.glob("checkpoint-*")
        _refuse_not_finite(self.model, self.folder, self.state.global_step, any(saved))
        self._staging = place / ".partial"
        if self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.mkdir(parents=True)
        self._wait()
        try:
            super()._save_checkpoint(model, trial)
        finally:
            staging, self._staging = self._staging, None
        self._wait()
        if not self.args.should_save:
            return
        _seal(staging / name)
        _move(staging / name, place / name)
        staging.rmdir()
        best = best_of(self.state.log_history)
        for path in [*place.glob("checkpoint-*"), *self.folder.glob("best-*")]:
            if path.name not in (name, f"best-{best[0]}" if best else ""):
                shutil.rmtree(path, ignore_errors=True)
        write_metrics(self.folder, self.state.log_history)

    def save_best(self) -> None:
        """The weights of this step as the best so far. Older ones stay until the next checkpoint is there."""
        staging = self.folder / ".best.partial"
        shutil.rmtree(staging, ignore_errors=True)
        self.save_model(str(staging), _internal_call=True)
        _seal(staging)
        _move(staging, self.folder / f"best-{self.state.global_step}")

    def _wait(self) -> None:
        self.accelerator.wait_for_everyone()


def _refuse_not_finite(model: Any, folder: Path, step: int, saved: bool) -> None:
    for name, tensor in model.named_parameters():
        if not bool(tensor.isfinite().all()):
            kept = "The last good checkpoint is untouched" if saved else "There was no checkpoint yet"
            raise RunError(f"{folder}: {name} is not finite after step {step}: training has diverged. {kept}")


# ---- the run ----


class _Watch(TrainerCallback):
    """Seeds each step, tells how it goes, keeps the best weights, and stops when asked or when it no longer helps."""

    def __init__(self, config: PretrainConfig, reporter: Reporter, stopping: Callable[[], bool], first: bool) -> None:
        self.config, self.reporter, self.stopping, self.first = config, reporter, stopping, first
        self.trainer: LanguageTrainer
        self.asked = False
        self.figures: dict[str, float] = {}
        self.tokens = config.batch_size * config.gradient_accumulation * config.length

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(
            mixed_seed(self.config.seed, DROPOUT, state.global_step * args.world_size + args.process_index)
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if self.first:
            try:
                self.reporter.update(step, self.figures, self.tokens * args.world_size)
            except BrokenPipeError:
                self.asked = True
        self.asked = self.asked or self.stopping()
        if step == state.max_steps:
            control.should_log = control.should_save = True
            control.should_evaluate = args.eval_strategy != "no"
        elif self.asked:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.figures["loss"] = float(logs["loss"])
            if not math.isfinite(self.figures["loss"]):
                raise RunError(
                    f"{self.trainer.folder}: the loss is {self.figures['loss']} at step {state.global_step}: training "
                    "has diverged; a smaller --lr or a longer --warmup may help. Checkpoints are untouched"
                )

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        history, step = state.log_history, state.global_step
        loss, best = evaluations(history)[-1][1], best_of(history)
        is_best = best is not None and best[0] == step
        if self.first:
            self.figures["validation loss"] = loss
            self.reporter.say(f"step {step}: validation loss {loss:.4f}{', the best so far' if is_best else ''}")
        if self.config.early_stopping:
            if is_best and args.should_save:
                self.trainer.save_best()
            if exhausted(history, self.config.early_stopping):
                control.should_training_stop = True


def train(
    config: PretrainConfig,
    folder: Path,
    corpus: Corpus,
    tokenizer: Any,
    model: Any,
    checkpoint: Path | None,
    reporter: Reporter,
    stopping: Callable[[], bool],
) -> Pretrained:
    """Trains ``model`` from ``checkpoint``, and writes the folder's end where it comes to one."""
    arguments = _arguments(config, folder)
    examples = config.max_steps * config.batch_size * config.gradient_accumulation * arguments.world_size
    kind: dict[str, Any] = {"length": config.length, "objective": config.objective, "seed": config.seed,
                            "mlm_probability": config.mlm_probability}  # fmt: skip
    blocks = make_blocks(corpus, "validation", most=_EVALUATED, **kind)
    held_out: Blocks | None = blocks
    if not len(blocks):
        held_out, arguments.eval_strategy = None, type(arguments.eval_strategy)("no")
        reporter.say("no validation text fills a block: only the training loss is shown")
    watch = _Watch(config, reporter, stopping, arguments.process_index == 0)
    trainer = LanguageTrainer(
        model=model,
        args=arguments,
        train_dataset=make_blocks(corpus, "train", count=examples, **kind),
        eval_dataset=held_out,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(watch)
    trainer.folder, watch.trainer = folder, trainer
    begin = time.monotonic()
    history, step = _history(checkpoint)
    if checkpoint is None or (step < config.max_steps and not exhausted(history, config.early_stopping)):
        if watch.first:
            reporter.start(step, config.max_steps, config.batch_size)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        history, step = trainer.state.log_history, trainer.state.global_step
    else:  # killed between the last checkpoint and the end
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state.log_history, trainer.state.global_step = history, step
    early = exhausted(history, config.early_stopping)
    interrupted = step < config.max_steps and not early
    best, last = best_of(history), evaluations(history)[-1:]
    loss = best[1] if config.early_stopping and best else last[0][1] if last else None
    held = corpus.counts["validation"]
    per_character = None
    if config.objective == "clm" and loss is not None and held["characters"]:
        per_character = loss * held["tokens"] / held["characters"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    result = Pretrained(folder, step, config.max_steps, interrupted, early, loss, per_character, parameters)
    if watch.first:
        write_metrics(folder, history)
        replace_file(folder / "loss.png", _picture(history, config.objective))
        if not interrupted:
            _finish(trainer, tokenizer, result, best, config, time.monotonic() - begin)
    trainer._wait()
    return result


def _arguments(config: PretrainConfig, folder: Path) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    if config.precision == "bfloat16" and cuda and not torch.cuda.is_bf16_supported():
        raise ValueError("precision bfloat16: this GPU does not have it; float16 works")
    reports = [name.strip() for name in config.report_to.split(",") if name.strip() not in ("", "none")]
    if "tensorboard" in reports:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.lr,
        warmup_steps=config.warmup,
        lr_scheduler_type="linear",
        weight_decay=config.weight_decay,
        logging_steps=min(10, config.eval_every),
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=config.eval_every,
        save_strategy="steps",
        save_steps=config.eval_every,
        prediction_loss_only=True,
        train_sampling_strategy="sequential",  # the examples' numbers are the order already
        seed=config.seed,
        data_seed=config.seed,
        bf16=config.precision == "bfloat16",
        fp16=config.precision == "float16",
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        disable_tqdm=True,
        report_to=reports,
    )


def _history(checkpoint: Path | None) -> tuple[list[dict[str, Any]], int]:
    if checkpoint is None:
        return [], 0
    state = json.loads((checkpoint / "trainer_state.json").read_bytes())
    return state["log_history"], int(state["global_step"])


def _finish(
    trainer: LanguageTrainer, tokenizer: Any, result: Pretrained, best: Any, config: PretrainConfig, seconds: float
) -> None:
    """The model into the folder itself, ``model.safetensors`` and then ``result.json`` last."""
    staging = result.folder / ".model.partial"
    shutil.rmtree(staging, ignore_errors=True)
    chosen = result.folder / f"best-{best[0]}" if config.early_stopping and best else None
    if chosen is not None:
        check_whole(chosen)
        from safetensors.torch import load_file

        model: Any = trainer.model
        model.load_state_dict(load_file(chosen / "model.safetensors"), strict=False)  # what is tied is stored once
        model.tie_weights()
    trainer.save_model(str(staging), _internal_call=True)
    tokenizer.model_max_length = config.length
    tokenizer.save_pretrained(staging)
    _seal(staging)
    (staging / MANIFEST).unlink()
    (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle, and run.json says it already
    for path in sorted(staging.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        os.replace(path, result.folder / path.name)
    staging.rmdir()
    document = {**dataclasses.asdict(result), "folder": str(result.folder)}
    replace_file(result.folder / "result.json", (json.dumps(document, indent=1) + "\n").encode())
    if chosen is not None:
        shutil.rmtree(chosen, ignore_errors=True)


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """metrics.jsonl, of what the last checkpoint knows: never ahead of it, never behind."""
    names = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm", "eval_loss": "validation_loss"}
    rows = []
    for entry in history:
        row = {ours: entry[theirs] for theirs, ours in names.items() if theirs in entry}
        if row:
            rows.append(json.dumps({"step": entry["step"], **row}))
    replace_file(folder / "metrics.jsonl", "".join(row + "\n" for row in rows).encode())


def _picture(history: list[dict[str, Any]], objective: str) -> bytes:
    from fastgan.training.language import plot_losses

    losses = [(int(row["step"]), float(row["loss"])) for row in history if "loss" in row]
    label = "masked-word loss" if objective == "mlm" else "next-word loss"
    buffer = io.BytesIO()
    plot_losses(losses, buffer, label, {}, validation=evaluations(history))
    return buffer.getvalue()
