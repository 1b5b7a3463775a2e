"""transformers' Trainer for pretraining and fine-tuning: what it does not do by itself.

A checkpoint is written whole or not at all (transformers writes into the folder that it would resume from), dropout's
random numbers are a pure function of (seed, step), the best weights are chosen by what a checkpoint holds, so that a
run that was killed chooses the same, and every label of a step counts alike however the step was cut into batches.

The seam for extra passes and second players: ``Job.trainer`` names the subclass of :class:`LanguageTrainer` that runs,
whose ``compute_loss`` and ``training_step`` are transformers' own hooks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
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
_PLAYERS = ("generator_loss", "discriminator_loss")  # of a run with two, beside the loss that is their sum


# ---- what a history of losses says ----


@dataclass(frozen=True)
class Goal:
    """The figure of an evaluation by which the best weights are chosen."""

    metric: str = "loss"
    greater: bool = False

    def evaluations(self, history: list[dict[str, Any]]) -> list[tuple[int, float]]:
        """(step, figure) of transformers' log history."""
        name = f"eval_{self.metric}"
        return [(int(row["step"]), float(row[name])) for row in history if name in row]

    def best(self, history: list[dict[str, Any]]) -> tuple[int, float] | None:
        """The best evaluation, the earliest of equals."""
        finite = [entry for entry in self.evaluations(history) if math.isfinite(entry[1])]
        sign = -1 if self.greater else 1
        return min(finite, key=lambda entry: (sign * entry[1], entry[0])) if finite else None

    def exhausted(self, history: list[dict[str, Any]], patience: int) -> bool:
        """Whether ``patience`` evaluations in a row were no better than the best before them; never for 0."""
        best = self.best(history)
        return patience > 0 and best is not None and sum(s > best[0] for s, _ in self.evaluations(history)) >= patience


LOSS = Goal()


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
    goal: Goal = LOSS
    label_smoothing: float = 0.0
    average: int = 0
    _staging: Path | None = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the labels of a step, that is of all its batches and processes.

        Causal models take the number of labels themselves. Others accept the argument and leave it unread: their mean
        over the batch would be summed over the batches of a step as it is.
        """
        kind = type(self.accelerator.unwrap_model(self.model)).__name__
        if self._loss_shifts_labels or kind.endswith(("ForCausalLM", "LMHeadModel")) or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        if self.label_smoothing and model.training:
            inputs = {**inputs, "label_smoothing": self.label_smoothing}
        smoother = self.label_smoother
        if not model.training:
            self.label_smoother = None  # a validation loss is the plain one
        try:
            loss, outputs = super().compute_loss(model, inputs, True)
        finally:
            self.label_smoother = smoother
        if num_items_in_batch is not None:
            share = labels.ne(-100).sum() / num_items_in_batch
            loss = loss * (share * self.accelerator.num_processes)  # gradients are averaged over processes
        return (loss, outputs) if return_outputs else loss

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
        best = self.goal.best(self.state.log_history)
        kept = {name, f"best-{best[0]}" if best else "", *recent(self.goal, self.state.log_history, self.average)}
        for path in [*place.glob("checkpoint-*"), *self.folder.glob("best-*"), *self.folder.glob("recent-*")]:
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)
        write_metrics(self.folder, self.state.log_history)

    def save_weights(self, name: str) -> None:
        """The weights of this step as a folder of that name. Older ones stay until the next checkpoint is there."""
        staging = self.folder / ".weights.partial"
        shutil.rmtree(staging, ignore_errors=True)
        self.save_model(str(staging), _internal_call=True)
        _seal(staging)
        _move(staging, self.folder / name)

    def load_weights(self, folder: Path) -> None:
        """Of a folder that ``save_weights`` wrote."""
        from safetensors.torch import load_file

        model: Any = self.model
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)  # what is tied is stored once
        model.tie_weights()

    def export(self, folder: Path) -> None:
        """The model as it is in the end, for ``from_pretrained``."""
        self.save_model(str(folder), _internal_call=True)

    def _wait(self) -> None:
        self.accelerator.wait_for_everyone()


def _refuse_not_finite(model: Any, folder: Path, step: int, saved: bool) -> None:
    for name, tensor in model.named_parameters():
        if not bool(tensor.isfinite().all()):
            kept = "The last good checkpoint is untouched" if saved else "There was no checkpoint yet"
            raise RunError(f"{folder}: {name} is not finite after step {step}: training has diverged. {kept}")


# ---- the run ----


@dataclass
class Job:
    """What is to be trained, on what, and how it is judged.

    Attributes:
        folder: the run's.
        model: at step 0.
        arguments: transformers'.
        train, held_out: examples; those of training in the order in which they are seen, as many as all steps take.
        seed: of dropout.
        amount: of tokens or examples that a process sees in a step, for the report.
        goal: what the best weights are chosen by.
        keep_best: whether they are what the run ends with.
        patience: evaluations without a better figure before it stops; 0: never.
        collator, measure: transformers' ``data_collator`` and ``compute_metrics``.
        label_smoothing: of a fused loss.
        average: evaluations whose weights are kept for ``try_average``.
        trainer: the class that trains.
    """

    folder: Path
    model: Any
    arguments: TrainingArguments
    train: torch.utils.data.Dataset
    held_out: torch.utils.data.Dataset | None
    seed: int
    amount: int
    goal: Goal = LOSS
    keep_best: bool = False
    patience: int = 0
    collator: Any = None
    measure: Any = None
    label_smoothing: float = 0.0
    average: int = 0
    trainer: type[LanguageTrainer] = LanguageTrainer


@dataclass
class Ended:
    """How a job ended; ``best`` and ``last`` are (step, figure) of evaluations."""

    trainer: LanguageTrainer
    history: list[dict[str, Any]]
    step: int
    early: bool
    interrupted: bool
    first: bool
    best: tuple[int, float] | None
    last: tuple[int, float] | None


class _Watch(TrainerCallback):
    """Seeds each step, tells how it goes, keeps the best weights, and stops when asked or when it no longer helps."""

    def __init__(self, job: Job, reporter: Reporter, stopping: Callable[[], bool], first: bool) -> None:
        self.job, self.reporter, self.stopping, self.first = job, reporter, stopping, first
        self.trainer: LanguageTrainer
        self.asked = False
        self.figures: dict[str, float] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(mixed_seed(self.job.seed, DROPOUT, state.global_step * args.world_size + args.process_index))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if self.first:
            try:
                self.reporter.update(step, self.figures, self.job.amount * args.world_size)
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
        goal, history, step = self.job.goal, state.log_history, state.global_step
        figure, best = goal.evaluations(history)[-1][1], goal.best(history)
        is_best = best is not None and best[0] == step
        if self.first:
            self.figures[f"validation {goal.metric}"] = figure
            said = f"step {step}: validation {goal.metric} {figure:.4f}"
            if goal.metric != "loss":
                said += f", loss {LOSS.evaluations(history)[-1][1]:.4f}"
            self.reporter.say(f"{said}{', the best so far' if is_best else ''}")
        if is_best and self.job.keep_best and args.should_save:
            self.trainer.save_weights(f"best-{step}")
        if self.job.average > 1 and args.should_save:
            self.trainer.save_weights(f"recent-{step}")
        if goal.exhausted(history, self.job.patience):
            control.should_training_stop = True


def run_job(job: Job, checkpoint: Path | None, reporter: Reporter, stopping: Callable[[], bool]) -> Ended:
    """Trains from ``checkpoint``, or from the beginning, until it is done or asked to stop."""
    arguments = job.arguments
    watch = _Watch(job, reporter, stopping, arguments.process_index == 0)
    trainer = job.trainer(
        model=job.model,
        args=arguments,
        train_dataset=job.train,
        eval_dataset=job.held_out,
        data_collator=job.collator,
        compute_metrics=job.measure,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(watch)
    trainer.folder, trainer.goal, trainer.average = job.folder, job.goal, job.average
    trainer.label_smoothing = job.label_smoothing
    watch.trainer = trainer
    history, step = _history(checkpoint)
    total = arguments.max_steps
    if checkpoint is None or (step < total and not job.goal.exhausted(history, job.patience)):
        if watch.first:
            reporter.start(step, total, arguments.per_device_train_batch_size)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        history, step = trainer.state.log_history, trainer.state.global_step
    else:  # killed between the last checkpoint and the end
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state.log_history, trainer.state.global_step = history, step
    early = job.goal.exhausted(history, job.patience)
    last = job.goal.evaluations(history)[-1:]
    return Ended(
        trainer=trainer,
        history=history,
        step=step,
        early=early,
        interrupted=step < total and not early,
        first=watch.first,
        best=job.goal.best(history),
        last=last[0] if last else None,
    )


def recent(goal: Goal, history: list[dict[str, Any]], count: int) -> list[str]:
    """The names of the folders of the last ``count`` evaluations' weights."""
    return [f"recent-{step}" for step, _ in goal.evaluations(history)[-count:]] if count > 1 else []


def try_average(job: Job, ended: Ended) -> dict[str, Any] | None:
    """Where the mean of the last weights does better than the best: its figures, itself as ``best-average``."""
    from safetensors.torch import load_file

    trainer, model = ended.trainer, ended.trainer.accelerator.unwrap_model(ended.trainer.model)
    trainer._wait()
    folders = [job.folder / name for name in recent(job.goal, ended.history, job.average)]
    folders = [folder for folder in folders if folder.is_dir()]
    if len(folders) < 2 or ended.best is None:
        return None
    mean: dict[str, torch.Tensor] = {}
    for folder in folders:
        check_whole(folder)
        for name, tensor in load_file(folder / "model.safetensors").items():
            mean[name] = mean[name] + tensor.double() if name in mean else tensor.double()
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: (total / len(folders)).to(dtypes[name]) for name, total in mean.items()}, strict=False)
    model.tie_weights()
    figures = trainer.evaluation_loop(trainer.get_eval_dataloader(), "Evaluation", metric_key_prefix="eval").metrics
    figure = float((figures or {})[f"eval_{job.goal.metric}"])
    if not math.isfinite(figure) or (figure <= ended.best[1] if job.goal.greater else figure >= ended.best[1]):
        return None
    if ended.first:
        trainer.save_weights("best-average")
    return figures


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
    """Pretrains ``model`` from ``checkpoint``, and writes the folder's end where it comes to one."""
    arguments = make_arguments(
        config, folder, max_steps=config.max_steps, warmup=config.warmup, eval_every=config.eval_every
    )
    examples = config.max_steps * config.batch_size * config.gradient_accumulation * arguments.world_size
    kind: dict[str, Any] = {"length": config.length, "objective": config.objective, "seed": config.seed,
                            "mlm_probability": config.mlm_probability}  # fmt: skip
    blocks = make_blocks(corpus, "validation", most=_EVALUATED, **kind)
    held_out: Blocks | None = blocks
    if not len(blocks):
        held_out, arguments.eval_strategy = None, type(arguments.eval_strategy)("no")
        reporter.say("no validation text fills a block: only the training loss is shown")
    job = Job(
        folder=folder,
        model=model,
        arguments=arguments,
        train=make_blocks(corpus, "train", count=examples, **kind),
        held_out=held_out,
        seed=config.seed,
        amount=config.batch_size * config.gradient_accumulation * config.length,
        keep_best=config.early_stopping > 0,
        patience=config.early_stopping,
        trainer=_trainer(config.objective),
    )
    ended = run_job(job, checkpoint, reporter, stopping)
    chosen = ended.best if config.early_stopping and ended.best else ended.last
    loss = chosen[1] if chosen else None
    held = corpus.counts["validation"]
    per_character = None
    if config.objective == "clm" and loss is not None and held["characters"]:
        per_character = loss * held["tokens"] / held["characters"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    figures = {}
    if config.objective == "rtd" and chosen:
        entry = next(row for row in ended.history if row["step"] == chosen[0] and "eval_loss" in row)
        figures = {name: value for name, value in figures_of(entry).items() if name != "loss"}
    result = Pretrained(
        folder, ended.step, config.max_steps, ended.interrupted, ended.early, loss, per_character, parameters, figures
    )
    if ended.first:
        label = {"mlm": "masked-word loss", "clm": "next-word loss", "rtd": "loss of both"}[config.objective]
        write_end(job, ended, tokenizer, config.length, label)
        if not ended.interrupted:
            write_result(folder, result)
    ended.trainer._wait()
    return result


def _trainer(objective: str) -> type[LanguageTrainer]:
    if objective != "rtd":
        return LanguageTrainer
    from fastgan.training.rtd import RtdTrainer

    return RtdTrainer


def make_arguments(
    config: Any, folder: Path, *, max_steps: int, warmup: int, eval_every: int, **others: Any
) -> TrainingArguments:
    """transformers' arguments. ``config`` has batch_size, gradient_accumulation, lr, weight_decay, precision, seed and
    report_to; ``others`` go over what is set here."""
    cuda = torch.cuda.is_available()
    if config.precision == "bfloat16" and cuda and not torch.cuda.is_bf16_supported():
        raise ValueError("precision bfloat16: this GPU does not have it; float16 works")
    reports = [name.strip() for name in config.report_to.split(",") if name.strip() not in ("", "none")]
    if "tensorboard" in reports:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": max_steps,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "learning_rate": config.lr,
        "warmup_steps": warmup,
        "lr_scheduler_type": "linear",
        "weight_decay": config.weight_decay,
        "logging_steps": min(10, eval_every),
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps",
        "eval_steps": eval_every,
        "save_strategy": "steps",
        "save_steps": eval_every,
        "prediction_loss_only": True,
        "train_sampling_strategy": "sequential",  # the examples' numbers are the order already
        "seed": config.seed,
        "data_seed": config.seed,
        "bf16": config.precision == "bfloat16",
        "fp16": config.precision == "float16",
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "disable_tqdm": True,
        "report_to": reports,
    }
    return TrainingArguments(**(settings | others))


def _history(checkpoint: Path | None) -> tuple[list[dict[str, Any]], int]:
    if checkpoint is None:
        return [], 0
    state = json.loads((checkpoint / "trainer_state.json").read_bytes())
    return state["log_history"], int(state["global_step"])


def write_end(job: Job, ended: Ended, tokenizer: Any, length: int, label: str) -> None:
    """The figures and their curve, and, where the run is done, the model; its result is then to be written."""
    write_metrics(job.folder, ended.history)
    replace_file(job.folder / "loss.png", picture(ended.history, label))
    if not ended.interrupted:
        write_model(job, ended, tokenizer, length)


def write_model(job: Job, ended: Ended, tokenizer: Any, length: int) -> None:
    """The model (the best, where that is kept) into the run's folder itself, ``model.safetensors`` last."""
    folder, trainer = job.folder, ended.trainer
    staging = folder / ".model.partial"
    shutil.rmtree(staging, ignore_errors=True)
    if job.keep_best and ended.best:
        chosen = folder / "best-average"
        if not chosen.is_dir():
            chosen = folder / f"best-{ended.best[0]}"
        if chosen.is_dir():
            check_whole(chosen)
        else:  # a finished run that was lengthened, and did no better: the folder itself has the best
            chosen = folder
        trainer.load_weights(chosen)
    staging.mkdir()
    trainer.export(staging)
    tokenizer.model_max_length = length
    for place in [path for path in staging.iterdir() if path.is_dir()]:  # of a second player
        tokenizer.save_pretrained(place)
        _seal(place)
        (place / MANIFEST).unlink()
        _move(place, folder / place.name)
    tokenizer.save_pretrained(staging)
    _seal(staging)
    (staging / MANIFEST).unlink()
    (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle, and run.json says it already
    for path in sorted(staging.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        os.replace(path, folder / path.name)
    staging.rmdir()


def write_result(folder: Path, result: Any) -> None:
    """``result.json``, the last file of a run; then the best weights, which the folder itself has, are deleted."""
    document = {**dataclasses.asdict(result), "folder": str(folder)}
    replace_file(folder / "result.json", (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    for path in [*folder.glob("best-*"), *folder.glob("recent-*")]:
        shutil.rmtree(path, ignore_errors=True)


def figures_of(entry: dict[str, Any]) -> dict[str, float]:
    """What an evaluation measured, without how long it took."""
    timing = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    named = {name.removeprefix("eval_"): float(value) for name, value in entry.items() if name.startswith("eval_")}
    return {name: value for name, value in named.items() if name not in timing}


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """metrics.jsonl, of what the last checkpoint knows: never ahead of it, never behind."""
    names = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm",
             **{name: name for name in (*_PLAYERS, "accuracy")}}  # fmt: skip
    rows = []
    for entry in history:
        row = {ours: entry[theirs] for theirs, ours in names.items() if theirs in entry}
        row |= {f"validation_{name}": value for name, value in figures_of(entry).items()}
        if row:
            rows.append(json.dumps({"step": entry["step"], **row}))
    replace_file(folder / "metrics.jsonl", "".join(row + "\n" for row in rows).encode())


def picture(history: list[dict[str, Any]], label: str) -> bytes:
    """The losses of training and validation, as a PNG; each player's, where there are two."""
    from fastgan.training.language import plot_losses

    two = {name.replace("_", " "): [(int(row["step"]), float(row[name])) for row in history if name in row]
           for name in _PLAYERS}  # fmt: skip
    two |= {f"validation {name.replace('_', ' ')}": Goal(name).evaluations(history) for name in _PLAYERS}
    losses = [(int(row["step"]), float(row["loss"])) for row in history if "loss" in row]
    buffer = io.BytesIO()
    if any(two.values()):
        # One is fifty times the other's weight, so that their sum says little.
        (label, losses), *others = two.items()
        # ELECTRA's validation losses are the players' own; a classifier's is that of its labels.
        own = [] if two["validation generator loss"] else LOSS.evaluations(history)
        plot_losses(losses, buffer, label, {}, validation=own, more=dict(others))
    else:
        plot_losses(losses, buffer, label, {}, validation=LOSS.evaluations(history))
    return buffer.getvalue()
