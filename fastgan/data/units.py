"""Text files read as a stream of lines or paragraphs, in memory that does not grow with the file.

A file is read in blocks, and a block is passed on as far as its last whole line or paragraph. One that is longer than a
block is passed on in pieces, each cut at a space, so that nothing is lost. Encodings are checked as the file is read:
what is not UTF-8 is named by file, line and column, with the byte's offset.
"""

from __future__ import annotations

import codecs
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

#: bytes read at once, and the longest line or paragraph that is passed on whole
BLOCK = 1 << 20
UNITS = ("line", "paragraph")

_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16's, with which it begins
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class TextError(ValueError):
    """A file that is not text in UTF-8; the message names it, with line, column and byte."""


@dataclass
class Read:
    """What was met while reading, added up over the files."""

    bytes: int = 0
    blank_files: int = 0
    long: int = 0
    bad_lines: int = 0


def text_files(sources: list[str | os.PathLike[str]]) -> list[Path]:
    """The files of ``sources``; a folder stands for its ``.txt``, ``.md`` and ``.rst`` files, hidden ones left out.

    Raises FileNotFoundError for what is not there, and ValueError for a folder without such a file, for what is neither
    a file nor a folder, and for a file that is named twice.
    """
    found: list[Path] = []
    for source in sources:
        path = Path(os.path.expanduser(source))
        if path.is_dir():
            inside = []
            for folder, subfolders, names in os.walk(path):
                subfolders[:] = [name for name in subfolders if not name.startswith(".")]
                inside += [Path(folder, name) for name in names if not name.startswith(".")]
            inside = sorted(file for file in inside if file.suffix.lower() in (".txt", ".md", ".rst"))
            if not inside:
                raise ValueError(f"{path}: there is no .txt, .md or .rst file in this folder")
            found += inside
        elif path.is_file():
            found.append(path)
        elif os.path.lexists(path):
            raise ValueError(f"{path}: is neither a file nor a folder; text is read more than once, so no pipe will do")
        else:
            raise FileNotFoundError(2, "no such file or folder", str(path))
    seen: dict[tuple[int, int], Path] = {}
    for path in found:
        status = path.stat()
        if seen.setdefault((status.st_dev, status.st_ino), path) is not path:
            raise ValueError(f"{path}: is named twice")
    return found


def guess_unit(file: Path) -> str:
    """``"paragraph"`` where blank lines part the beginning of the file, else ``"line"``."""
    with open(file, "rb") as stream:
        beginning = stream.read(BLOCK).decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n").strip()
    return "paragraph" if _BLANK_LINES.search(beginning) else "line"


def read_units(file: Path, unit: str, read: Read, skip_bad_lines: bool = False) -> Iterator[tuple[str, bool, bool]]:
    """The lines or paragraphs of a file that are not blank, as (text without the end of the line, begins, ends).

    One that is longer than ``BLOCK`` bytes comes in pieces, of which only the first begins and the last ends. Line ends
    of every kind become a newline. ``read`` is added to. Raises TextError unless ``skip_bad_lines``, which leaves lines
    out that are not UTF-8 or hold a NUL, and counts them.
    """
    with open(file, "rb") as stream:
        some = begun = False  # begun: whether a unit goes on from the block before
        for block, open_end in _blocks(stream, file, unit, read):
            text = _decode(block, file, read, skip_bad_lines)
            pieces = _BLANK_LINES.split(text) if unit == "paragraph" else text.split("\n")
            for number, piece in enumerate(pieces, 1):
                piece = piece.strip("\n") if unit == "paragraph" else piece
                goes_on = open_end and number == len(pieces)
                if begun or (piece and not piece.isspace()):
                    some = True
                    yield piece, not begun, not goes_on
                    read.long += goes_on and not begun
                    begun = goes_on
        read.blank_files += not some


def read_lines(file: Path, read: Read) -> Iterator[tuple[int, str, bool]]:
    """All lines of a file, blank ones too, as (number from 1, text without its end, begins); errors as read_units'.

    A line that is longer than ``BLOCK`` bytes comes in pieces, of which only the first begins.
    """
    number, begins = 1, True
    with open(file, "rb") as stream:
        for block, open_end in _blocks(stream, file, "line", read):
            lines = _decode(block, file, read, False).split("\n")
            if not open_end and not lines[-1]:
                lines.pop()  # what follows the last newline
            for place, text in enumerate(lines, 1):
                yield number, text, begins
                begins = not (open_end and place == len(lines))
                number += begins


def _blocks(stream: BinaryIO, file: Path, unit: str, read: Read) -> Iterator[tuple[bytes, bool]]:
    """Blocks that end with a line or paragraph, or (the second is True) within one that is too long to be held."""
    end = b"\n\n" if unit == "paragraph" else b"\n"
    held, last_was_return = b"", False
    first = True
    while True:
        data = stream.read(BLOCK)
        read.bytes += len(data)
        if first:
            refuse_other_marks(data, file)
            data, first = data.removeprefix(codecs.BOM_UTF8), False
        ended = not data
        if last_was_return:
            data = b"\r" + data
        last_was_return = data.endswith(b"\r") and not ended
        if last_was_return:
            data = data[:-1]  # a newline may follow in the next block
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        held += data
        if ended:
            if held:
                yield held, False
            return
        cut = held.rfind(end)
        if cut >= 0:
            yield held[: cut + len(end)], False
            held = held[cut + len(end) :]
        while len(held) > BLOCK:
            cut = _cut(held, BLOCK)
            yield held[:cut], True
            held = held[cut:]


def _cut(data: bytes, limit: int) -> int:
    """Where to cut: before the last space, or else between two letters."""
    cut = max(data.rfind(b" ", limit // 2, limit), data.rfind(b"\n", limit // 2, limit))
    if cut > 0:
        return cut
    cut = limit
    while cut > limit - 4 and data[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _decode(block: bytes, file: Path, read: Read, skip_bad_lines: bool) -> str:
    try:
        text = block.decode("utf-8")
        if "\0" not in text:
            return text
    except UnicodeDecodeError:
        pass
    if not skip_bad_lines:
        raise TextError(where_it_is_wrong(file) or f"{file}: changed while it was read")
    kept = []
    for line in block.split(b"\n"):
        try:
            decoded = line.decode("utf-8")
        except UnicodeDecodeError:
            decoded = "\0"
        if "\0" in decoded:
            read.bad_lines += 1
            decoded = ""
        kept.append(decoded)
    return "\n".join(kept)


def refuse_other_marks(beginning: bytes, file: str | os.PathLike[str]) -> None:
    """Raises TextError for the byte order mark of UTF-16 or UTF-32."""
    for mark, name in _MARKS.items():
        if beginning.startswith(mark):
            raise TextError(f"{file}: is {name} text (byte 0 begins its mark); save it as UTF-8")


def where_it_is_wrong(file: str | os.PathLike[str], data: bytes | None = None) -> str | None:
    """What is said of the first byte that is no text: line and column (both from 1) and the byte's offset (from 0).

    ``data``: what the file holds, where that is at hand (unpacked, for one). A byte order mark is no column.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, column, offset = 1, 1, 0
    with open(file, "rb") if data is None else io.BytesIO(data) as stream:
        if stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
            offset = len(codecs.BOM_UTF8)
        stream.seek(offset)
        while True:
            data = stream.read(BLOCK)
            before = decoder.getstate()[0]
            problem, end = None, 0
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                text, end = (before + data)[: error.start].decode("utf-8"), error.start
                byte = (before + data)[error.start]
                problem = f"byte {offset - len(before) + end} (0x{byte:02x}) is not UTF-8"
                problem += "; is it Latin-1 or another old encoding?" if byte >= 0xA0 else ""
            if "\0" in text:
                text = text[: text.index("\0")]
                end = len(text.encode("utf-8"))
                problem = f"byte {offset - len(before) + end} is zero; this is not text, or it is UTF-16"
            newlines = text.count("\n")
            line += newlines
            column = len(text) - text.rfind("\n") if newlines else column + len(text)
            if problem is not None:
                return f"{file}: line {line}, column {column}: {problem}. Save the file as UTF-8"
            if not data:
                return None
            offset += len(data)
