"""Texts cut into passages, as a stream: what a search looks through, each with its file and the line it begins on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgan.data.units import Read, TextError, guess_unit, read_lines

SIZE = 1000  # letters: about 250 tokens of English, which an encoder reads at once
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*\s|[。！？]")


@dataclass(frozen=True)
class Passage:
    """A piece of a file. Its line breaks are the file's: the line of a place in it is ``line`` and those before it."""

    file: str
    line: int
    text: str


def read_passages(files: Sequence[Path], size: int = SIZE) -> Iterator[Passage]:
    """The passages of text files in UTF-8, in their order, at most ``size`` letters each.

    Blank lines part them. What is longer is cut at the end of a sentence, or else at a space, in its second half. In a
    file without blank lines every line is a paragraph: short ones that follow each other are joined up to ``size``.

    Raises ValueError (TextError for what a file holds: not UTF-8, or no text in any of them) or OSError.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 20:
        raise ValueError(f"size must be an integer of at least 20 letters, got {size!r}")
    read, some = Read(), False
    for file in files:
        for line, text in _pieces_of(file, size, read):
            some = True
            yield Passage(str(file), line, text)
    if not some:
        raise TextError(f"{', '.join(map(str, files[:3]))}: there is no text in it ({read.bytes} bytes)")


def _pieces_of(file: Path, size: int, read: Read) -> Iterator[tuple[int, str]]:
    join_lines = guess_unit(file) == "line"
    held, first = "", 1
    for line, text, begins in read_lines(file, read):
        blank = begins and not text.strip()
        if held and begins and (blank or (join_lines and len(held) + 1 + len(text) > size)):
            yield from _cut(held, first, size)
            held = ""
        if blank:
            continue
        first = first if held else line
        held += ("\n" if held and begins else "") + text
        if len(held) > 16 * size:  # a text without an end must not be held whole
            *whole, (first, held) = _cut(held, first, size)
            yield from whole
    if held:
        yield from _cut(held, first, size)


def _cut(text: str, line: int, size: int) -> Iterator[tuple[int, str]]:
    """(the line it begins on, piece) of a text that begins on ``line``; without the space around pieces."""
    start = counted = 0
    while start < len(text):
        end = len(text)
        if end - start > size:
            window = text[start : start + size]
            ends = [found.end() for found in _SENTENCE_END.finditer(window, size // 2)]
            space = max(window.rfind(" ", size // 2), window.rfind("\n", size // 2)) + 1
            end = start + (ends[-1] if ends else space or size)
        piece = text[start:end]
        if kept := piece.strip():
            before = start + len(piece) - len(piece.lstrip())
            line += text.count("\n", counted, before)
            counted = before
            yield line, kept
        start = end
