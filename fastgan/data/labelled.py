"""Files of labelled texts (TSV, CSV, JSONL) and of parallel lines, read whole, with errors that say where.

Every error is a :class:`fastgan.data.units.TextError`, which names the file, and line and column where there are any.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgan.data.units import TextError, refuse_other_marks, where_it_is_wrong

StrPath = str | os.PathLike[str]

#: how columns are named where there is a header, the first that is there counts
TEXT_NAMES = ("text", "sentence", "review", "content", "document")
LABEL_NAMES = ("label", "sentiment", "class", "target", "category")
_SUFFIXES = {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_MOST_CLASSES = 1000


@dataclass(frozen=True)
class Labelled:
    """Texts with their labels as they stand in the file, and the line each begins on."""

    texts: list[str]
    labels: list[str]
    lines: list[int]


def read_labelled(
    path: StrPath, *, text_column: str | None = None, label_column: str | None = None, allowed: Sequence[str] = ()
) -> Labelled:
    """The labelled texts of a ``.tsv``, ``.csv`` or ``.jsonl`` file in UTF-8, each also with ``.gz`` behind it.

    TSV has no quoting; CSV quotes as spreadsheets do. A first line that names the columns is a header; without one
    there are two columns, text and label. JSONL has an object a line. Blank lines are left out.

    Args:
        path: the file.
        text_column, label_column: names in the header; where None, one of ``TEXT_NAMES`` and ``LABEL_NAMES``.
        allowed: the labels that may be; any where empty.

    Raises:
        TextError: not UTF-8, another number of columns, an empty text, a label that may not be, or no text at all.
        FileNotFoundError, OSError: it cannot be read.
    """
    name = os.fspath(path).removesuffix(".gz")
    kind = _SUFFIXES.get(os.path.splitext(name)[1].lower())
    if kind is None:
        raise TextError(f"{path}: how it is written shows in its name, which must end in .tsv, .csv or .jsonl (or .gz)")
    text = read_text(path)
    if kind == "jsonl":
        rows = _objects(path, text, text_column, label_column)
    else:
        rows = _table(path, text, kind, text_column, label_column)
    found = Labelled([], [], [])
    for line, sentence, label, column in rows:
        if not sentence.strip():
            raise TextError(f"{path}: line {line}: the text is empty")
        if not label.strip():
            raise TextError(f"{path}: line {line}, column {column}: the label is empty")
        if allowed and label.strip() not in allowed:
            raise TextError(
                f"{path}: line {line}, column {column}: the label is {label.strip()[:40]!r}, which is none of "
                f"{', '.join(allowed[:20])}{', ...' if len(allowed) > 20 else ''}"
            )
        found.texts.append(sentence.strip())
        found.labels.append(label.strip())
        found.lines.append(line)
    if not found.texts:
        raise TextError(f"{path}: there is no labelled text in it ({len(text)} characters)")
    return found


def label_names(labelled: Labelled, path: StrPath) -> list[str]:
    """The different labels, numbers in their order and words in theirs; TextError for one alone, or far too many."""
    names = set(labelled.labels)
    if len(names) < 2:
        raise TextError(f"{path}: every label is {next(iter(names))!r}; two are needed to tell apart")
    if len(names) > min(_MOST_CLASSES, max(2, len(labelled.labels) // 2)):
        raise TextError(
            f"{path}: {len(names)} different labels on {len(labelled.labels)} lines; is the column another one? The "
            f"first is {labelled.labels[0][:40]!r}, on line {labelled.lines[0]}"
        )
    return sorted(names, key=lambda name: (0, int(name), name) if _is_number(name) else (1, 0, name))


def read_pairs(source: StrPath, target: StrPath) -> tuple[list[str], list[str]]:
    """The lines of two parallel files in UTF-8, plain or ``.gz``; pairs of two blank lines are left out.

    Raises:
        TextError: unequal numbers of lines, a blank line beside one that is not, no text, or not UTF-8.
        FileNotFoundError, OSError: a file cannot be read.
    """
    if Path(source).exists() and Path(target).exists() and os.path.samefile(source, target):
        raise TextError(f"{source}: is named as source and as target")
    sides = [read_text(path).removesuffix("\n").split("\n") for path in (source, target)]
    if len(sides[0]) != len(sides[1]):
        raise TextError(
            f"{source} has {len(sides[0]):,} lines and {target} has {len(sides[1]):,}; line by line they must belong "
            "together"
        )
    pairs = []
    for number, (left, right) in enumerate(zip(*sides, strict=True), 1):
        if bool(left.strip()) != bool(right.strip()):
            blank, other = (source, target) if right.strip() else (target, source)
            raise TextError(f"{blank}: line {number}: is blank, and the line of {other} is not")
        if left.strip():
            pairs.append((left.strip(), right.strip()))
    if not pairs:
        raise TextError(f"{source}: there is no text in it")
    return [left for left, _ in pairs], [right for _, right in pairs]


def read_text(path: StrPath) -> str:
    """A file as one string, UTF-8 (a byte order mark is taken off), line ends of every kind as newlines."""
    if os.path.isdir(path):
        raise TextError(f"{path}: is a folder, not a file")
    data = Path(path).read_bytes()
    if os.fspath(path).endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise TextError(f"{path}: broken, or not gzip ({error})") from error
    refuse_other_marks(data, path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(where_it_is_wrong(path, data)) from error
    if "\0" in text:
        raise TextError(where_it_is_wrong(path, data))
    if not text.strip():
        raise TextError(f"{path}: there is no text in it ({len(data)} bytes)")
    return text.replace("\r\n", "\n").replace("\r", "\n")


Row = tuple[int, str, str, Any]  # line, text, label, the label's column


def _table(path: StrPath, text: str, kind: str, text_column: str | None, label_column: str | None) -> Iterator[Row]:
    rows = _tsv(text) if kind == "tsv" else _csv(path, text)
    where: tuple[int, int, int] | None = None  # columns in all, the text's, the label's
    for line, cells in rows:
        if where is None:
            where = _header(path, line, cells, text_column, label_column)
            if where is not None:
                continue
            where = (2, 0, 1)
        if len(cells) != where[0]:
            means = "tabs" if kind == "tsv" else "commas"
            raise TextError(
                f"{path}: line {line}: has {len(cells)} columns (parted by {means}), and {where[0]} are expected"
            )
        yield line, cells[where[1]], cells[where[2]], where[2] + 1


def _header(
    path: StrPath, line: int, cells: list[str], text_column: str | None, label_column: str | None
) -> tuple[int, int, int] | None:
    """The columns as the first line names them; None where it is no header."""
    names = [cell.strip().lower() for cell in cells]
    found = []
    for given, known in ((text_column, TEXT_NAMES), (label_column, LABEL_NAMES)):
        if given is not None:
            if given.lower() not in names:
                raise TextError(f"{path}: line {line}: there is no column {given!r} among {', '.join(cells)[:200]}")
            found.append(names.index(given.lower()))
        else:
            found.append(next((names.index(name) for name in known if name in names), -1))
    if -1 not in found:
        if found[0] == found[1]:
            raise TextError(f"{path}: line {line}: text and label are the same column")
        return len(cells), found[0], found[1]
    if text_column or label_column or (max(found) >= 0 and len(cells) > 2):
        lacking = "text" if found[0] < 0 else "label"
        raise TextError(
            f"{path}: line {line}: which column is the {lacking}? Columns are {', '.join(cells)[:200]}; name it by "
            f"--{lacking}-column"
        )
    return None


def _tsv(text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.split("\t")


def _csv(path: StrPath, text: str) -> Iterator[tuple[int, list[str]]]:
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        before = 0
        try:
            for cells in reader:
                if cells:
                    yield before + 1, cells
                before = reader.line_num
        except csv.Error as error:
            raise TextError(f"{path}: line {before + 1}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)


def json_lines(path: StrPath, text: str, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of JSONL; blank lines are left out. TextError for what is no object ``with {what}``."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise TextError(f"{path}: line {number}{column}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise TextError(f"{path}: line {number}: must be an object with {what}, got {line[:40]!r}")
        yield number, row


def _objects(path: StrPath, text: str, text_column: str | None, label_column: str | None) -> Iterator[Row]:
    for number, row in json_lines(path, text, "a text and a label"):
        sentence = _value(path, number, row, text_column, TEXT_NAMES, "text")
        label = _value(path, number, row, label_column, LABEL_NAMES, "label")
        if not isinstance(sentence[1], str):
            raise TextError(f"{path}: line {number}, key {sentence[0]!r}: must be a string, got {sentence[1]!r:.40}")
        if (isinstance(label[1], float) and not label[1].is_integer()) or not isinstance(label[1], (str, int, float)):
            raise TextError(
                f"{path}: line {number}, key {label[0]!r}: a label is a word or a whole number, got {label[1]!r:.40}"
            )
        shown = label[1] if isinstance(label[1], str) else str(int(label[1]))
        yield number, sentence[1], shown, repr(label[0])


def _value(
    path: StrPath, number: int, row: dict[str, Any], given: str | None, known: Sequence[str], what: str
) -> tuple[str, Any]:
    for name in [given] if given is not None else known:
        if name in row:
            return name, row[name]
    looked = given if given is not None else ", ".join(known)
    raise TextError(f"{path}: line {number}: has no {what} (looked for {looked}; it has {', '.join(row)[:200] or '-'})")


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isascii() and name.removeprefix("-").isdigit()
