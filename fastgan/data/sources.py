"""Where pictures come from: a folder, a zip, CIFAR-10, the handwritten digits.

Each source lists its pictures in a fixed order and reads them one at a time; it opens files for reading only, and
nothing is ever extracted from an archive.
"""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from fastgan.data.decode import SUFFIXES, looks_like_image

#: a single file beyond this is no picture that fits into memory
_LARGEST_FILE = 2**31


@dataclass
class Source:
    """A listing: ``read()`` gives (name, read one) pairs, in a fixed order.

    ``key`` changes when the source does (paths, sizes and times of modification); ``skipped`` holds what could not be
    listed, ``ignored`` counts the files that are no pictures.
    """

    name: str
    key: str
    count: int | None
    read: Callable[[], Iterator[tuple[str, Callable[[], Any]]]]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    ignored: int = 0


def data_folder() -> Path | None:
    """The folder of local data sets: ``FASTGAN_DATA``, or ``../shared/data`` beside a source checkout, or None."""
    named = os.environ.get("FASTGAN_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
    return folder.resolve() if folder.is_dir() else None


def open_source(source: str | os.PathLike[str]) -> Source:
    """The listing of ``source``: "digits", "cifar10", a folder, or a zip file.

    Raises FileNotFoundError where there is no such path, and ValueError for a file that is not a zip.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source must be a path, 'cifar10' or 'digits', got {type(source).__name__}")
    if source == "digits":
        return Source("digits", "digits", 1797, _read_digits)
    if source == "cifar10":
        return _cifar10()
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _zip(path)
    raise FileNotFoundError(f"no folder or zip file at {str(source)!r} (the names known are 'cifar10' and 'digits')")


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _hidden(name: str) -> bool:
    """What systems leave among pictures: .DS_Store, AppleDouble files (._a.jpg), __MACOSX, .thumbnails."""
    return name.startswith(".") or name == "__MACOSX"


def _folder(root: Path) -> Source:
    listing: list[tuple[str, int, int]] = []
    skipped: list[tuple[str, str]] = []
    ignored = 0
    seen: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        skipped.append((os.path.relpath(error.filename or root, root), error.strerror or str(error)))

    for folder, subfolders, files in os.walk(root, onerror=unreadable, followlinks=True):
        # Links to folders are followed, each folder once, so that a link to a parent ends.
        about = os.stat(folder)
        identity = (about.st_dev, about.st_ino)
        if identity in seen:
            subfolders.clear()
            continue
        seen.add(identity)
        subfolders[:] = sorted(name for name in subfolders if not _hidden(name))
        for name in files:
            path = os.path.join(folder, name)
            relative = Path(os.path.relpath(path, root)).as_posix()
            suffix = os.path.splitext(name)[1].lower()
            if _hidden(name) or (suffix and suffix not in SUFFIXES):
                ignored += 1
                continue
            try:
                about = os.stat(path)
                if not stat.S_ISREG(about.st_mode):
                    ignored += 1  # a pipe or a socket would wait for ever
                    continue
                if not suffix:
                    with open(path, "rb") as file:
                        if not looks_like_image(file.read(16)):
                            ignored += 1
                            continue
            except OSError as error:
                skipped.append((relative, error.strerror or str(error)))
                continue
            listing.append((relative, about.st_size, about.st_mtime_ns))
    listing.sort()

    def read() -> Iterator[tuple[str, Callable[[], Any]]]:
        for relative, size, _ in listing:
            yield relative, partial(_read_file, root / relative, size)

    key = _hash("folder", os.path.realpath(root), listing)
    return Source(str(root), key, len(listing), read, sorted(skipped), ignored)


def _read_file(path: Path, size: int) -> bytes:
    if size > _LARGEST_FILE:
        raise ValueError(f"the file has {size} bytes; {_LARGEST_FILE} is the most that is read")
    return path.read_bytes()


def _zip(path: Path) -> Source:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{str(path)!r} is neither a folder nor a whole zip file")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is a damaged zip file: {error}") from error
    pictures, ignored = [], 0
    for position, entry in enumerate(entries):
        if entry.is_dir():
            continue
        parts = PurePosixPath(entry.filename.replace("\\", "/")).parts
        suffix = os.path.splitext(entry.filename)[1].lower()
        if any(_hidden(part) for part in parts if part not in (".", "..")) or suffix not in SUFFIXES:
            ignored += 1
            continue
        pictures.append((entry.filename, position))
    pictures.sort()
    about = path.stat()

    def read() -> Iterator[tuple[str, Callable[[], Any]]]:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            for name, position in pictures:
                yield name, partial(_read_entry, archive, entries[position])

    key = _hash("zip", os.path.realpath(path), about.st_size, about.st_mtime_ns)
    return Source(str(path), key, len(pictures), read, [], ignored)


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    if entry.file_size > _LARGEST_FILE:
        raise ValueError(f"the entry unpacks to {entry.file_size} bytes; {_LARGEST_FILE} is the most that is read")
    return archive.read(entry)


def _read_digits() -> Iterator[tuple[str, Callable[[], Any]]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the handwritten digits come with scikit-learn, which is not installed: pip install 'fastgan[data]'"
        ) from error
    # 8x8, values 0 to 16
    pictures = (load_digits().images * (255.0 / 16.0)).round().astype("uint8")
    for index, picture in enumerate(pictures):
        yield f"digit {index}", picture.copy


def _cifar10() -> Source:
    folder = data_folder()
    local = folder / "cifar10-train-10k.zip" if folder else None
    if local is not None and local.is_file():
        return _zip(local)
    return Source("cifar10", "cifar10", 50_000, _read_cifar10)


def _read_cifar10() -> Iterator[tuple[str, Callable[[], Any]]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            "CIFAR-10 is loaded through Hugging Face datasets, which is not installed: pip install 'fastgan[data]'"
        ) from error
    try:
        rows = load_dataset("uoft-cs/cifar10", split="train")
    except Exception as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise RuntimeError(
            f"CIFAR-10 could not be loaded from the Hugging Face hub ({type(error).__name__}: {reason}). Without "
            "internet, give a folder or a zip of pictures, or name in FASTGAN_DATA a folder with cifar10-train-10k.zip."
        ) from error
    column = next(name for name in ("img", "image") if name in rows.column_names)
    for index in range(len(rows)):
        yield f"cifar10 {index}", lambda: rows[index][column]  # noqa: B023  read before the next one is listed
