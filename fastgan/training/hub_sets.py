"""Data sets of the hub for fine-tuning: loaded by ``datasets`` and written once as the file that the task reads.

A name is ``OWNER/NAME``, with ``@CONFIG``, ``:SPLIT`` (else the option's own: train or validation) and ``#COLUMN`` (for
translation and generation) behind it as far as they are needed: ``nyu-mll/glue@sst2``, ``wmt/wmt16@de-en:train#de``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgan._cache import cache_folder
from fastgan.data.documents import DOCUMENT_NAMES, SUMMARY_NAMES
from fastgan.data.labelled import LABEL_NAMES, TEXT_NAMES
from fastgan.data.units import TextError
from fastgan.training.hub import _PATIENCE, _first

if TYPE_CHECKING:
    from fastgan.training.finetune import FinetuneConfig

_NAME = re.compile(
    r"(?P<name>\w[\w.-]*(?:/[\w.-]+)?)(?:@(?P<config>[\w.-]+))?(?::(?P<split>[\w.\[\]%:+-]+))?(?:#(?P<column>[\w.-]+))?"
)
_FILES = (".tsv", ".csv", ".json", ".jsonl", ".ndjson", ".txt", ".gz", ".md", ".rst")


def is_name(given: str) -> bool:
    """Whether it can only be a name on the hub: no file of this name, and none by its ending."""
    return not os.path.lexists(given) and _NAME.fullmatch(given) is not None and not given.lower().endswith(_FILES)


def localise(config: FinetuneConfig, task: str) -> FinetuneConfig:
    """The configuration with files in place of names on the hub; the same where there are none.

    What was loaded once is taken from the cache (``FASTGAN_CACHE``, else the user's). Raises FileNotFoundError where
    the hub does not have it or is not reached, within seconds, ImportError without ``datasets``, and ValueError
    (TextError for what the data set holds).
    """
    changes: dict[str, Any] = {}
    for field in config.FILES:
        value = getattr(config, field)
        several = [value] if isinstance(value, str) else list(value)
        local = [_local(each, field, task, config) if is_name(each) else each for each in several]
        if local != several:
            changes[field] = local[0] if isinstance(value, str) else tuple(local)
    return dataclasses.replace(config, **changes) if changes else config


def _local(given: str, field: str, task: str, config: Any) -> str:
    parts = _NAME.fullmatch(given)
    assert parts is not None
    split = parts["split"] or field
    columns = [getattr(config, name, None) for name in ("text_column", "label_column")]
    key = json.dumps([task, parts["name"], parts["config"], split, parts["column"], columns])
    suffix = {"qa": ".json", "translate": ".txt", "generate": ".txt"}.get(task, ".jsonl")
    name = f"{parts['name'].replace('/', '--')}-{hashlib.sha256(key.encode()).hexdigest()[:16]}{suffix}"
    folder = (cache_folder() or Path(tempfile.gettempdir()) / "fastgan") / "hub"
    path = folder / name
    if not path.exists():
        rows = _load(given, parts["name"], parts["config"], split)
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{name}.{os.getpid()}.partial")
        try:
            with open(partial, "w", encoding="utf-8") as file:
                file.writelines(_WRITERS[task](given, rows, parts["column"], *columns))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return str(path)


def _load(given: str, name: str, config: str | None, split: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{given}: no such file, and data sets of the hub need datasets ({error}): pip install 'fastgan[data]'"
        ) from None
    from huggingface_hub import HfApi, constants

    missing = "no such file, and the hub does not have this data set or was not reached"
    if not (constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")):
        try:  # once, and for a few seconds: load_dataset itself would try for minutes
            HfApi().dataset_info(name, timeout=_PATIENCE)
        except Exception as error:  # of many kinds, of several libraries
            raise FileNotFoundError(
                2, f"{missing} ({_first(error)}); HF_HUB_OFFLINE=1 takes what was downloaded before", given
            ) from error
    try:
        return load_dataset(name, config, split=split)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(2, f"{missing} ({_first(error)})", given) from error
    except Exception as error:
        raise ValueError(f"{given}: cannot be loaded as a data set ({_first(error)})") from error


def _column(given: str, rows: Any, wanted: str | None, known: tuple[str, ...], what: str) -> str:
    for name in [wanted] if wanted is not None else known:
        if name in rows.column_names:
            return name
    looked = wanted or ", ".join(known)
    raise TextError(
        f"{given}: has no column for the {what} (looked for {looked}; it has {', '.join(rows.column_names)})"
    )


def _text(given: str, number: int, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TextError(f"{given}: row {number}, column {name!r}: must be text, got {value!r:.40}")
    return value


def _labelled(given: str, rows: Any, _: str | None, text: str | None, label: str | None) -> Iterator[str]:
    text, label = _column(given, rows, text, TEXT_NAMES, "text"), _column(given, rows, label, LABEL_NAMES, "label")
    named = getattr(rows.features[label], "int2str", None)
    for number, row in enumerate(rows):
        value = row[label]
        if value is None or value == -1:
            raise TextError(f"{given}: row {number}, column {label!r}: there is no label; another split has them")
        shown = named(value) if named is not None else value
        yield json.dumps({text: _text(given, number, text, row[text]), label: shown}, ensure_ascii=False) + "\n"


def _questions(given: str, rows: Any, *_: str | None) -> Iterator[str]:
    for name in ("id", "question", "context", "answers"):
        _column(given, rows, name, (), name)
    paragraphs: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(rows):
        try:
            found = row["answers"]
            answers = [{"text": text, "answer_start": start}
                       for text, start in zip(found["text"], found["answer_start"], strict=True)]  # fmt: skip
        except (TypeError, KeyError, ValueError) as error:
            raise TextError(f"{given}: row {number}, column 'answers': not of SQuAD's form ({error})") from error
        asked = {"id": str(row["id"]), "question": row["question"], "answers": answers, "is_impossible": not answers}
        paragraphs.setdefault(_text(given, number, "context", row["context"]), []).append(asked)
    several = [{"context": context, "qas": asked} for context, asked in paragraphs.items()]
    yield json.dumps({"version": "2.0", "data": [{"title": given, "paragraphs": several}]}, ensure_ascii=False)


def _documents(given: str, rows: Any, *_: str | None) -> Iterator[str]:
    document = _column(given, rows, None, DOCUMENT_NAMES, "document")
    summary = _column(given, rows, None, tuple(each for each in SUMMARY_NAMES if each != document), "summary")
    for row in rows:
        yield json.dumps({"document": row[document], "summary": row[summary]}, ensure_ascii=False) + "\n"


def _side(given: str, rows: Any, column: str | None, *_: str | None) -> Iterator[str]:
    if column is None:
        raise TextError(f"{given}: which language? Add #COLUMN to the name, for example {given}#de")
    together = "translation" in rows.column_names
    if not together:
        _column(given, rows, column, (), "text")
    for number, row in enumerate(rows):
        value = row["translation"].get(column) if together else row[column]
        yield " ".join(_text(given, number, column, value).split()) + "\n"


def _plain(given: str, rows: Any, column: str | None, *_: str | None) -> Iterator[str]:
    name = _column(given, rows, column, TEXT_NAMES, "text")
    for number, row in enumerate(rows):
        yield _text(given, number, name, row[name]) + "\n"


_WRITERS: dict[str, Callable[..., Iterator[str]]] = {
    "sentiment": _labelled,
    "qa": _questions,
    "summarize": _documents,
    "translate": _side,
    "generate": _plain,
}
