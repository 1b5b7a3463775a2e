"""Fine-tuning in a run folder, which resumes bit for bit: what the tasks have in common.

::

    run.json                    what was asked for, and the hashes of the files
    checkpoints/checkpoint-N/   the last checkpoint
    best-N/                     the weights that did best on the validation file so far
    metrics.jsonl  loss.png     figures over the steps
    config.json  model.safetensors  tokenizer.json ...   the best model, when it is done; for ``from_pretrained``
    result.json                 figures of the end

A task is a :class:`Task`: ``fastgan.training.sentiment`` is the plainest. Needs ``pip install 'fastgan[text]'``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fastgan.adversarial import attach, make
from fastgan.data.corpus import vocabulary_digest
from fastgan.training.checkpoint import RunError
from fastgan.training.language import _own_generators, _quiet, _register
from fastgan.training.language_run import (
    check_integers,
    check_settings,
    first_process,
    held,
    processes,
    read_document,
    refuse_used,
)
from fastgan.training.run import Reporter, Silent, _stop_when_asked
from fastgan.training.run_folder import changed

if TYPE_CHECKING:
    from fastgan.training.language_trainer import Ended, Goal, LanguageTrainer

FORMAT = "fastgan-finetuning"
VERSION = 1
SIZES = ("small",)
#: what a resumed run may change
CHANGEABLE = ("epochs", "max_steps", "eval_every", "early_stopping", "report_to")


@dataclass(frozen=True)
class FinetuneConfig:
    """What every ``fastgan finetune`` is told; a task's own defaults are in its subclass."""

    model: str | None = None  # a folder, or a name on the hub
    from_scratch: str | None = None  # or a model of this size, with nothing learnt yet
    epochs: int = 2
    max_steps: int = 0  # stop there, before the epochs are over; 0: never
    batch_size: int = 16  # examples of a process at a time
    lr: float = 5e-5
    warmup: float = 0.1  # share of the steps, from 0 to lr; from there it falls linearly to 0
    weight_decay: float = 0.01
    dropout: float | None = None  # None: the model's own
    length: int = 128  # tokens of a text at most
    precision: str = "float32"
    seed: int = 0
    gradient_accumulation: int = 1
    eval_every: int = 0  # steps between evaluations, each with a checkpoint; 0: an epoch
    early_stopping: int = 0  # evaluations without a better figure before it stops; 0: never
    average: int = 0  # the mean of the weights of the last so many evaluations is tried in the end
    report_to: str = "none"  # transformers' integrations, parted by commas: tensorboard, wandb, ...
    attention: str = "fastgan"
    adversary: str | None = None  # one of fastgan.adversarial.names(); what follows is None for as the method has it
    adversary_steps: int | None = None
    adversary_radius: float | None = None  # of the mean norm of a word vector, a token
    adversary_lr: float | None = None
    adversary_norm: str | None = None
    adversary_weight: float | None = None
    adversary_masks: str | None = None

    #: fields that name a file or a data set of the hub, or several, whose content a resumed run must find unchanged
    FILES: ClassVar[tuple[str, ...]] = ()
    #: those of them that may be None
    OPTIONAL_FILES: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name in self.FILES:
            if not getattr(self, name):
                raise ValueError(f"{name} must name a file")
        for name in (*self.FILES, *self.OPTIONAL_FILES, "model"):
            value = getattr(self, name)
            if isinstance(value, (tuple, list)):
                object.__setattr__(self, name, tuple(map(os.fspath, value)))
            elif value is not None:
                object.__setattr__(self, name, os.fspath(value))
        least = {"epochs": 1, "max_steps": 0, "batch_size": 1, "length": 4, "seed": 0, "gradient_accumulation": 1,
                 "eval_every": 0, "early_stopping": 0, "average": 0}  # fmt: skip
        check_integers(self, least)
        check_settings(self)
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be at least 0 and less than 1 (a share of the steps), got {self.warmup}")
        if (self.model is None) == (self.from_scratch is None):
            raise ValueError("model: either a model to begin with, or from_scratch with a size, is needed")
        if self.from_scratch is not None and self.from_scratch not in SIZES:
            raise ValueError(f"from_scratch must be one of {', '.join(SIZES)}, got {self.from_scratch!r}")
        make(self)

    def paths(self) -> list[str]:
        values = [getattr(self, name) or () for name in (*self.FILES, *self.OPTIONAL_FILES)]
        return [path for value in values for path in ([value] if isinstance(value, str) else value)]


@dataclass(frozen=True)
class Finetuned:
    """How a run ended. ``figures`` are the kept weights' on the validation file, and what to compare them with."""

    folder: Path
    step: int
    total: int
    interrupted: bool = False
    stopped_early: bool = False
    best_step: int | None = None  # whose weights are kept
    averaged: bool = False  # they are the mean of several evaluations' weights instead
    parameters: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # examples, truncated ones, those in both files


@dataclass
class Prepared:
    """What a task makes of a configuration: a model at step 0, and examples for transformers' collator.

    ``rows`` and ``held_out`` are examples, ``lengths`` the tokens of each of ``rows``. ``finish`` is called with the
    kept model and its figures, and gives more for the result.
    """

    model: Any
    tokenizer: Any
    rows: Sequence[dict[str, Any]]
    lengths: Sequence[int]
    held_out: Sequence[dict[str, Any]]
    collator: Any
    goal: Goal
    length: int
    label: str  # of the curve
    measure: Any = None
    label_smoothing: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    levels: dict[str, float] = field(default_factory=dict)
    finish: Callable[[Any, dict[str, float]], dict[str, float]] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    trainer: type[LanguageTrainer] | None = None


@dataclass(frozen=True)
class Task:
    """A kind of fine-tuning: its name, its configuration, and ``prepare(config, say)``.

    ``prepare`` is a pure function of the configuration and its files: a resumed run calls it again.
    """

    name: str
    config: type[FinetuneConfig]
    prepare: Callable[[Any, Callable[[str], None]], Prepared]


def finetune(
    task: Task, config: FinetuneConfig, out: str | os.PathLike[str], *, reporter: Reporter | None = None
) -> Finetuned:
    """Fine-tunes a model in the new folder ``out`` (which may exist, empty).

    SIGINT, SIGTERM and SIGHUP end it after the current step, saved. Raises RunError, ValueError (TextError for what a
    file holds), FileNotFoundError or OSError, each naming the file or the argument.
    """
    refuse_used(Path(out))
    return _run(task, config, Path(out), None, None, reporter or Silent())


def resume_finetune(
    task: Task,
    out: str | os.PathLike[str],
    changes: dict[str, Any] | None = None,
    *,
    reporter: Reporter | None = None,
) -> Finetuned:
    """Goes on with the run in ``out`` from its last checkpoint, to the same weights as if it had never stopped.

    ``changes`` may name the fields of ``CHANGEABLE``. A finished run is left as it is.
    """
    folder = Path(out)
    document = read_document(folder, FORMAT, VERSION, "fine-tuning")
    if document.get("task") != task.name:
        raise RunError(f"{folder}: is a run of {document.get('task')}, not {task.name}")
    try:
        before = task.config(**document["config"])
    except (TypeError, ValueError, KeyError) as error:
        raise RunError(f"{folder / 'run.json'}: damaged ({error})") from error
    config = changed(before, changes, CHANGEABLE, folder)
    if (folder / "result.json").exists() and config == before:
        saved = json.loads((folder / "result.json").read_bytes())
        return Finetuned(**{**saved, "folder": folder})
    from fastgan.training.language_trainer import find_checkpoint

    checkpoint, _ = find_checkpoint(folder)
    return _run(task, config, folder, checkpoint, document, reporter or Silent())


def _run(
    task: Task,
    config: FinetuneConfig,
    folder: Path,
    checkpoint: Path | None,
    document: dict[str, Any] | None,
    reporter: Reporter,
) -> Finetuned:
    from fastgan.training.hub_sets import localise

    local = localise(config, task.name)  # names of the hub become files
    named = zip(config.paths(), local.paths(), strict=True)
    # Two splits of a data set have one name.
    digests = {given if given == path else f"{given} ({os.path.basename(path)})": _digest(path)
               for given, path in named}  # fmt: skip
    for path, digest in digests.items():
        if document is not None and document.get("files", {}).get(path) != digest:
            raise RunError(f"{path}: is not what the run in {folder} was begun with")
    _register(config.attention)
    asked: dict[str, Any] = {"format": FORMAT, "version": VERSION, "task": task.name,
                             "config": dataclasses.asdict(config), "files": digests}  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(_own_generators(config.seed))
        stack.enter_context(_quiet())
        prepared = attach(task.prepare(local, reporter.say), local, reporter.say)
        asked["vocabulary_sha256"] = vocabulary_digest(prepared.tokenizer)
        if document is not None and document.get("vocabulary_sha256") != asked["vocabulary_sha256"]:
            raise RunError(f"{folder}: the tokenizer is another than when this run was begun")
        stack.enter_context(held(folder, asked))
        if first_process():
            (folder / "result.json").unlink(missing_ok=True)  # of a finished run that is lengthened: not finished now
        stopping = stack.enter_context(_stop_when_asked())
        return _train(config, folder, prepared, checkpoint, reporter, stopping)


def _train(
    config: FinetuneConfig,
    folder: Path,
    prepared: Prepared,
    checkpoint: Path | None,
    reporter: Reporter,
    stopping: Callable[[], bool],
) -> Finetuned:
    from fastgan.data.grouped import GroupedByLength, steps_per_epoch
    from fastgan.training.language_trainer import (
        Job,
        LanguageTrainer,
        figures_of,
        make_arguments,
        run_job,
        try_average,
        write_end,
        write_result,
    )

    per_process = config.batch_size * config.gradient_accumulation
    step_size = per_process * processes()
    epoch = steps_per_epoch(len(prepared.rows), step_size)
    total = config.epochs * epoch
    total = min(total, config.max_steps) if config.max_steps else total
    arguments = make_arguments(
        config,
        folder,
        max_steps=total,
        warmup=int(config.warmup * total),
        eval_every=min(config.eval_every or epoch, total),
        **prepared.arguments,
    )
    job = Job(
        folder=folder,
        model=prepared.model,
        arguments=arguments,
        train=GroupedByLength(prepared.rows, prepared.lengths, step_size, config.seed, total),
        held_out=_Rows(prepared.held_out),
        seed=config.seed,
        amount=per_process,
        goal=prepared.goal,
        keep_best=True,
        patience=config.early_stopping,
        collator=prepared.collator,
        measure=prepared.measure,
        label_smoothing=prepared.label_smoothing,
        average=config.average,
        trainer=prepared.trainer or LanguageTrainer,
    )
    ended = run_job(job, checkpoint, reporter, stopping)
    figures, averaged = _figures(ended), None
    if not ended.interrupted and config.average > 1:
        averaged = try_average(job, ended)
        if averaged is not None:
            figures = figures_of(averaged)
            reporter.say(f"the mean of {config.average} weights: validation {job.goal.metric} "
                         f"{figures[job.goal.metric]:.4f}, the best")  # fmt: skip
    result = Finetuned(
        folder,
        ended.step,
        total,
        ended.interrupted,
        ended.early,
        ended.best[0] if ended.best else None,
        averaged is not None,
        sum(parameter.numel() for parameter in prepared.model.parameters()),
        figures | prepared.levels,
        prepared.counts,
    )
    if ended.first:
        write_end(job, ended, prepared.tokenizer, prepared.length, prepared.label)
        if not ended.interrupted:
            if prepared.finish is not None:
                more = prepared.finish(ended.trainer.model, result.figures)
                result = dataclasses.replace(result, figures=result.figures | more)
            write_result(folder, result)
    ended.trainer._wait()
    return result


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def _figures(ended: Ended) -> dict[str, float]:
    """What the evaluation of the kept weights said."""
    from fastgan.training.language_trainer import figures_of

    if ended.best is None:
        return {}
    return figures_of(next(row for row in ended.history if row["step"] == ended.best[0] and "eval_loss" in row))


def _digest(path: str) -> str:
    if os.path.isdir(path):
        raise IsADirectoryError(21, "is a folder, not a file", str(path))
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
