"""Where pictures come from: a folder, a zip, CIFAR-10, the handwritten digits.

Each source lists its pictures in a fixed order and reads them one at a time; it opens files for reading only, and
nothing is ever extracted from an archive.
"""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from fastgan.data.decode import SUFFIXES, looks_like_image

#: sources that are no paths
NAMES = ("cifar10", "digits")

#: a single file beyond this is no picture that fits into memory
_LARGEST_FILE = 2**31


class SourceError(RuntimeError):
    """A data set that cannot be had from where it is kept."""


@dataclass
class Source:
    """A listing: ``read()`` gives (name, read one) pairs, in a fixed order.

    ``key`` changes when the source does (paths, sizes, times); ``skipped`` holds what could not be listed, ``ignored``
    counts the files that are no pictures, and ``kinds`` says how many of each suffix those are.
    """

    name: str
    key: str
    count: int | None
    read: Callable[[], Iterator[tuple[str, Callable[[], Any]]]]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    @property
    def ignored(self) -> int:
        return self.kinds.total()


#: what is often given in place of pictures: suffix -> what to do about it
_NOT_READ = {
    ".parquet": "Parquet tables are not read: save their pictures as files",
    ".arrow": "Arrow tables are not read: save their pictures as files",
    ".tfrecord": "TFRecords are not read: save their pictures as files",
    ".tfrecords": "TFRecords are not read: save their pictures as files",
    ".h5": "HDF5 files are not read: save each picture as a file or as .npy",
    ".hdf5": "HDF5 files are not read: save each picture as a file or as .npy",
    ".mat": "MATLAB files are not read: save each picture as a file or as .npy",
    ".npz": ".npz archives are not read: save each picture as .npy",
    ".pkl": "pickles are not read, since unpickling runs code: save each picture as a file or as .npy",
    ".pickle": "pickles are not read, since unpickling runs code: save each picture as a file or as .npy",
    ".pt": "pickles are not read, since unpickling runs code: save each picture as a file or as .npy",
    ".pth": "pickles are not read, since unpickling runs code: save each picture as a file or as .npy",
    ".zip": "a zip within is not opened: give that zip itself",
    ".tar": "tar archives are not read: unpack it, or make a zip",
    ".tgz": "tar archives are not read: unpack it, or make a zip",
    ".gz": "compressed archives are not read: unpack it, or make a zip",
    ".7z": "7z archives are not read: unpack it, or make a zip",
    ".rar": "rar archives are not read: unpack it, or make a zip",
    ".heic": "HEIC is not read: convert the pictures to JPEG",
    ".heif": "HEIF is not read: convert the pictures to JPEG",
    ".svg": "SVG is not read: render the pictures as PNG",
    ".mp4": "films are not read: save their frames as pictures",
}
_CIFAR_BATCHES = {"data_batch_1", "data_batch_2", "batches.meta", "test_batch", "data_batch_1.bin"}


def advice(kinds: Counter[str]) -> str:
    """What the ignored files are, and what to do about it: a part of a sentence, or nothing."""
    if not kinds:
        return ""
    named = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in kinds.most_common(4))
    for suffix, _ in kinds.most_common():
        if suffix in _NOT_READ:
            return f" ({named}; {_NOT_READ[suffix]})"
    return f" ({named})"


def data_folder() -> Path | None:
    """The folder of local data sets: ``FASTGAN_DATA``, or ``../shared/data`` beside a source checkout, or None."""
    named = os.environ.get("FASTGAN_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
    return folder.resolve() if folder.is_dir() else None


def open_source(source: str | os.PathLike[str]) -> Source:
    """The listing of ``source``: "digits", "cifar10", a folder, or a zip file.

    Raises FileNotFoundError where there is no such path, PermissionError where it may not be read, and ValueError for
    a file that is not a zip.
    """
    where = locate(source)
    if where == "digits":
        return Source("digits", "digits", 1797, _read_digits)
    if where == "cifar10":
        return _cifar10()
    path = Path(where)
    return _folder(path) if path.is_dir() else _zip(path)


def as_text(source: str | os.PathLike[str]) -> str:
    """The source in one string; a Path is a path, even where it is called digits."""
    text = os.fspath(source)
    return text if isinstance(source, str) or text not in NAMES else os.path.join(os.curdir, text)


def locate(source: str | os.PathLike[str]) -> str:
    """ "digits", "cifar10", or the path of what is there; raises as :func:`open_source`, without looking inside."""
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source must be a path, 'cifar10' or 'digits', got {type(source).__name__}")
    source = as_text(source)
    if source == "":
        raise ValueError("source is empty; give a folder, a zip file, 'cifar10' or 'digits' (here itself is '.')")
    if source in NAMES:
        return source
    path = os.path.expanduser(source)  # leaves the ~ of a user that is not there
    try:
        os.stat(path)
    except PermissionError as error:
        raise PermissionError(f"{source!r} may not be read") from error
    except (OSError, ValueError) as error:
        close = {"cifar10": "cifar10", "cifar": "cifar10", "digits": "digits"}.get(
            source.lower().replace("-", "").replace("_", "")
        )
        raise FileNotFoundError(
            f"no folder or zip file at {source!r} "
            + (f"(did you mean {close!r}?)" if close else "(the names known are 'cifar10' and 'digits')")
        ) from error
    return path


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _hidden(name: str) -> bool:
    """What systems leave among pictures: .DS_Store, AppleDouble files (._a.jpg), __MACOSX, .thumbnails."""
    return name.startswith(".") or name == "__MACOSX"


def _is_run(config: str) -> bool:
    """A run's folder, whose pictures are the generator's."""
    try:
        with open(config, "rb") as file:
            return b'"fastgan-run"' in file.read(200)
    except OSError:
        return False


def _folder(root: Path) -> Source:
    listing: list[tuple[str, int, int, int]] = []
    skipped: list[tuple[str, str]] = []
    kinds: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        skipped.append((os.path.relpath(error.filename or root, root), error.strerror or str(error)))

    for folder, subfolders, files in os.walk(root, onerror=unreadable, followlinks=True):
        # Links to folders are followed, each folder once, so that a link to a parent ends.
        try:
            about = os.stat(folder)
        except OSError as error:
            unreadable(error)
            continue
        identity = (about.st_dev, about.st_ino)
        if identity in seen:
            subfolders.clear()
            continue
        seen.add(identity)
        if "config.json" in files and _is_run(os.path.join(folder, "config.json")):
            subfolders.clear()  # samples of a run among its data would make other data of it
            continue
        subfolders[:] = sorted(name for name in subfolders if not _hidden(name))
        for name in files:
            path = os.path.join(folder, name)
            relative = Path(os.path.relpath(path, root)).as_posix()
            suffix = os.path.splitext(name)[1].lower()
            if _hidden(name) or (suffix and suffix not in SUFFIXES):
                kinds[suffix] += 1
                continue
            try:
                about = os.stat(path)
                if not stat.S_ISREG(about.st_mode):
                    kinds[suffix] += 1  # a pipe or a socket would wait for ever
                    continue
                if not suffix:
                    with open(path, "rb") as file:
                        if not looks_like_image(file.read(16)):
                            kinds[suffix] += 1
                            continue
            except OSError as error:
                skipped.append((relative, error.strerror or str(error)))
                continue
            # The time of the inode's change as well: a copy that keeps times can leave the other two as they were.
            listing.append((relative, about.st_size, about.st_mtime_ns, about.st_ctime_ns))
    listing.sort()
    if not listing and _CIFAR_BATCHES.intersection(os.listdir(root)):
        raise ValueError(
            f"{str(root)!r} holds CIFAR-10's own batches, which are not read (unpickling runs code): give a folder or "
            "zip of pictures, or the name cifar10, which loads it through Hugging Face datasets"
        )

    def read() -> Iterator[tuple[str, Callable[[], Any]]]:
        for relative, size, *_ in listing:
            yield relative, partial(_read_file, root / relative, size)

    key = _hash("folder", os.path.realpath(root), listing, sorted(skipped))
    return Source(str(root), key, len(listing), read, sorted(skipped), kinds)


def _read_file(path: Path, size: int) -> bytes:
    if size > _LARGEST_FILE:
        raise ValueError(f"the file has {size} bytes; {_LARGEST_FILE} is the most that is read")
    return path.read_bytes()


def _zip(path: Path) -> Source:
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{str(path)!r} may not be read")
    if not path.is_file() or not zipfile.is_zipfile(path):
        suffix = path.suffix.lower()
        hint = _NOT_READ.get(suffix, "")
        if suffix in SUFFIXES:
            hint = "for a single picture, give the folder that holds it"
        elif suffix == ".zip":
            hint = "what it holds is no zip, or cut off" if path.is_file() else ""
        raise ValueError(f"{str(path)!r} is neither a folder nor a whole zip file" + (f": {hint}" if hint else ""))
    pictures: list[tuple[str, int]] = []
    kinds: Counter[str] = Counter()
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            for position, entry in enumerate(entries):
                if entry.is_dir():
                    continue
                if _is_picture(archive, entry):
                    pictures.append((entry.filename, position))
                else:
                    kinds[os.path.splitext(entry.filename)[1].lower()] += 1
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is a damaged zip file: {error}") from error
    pictures.sort()
    about = path.stat()

    def read() -> Iterator[tuple[str, Callable[[], Any]]]:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            for name, position in pictures:
                yield name, partial(_read_entry, archive, entries[position])

    key = _hash("zip", os.path.realpath(path), about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    return Source(str(path), key, len(pictures), read, [], kinds)


def _is_picture(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    parts = PurePosixPath(entry.filename.replace("\\", "/")).parts
    if any(_hidden(part) for part in parts if part not in (".", "..")):
        return False
    suffix = os.path.splitext(entry.filename)[1].lower()
    if suffix:
        return suffix in SUFFIXES
    try:
        with archive.open(entry) as file:
            return looks_like_image(file.read(16))
    except Exception:  # encrypted, damaged, or compressed in a way that zipfile does not know
        return False


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
        raise SourceError(
            f"CIFAR-10 could not be loaded from the Hugging Face hub ({type(error).__name__}: {reason}). Without "
            "internet, give a folder or a zip of pictures, or name in FASTGAN_DATA a folder with cifar10-train-10k.zip."
        ) from error
    column = next(name for name in ("img", "image") if name in rows.column_names)
    for index in range(len(rows)):
        yield f"cifar10 {index}", lambda: rows[index][column]  # noqa: B023  read before the next one is listed
