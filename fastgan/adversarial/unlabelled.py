"""Texts without labels, as batches beside the labelled ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_unlabelled(
    path: str | os.PathLike[str], text_column: str | None = None, label_column: str | None = None
) -> list[str]:
    """The texts of a file, one a line, plain or ``.gz``; of a .tsv, .csv or .jsonl those of its text column,
    whose labels, of any kind, are not looked at.

    Raises TextError (nothing in it, not UTF-8, a row that cannot be) or OSError.
    """
    from fastgan.data.labelled import read_labelled, read_text

    suffix = Path(os.fspath(path).removesuffix(".gz")).suffix.lower()
    if suffix in (".tsv", ".csv", ".jsonl", ".ndjson"):
        return read_labelled(path, text_column=text_column, label_column=label_column).texts
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def unlabelled_texts(prepared: Any, config: Any, say: Callable[[str], None]) -> tuple[Any, dict[str, int]]:
    """As many texts of ``config.unlabelled`` as a run sees labelled ones, in batches of like lengths, and counts.

    Texts that are in the validation file as well are said.
    """
    from fastgan.data.grouped import GroupedByLength, steps_per_epoch
    from fastgan.training.hub import encode
    from fastgan.training.language_run import processes

    texts = read_unlabelled(config.unlabelled, config.text_column, config.label_column)
    ids, cut = encode(prepared.tokenizer, texts, prepared.length)
    held = {tuple(row["input_ids"]) for row in prepared.held_out}
    shared = sum(tuple(each) in held for each in ids)
    if shared:
        say(f"{shared} of {len(ids)} texts of {config.unlabelled} are in the validation file as well")
    step_size = config.batch_size * config.gradient_accumulation * processes()
    total = config.epochs * steps_per_epoch(len(prepared.rows), step_size)
    rows, lengths = [{"input_ids": each} for each in ids], [len(each) for each in ids]
    grouped = GroupedByLength(rows, lengths, step_size, config.seed + 1, total)
    return grouped, {"unlabelled": len(ids), "unlabelled_cut": len(cut)}


def batch_beside(trainer: Any) -> Any:
    """The texts that stand beside the batch at hand, collated: another batch for each, step and process.

    After ``step_seed``, which counts the batches of a step.
    """
    step, batch = trainer._batch_of_step
    arguments = trainer.args
    count = arguments.per_device_train_batch_size
    number = step * arguments.gradient_accumulation_steps + batch
    first = (number * arguments.world_size + arguments.process_index) * count
    texts = trainer.unlabelled
    return trainer._prepare_inputs(trainer.data_collator([texts[first + i] for i in range(count)]))
