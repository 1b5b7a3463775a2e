"""Reading what is to be measured: lines of text that belong together, and SQuAD's JSON."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

StrPath = str | os.PathLike[str]


class InputError(ValueError):
    """A file that cannot be measured; the message names it, and the line where there is one."""


def read_lines(path: StrPath) -> list[str]:
    """The lines of a UTF-8 file, plain or .gz, without what ends them (a newline, or both of Windows' characters).

    Raises:
        InputError: another encoding, NUL bytes, a broken .gz, or nothing but white space.
        OSError: it cannot be read.
    """
    data = _bytes(path)
    text = _decode(path, data)
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    if not text.strip():
        raise InputError(f"{path}: there is no text in it ({len(data)} bytes)")
    return [line.removesuffix("\r") for line in lines]


def read_parallel(paths: Sequence[StrPath]) -> list[list[str]]:
    """The lines of files that must have as many lines each; InputError names the two that have not, and the line."""
    read = [read_lines(path) for path in paths]
    for path, lines in zip(paths[1:], read[1:], strict=True):
        if len(lines) != len(read[0]):
            short, long = sorted([(len(read[0]), paths[0]), (len(lines), path)], key=lambda each: each[0])
            raise InputError(
                f"{short[1]} ends after line {short[0]}, {long[1]} has {long[0]} lines: line {short[0] + 1} of the one "
                "has none to go with in the other"
            )
    return read


def read_squad(path: StrPath) -> dict[str, list[str]]:
    """Question's id → its gold answers, from SQuAD's JSON, version 1.1 or 2.0 (an empty list where there is none)."""
    golds: dict[str, list[str]] = {}
    document = _json(path)
    try:
        for article in document["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    if question["id"] in golds:
                        raise InputError(f"{path}: question {question['id']!r} is there twice")
                    golds[question["id"]] = [str(answer["text"]) for answer in question["answers"]]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not SQuAD's form, data / paragraphs / qas with id and answers ({type(error).__name__}: {error})"
        ) from error
    if not golds:
        raise InputError(f"{path}: there is no question in it")
    return golds


def read_predictions(path: StrPath, golds: dict[str, list[str]]) -> list[str]:
    """The answers of SQuAD's prediction file, {id: answer}, in the order of ``golds``; each must have one."""
    predictions = _json(path)
    if not isinstance(predictions, dict) or not all(isinstance(each, str) for each in predictions.values()):
        raise InputError(f"{path}: must be one object, question's id to answer")
    missing = [name for name in golds if name not in predictions]
    if missing:
        raise InputError(f"{path}: no answer to {len(missing)} of {len(golds)} questions, the first {missing[0]!r}")
    return [predictions[name] for name in golds]


def _bytes(path: StrPath) -> bytes:
    if os.path.isdir(path):
        raise InputError(f"{path}: is a folder, not a file")
    data = Path(path).read_bytes()
    if os.fspath(path).endswith(".gz"):
        try:
            return gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: broken or not gzip ({error})") from error
    return data


def _decode(path: StrPath, data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path}: line 1: UTF-16 (byte order mark at byte 0); convert it to UTF-8")
    if (at := data.find(b"\0")) >= 0:
        raise InputError(f"{path}: line {_line(data, at)}: a NUL byte at byte {at}: not a text, or UTF-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = data.index(error.object[error.start :]) if error.object is not data else error.start
        raise InputError(
            f"{path}: line {_line(data, at)}: byte {at} (0x{data[at]:02x}) is not UTF-8; Latin-1 or another encoding? "
            "Convert it to UTF-8"
        ) from error


def _line(data: bytes, at: int) -> int:
    return data.count(b"\n", 0, at) + 1


def _json(path: StrPath) -> Any:
    text = _decode(path, _bytes(path))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from error
