"""Documents with their summaries, and the sentences of a text."""

from __future__ import annotations

import os
import re

from fastgan.data.labelled import json_lines, read_text
from fastgan.data.units import TextError

DOCUMENT_NAMES = ("document", "article", "text", "source")
SUMMARY_NAMES = ("summaries", "summary", "highlights", "target")
# The full stops of Chinese and Japanese have no space behind them.
_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*")


def read_documents(path: str | os.PathLike[str]) -> tuple[list[str], list[list[str]]]:
    """Documents and the summaries of each, from JSONL in UTF-8, plain or .gz.

    A line is an object with one of ``DOCUMENT_NAMES`` and one of ``SUMMARY_NAMES``, a string or a list of them. Raises
    TextError, which names file, line and key, FileNotFoundError or OSError.
    """
    documents, summaries = [], []
    for number, row in json_lines(path, read_text(path), "a document and its summary"):
        found = []
        for names, what in ((DOCUMENT_NAMES, "document"), (SUMMARY_NAMES, "summary")):
            key = next((name for name in names if name in row), None)
            if key is None:
                raise TextError(f"{path}: line {number}: has no {what} (looked for {', '.join(names)})")
            values = row[key] if isinstance(row[key], list) and what == "summary" else [row[key]]
            if not values or not all(isinstance(each, str) and each.strip() for each in values):
                raise TextError(f"{path}: line {number}, key {key!r}: must be text, got {row[key]!r:.40}")
            found.append([" ".join(each.split()) for each in values])
        documents.append(found[0][0])
        summaries.append(found[1])
    return documents, summaries


def sentences_of(text: str) -> list[str]:
    """A text cut behind its full stops, question and exclamation marks; at least one piece, none empty."""
    return [piece for piece in _END.split(text.strip()) if piece] or [text]


def first_sentence(text: str) -> str:
    return sentences_of(text)[0]
