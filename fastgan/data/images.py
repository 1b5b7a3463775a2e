"""Pictures as one memory-mapped uint8 array, decoded once: later epochs, and later runs, read at memory speed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fastgan._cache import cache_folder
from fastgan.data.decode import DECODER_VERSION, MODES, decode
from fastgan.data.sources import Source, advice, open_source

#: how many skipped files a warning names; ImageArray.skipped has all of them
_NAMED = 10


class ImageArray(torch.utils.data.Dataset):
    """Pictures in memory order: what :func:`load_images` returns.

    Attributes:
        pixels: uint8 numpy array (N, C, H, W), memory-mapped read-only from the cache where there is one.
        digest: hexadecimal hash of shape and pixels: equal digests are equal training data, wherever the files lie.
        skipped: (file, reason) for each picture that could not be used.
        ignored: how many files of the source are no pictures.
        path: the cache file, or None where the pixels are in memory.

    ``len(images)`` is N; ``images[i]`` is one float32 picture (C, H, W) in [-1, 1], so that a DataLoader takes it too.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        digest: str | None = None,
        skipped: Sequence[tuple[str, str]] = (),
        ignored: int = 0,
        path: Path | None = None,
    ) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim != 4:
            raise ValueError(f"pixels must be uint8 (N, C, H, W), got {pixels.dtype} {tuple(pixels.shape)}")
        self.pixels = pixels
        self.digest = digest if digest is not None else pixel_digest(pixels)
        self.skipped = [tuple(entry) for entry in skipped]
        self.ignored = ignored
        self.path = path

    def __len__(self) -> int:
        return self.pixels.shape[0]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return self.pixels.shape

    def __repr__(self) -> str:
        count, channels, height, width = self.shape
        return f"ImageArray({count} pictures, {channels}x{height}x{width}, {len(self.skipped)} skipped)"

    def batch(
        self, indices: Any, flip: bool | torch.Generator | torch.Tensor | np.ndarray | Sequence[bool] = False
    ) -> torch.Tensor:
        """The pictures at ``indices`` as float32 (B, C, H, W) in [-1, 1]; 0 becomes -1 and 255 becomes 1, exactly.

        ``indices``: a sequence, array or tensor of integers, or a slice. ``flip`` mirrors left and right: a boolean
        for each picture, a generator that draws one with probability one half, or True for all.
        """
        if isinstance(indices, slice):
            chosen = np.arange(*indices.indices(len(self)))
        else:
            chosen = np.asarray(indices)
            if chosen.size == 0:
                chosen = chosen.astype(np.int64)
            if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
                raise TypeError(f"indices must be one row of integers, got {chosen.dtype} {tuple(chosen.shape)}")
        pixels = torch.from_numpy(np.take(self.pixels, chosen, axis=0))  # raises IndexError out of range
        mirrored = _flips(flip, len(chosen))
        if mirrored is not None:
            pixels[mirrored] = pixels[mirrored].flip(-1)
        return pixels.to(torch.float32).div_(127.5).sub_(1.0)

    def __getitem__(self, index: int) -> torch.Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        return self.batch([index])[0]

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return list(self.batch(indices))

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker maps the file again; pickled as it stands, the array would be copied to each of them.
        state = self.__dict__.copy()
        if self.path is not None:
            state["pixels"] = self.shape
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.path is not None:
            self.pixels = np.memmap(self.path, np.uint8, "r", shape=state["pixels"])


def _flips(flip: Any, count: int) -> torch.Tensor | None:
    if isinstance(flip, torch.Generator):
        return torch.rand(count, generator=flip) < 0.5
    if isinstance(flip, (bool, np.bool_)):
        return torch.ones(count, dtype=torch.bool) if flip else None
    mask = torch.as_tensor(flip)
    if mask.dtype != torch.bool or mask.shape != (count,):
        raise ValueError(
            f"flip must be {count} booleans, a generator or a boolean, got {mask.dtype} {tuple(mask.shape)}"
        )
    return mask


def pixel_digest(pixels: np.ndarray) -> str:
    """Hexadecimal hash of a uint8 array's shape and content."""
    digest = hashlib.blake2b(digest_size=16)
    flat = pixels.reshape(-1)
    for start in range(0, flat.size, 2**24):
        digest.update(np.ascontiguousarray(flat[start : start + 2**24]).data)
    digest.update(repr(tuple(int(size) for size in pixels.shape)).encode())
    return digest.hexdigest()


def load_images(
    source: str | os.PathLike[str] | Literal["cifar10", "digits"],
    image_size: int = 64,
    channels: int = 3,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> ImageArray:
    """Load pictures, resized and centre-cropped to ``image_size``, decoding each file only once.

    Args:
        source: a folder (flat, nested or mixed), a zip file (read in place), ``"digits"`` (the 1,797 handwritten
            digits of scikit-learn) or ``"cifar10"`` (``cifar10-train-10k.zip`` of the ``FASTGAN_DATA`` folder where
            there is one, else through Hugging Face ``datasets``). A folder of such a name is written ``./digits``.
        image_size: height and width, at least 8.
        channels: 1 grey, 2 grey with alpha, 3 RGB, 4 RGBA; another number for ``.npy`` files (H, W, channels) only.
        cache_dir: where the decoded array is kept; default ``FASTGAN_CACHE``, else ``XDG_CACHE_HOME/fastgan``, else
            ``~/.cache/fastgan``. Where it cannot be written the array is kept in memory, after one warning.
        progress: a bar on a terminal, one line elsewhere, on standard error.

    Files that are no pictures are ignored and counted. A picture that is broken or cannot be read is skipped, named in
    a warning, and listed in ``skipped``. See :mod:`fastgan.data.decode` for colours, transparency and rotation. The
    order is by name, the same on every machine. The cache is keyed by paths, sizes, times and the arguments; it is
    checked when read, and made again if damaged; processes that make it at once do not disturb each other.

    Raises ValueError where no picture can be used, FileNotFoundError for a path that is not there, ImportError or
    RuntimeError where scikit-learn or CIFAR-10 cannot be had.
    """
    for name, value, least in (("image_size", image_size, 8), ("channels", channels, 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    listing = open_source(source)
    key = hashlib.sha256(repr((DECODER_VERSION, listing.key, image_size, channels)).encode()).hexdigest()[:32]
    shape = (channels, image_size, image_size)
    folder = _cache_folder(cache_dir)

    images = _read_cache(folder, key, shape) if folder is not None else None
    if images is None and folder is not None:
        try:
            images = _build_cached(listing, folder, key, shape, progress)
        except _CacheError as error:
            warnings.warn(
                f"the decoded pictures cannot be kept in {str(folder)!r} ({error}); they stay in memory and are "
                "decoded again next time. cache_dir= or FASTGAN_CACHE names another folder.",
                stacklevel=2,
            )
    if images is None:
        images = _build_in_memory(listing, shape, progress)
    images.ignored = listing.ignored
    if images.skipped:
        named = "; ".join(f"{_shown(name)} ({reason})" for name, reason in images.skipped[:_NAMED])
        more = len(images.skipped) - _NAMED
        warnings.warn(
            f"{len(images.skipped)} of {len(images) + len(images.skipped)} pictures in {listing.name!r} were skipped: "
            f"{named}{f'; and {more} more' if more > 0 else ''}",
            stacklevel=2,
        )
    return images


def _shown(name: str) -> str:
    """A file's name on one line, whatever bytes it is made of."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


class _CacheError(Exception):
    """The cache folder cannot be written: not the pictures' fault."""


def _cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path | None:
    folder = Path(cache_dir).expanduser() if cache_dir else cache_folder()
    if folder is None:
        warnings.warn("no home folder to keep decoded pictures in; they stay in memory", stacklevel=3)
        return None
    return folder / "images"


def _read_cache(folder: Path, key: str, shape: tuple[int, int, int]) -> ImageArray | None:
    """The array of an earlier call, or None if there is none or it is not what was written."""
    try:
        about = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        path = folder / f"{key}.pixels"
        pixels = np.memmap(path, np.uint8, "r", shape=(int(about["count"]), *shape))
        if path.stat().st_size != pixels.size or pixel_digest(pixels) != about["digest"]:
            return None
        return ImageArray(pixels, about["digest"], [(str(name), str(why)) for name, why in about["skipped"]], path=path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def _build_cached(
    listing: Source, folder: Path, key: str, shape: tuple[int, int, int], progress: bool
) -> ImageArray | None:
    """Decode into a private file and rename it when whole, the description last.

    Two processes at once write the same bytes, so whichever rename comes last changes nothing.
    """
    temporary: list[Path] = []
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_stale(folder)
            pixels_file = _temporary(folder, temporary)
        except OSError as error:
            raise _CacheError(error.strerror or str(error)) from error
        with _closed(pixels_file):

            def write(picture: np.ndarray) -> None:
                try:
                    pixels_file.write(picture.data)
                except OSError as error:
                    raise _CacheError(error.strerror or str(error)) from error

            count, digest, skipped = _decode_all(listing, shape, write, progress)
            try:
                pixels_file.flush()
                os.fsync(pixels_file.fileno())
                about = {"count": count, "shape": shape, "digest": digest, "source": listing.name, "skipped": skipped}
                with _temporary(folder, temporary) as about_file:
                    about_file.write(json.dumps(about).encode())
            except OSError as error:
                raise _CacheError(error.strerror or str(error)) from error
        try:
            os.replace(temporary[0], folder / f"{key}.pixels")
            os.replace(temporary[1], folder / f"{key}.json")
        except OSError as error:
            raise _CacheError(error.strerror or str(error)) from error
        images = _read_cache(folder, key, shape)
        if images is None:
            raise _CacheError("what was written there could not be read back")
        return images
    finally:
        for path in temporary:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _closed(file: Any) -> Iterator[None]:
    """Closes a file whose content counts only once it was flushed: on a full disk, closing fails a second time."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.close()


def _temporary(folder: Path, made: list[Path]) -> Any:
    handle, name = tempfile.mkstemp(prefix=".writing-", dir=folder)
    made.append(Path(name))
    return os.fdopen(handle, "wb")


def _remove_stale(folder: Path) -> None:
    """Delete what processes killed while writing left behind, a day later."""
    for path in folder.glob(".writing-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 86_400:
                path.unlink()


def _build_in_memory(listing: Source, shape: tuple[int, int, int], progress: bool) -> ImageArray:
    buffer = bytearray()
    count, digest, skipped = _decode_all(listing, shape, lambda picture: buffer.extend(picture.data), progress)
    return ImageArray(np.frombuffer(buffer, np.uint8).reshape(count, *shape), digest, skipped)


def _decode_all(
    listing: Source, shape: tuple[int, int, int], write: Callable[[np.ndarray], Any], progress: bool
) -> tuple[int, str, list[tuple[str, str]]]:
    """Decode every picture in order and hand it to ``write``; (count, digest, skipped)."""
    channels, image_size, _ = shape
    digest = hashlib.blake2b(digest_size=16)
    skipped = list(listing.skipped)
    count, tried = 0, len(skipped)
    started = time.perf_counter()
    with _progress(listing.count, progress) as advance:
        for name, read in listing.read():
            tried += 1
            try:
                picture = decode(read(), image_size, channels)
            except Exception as error:  # Pillow's decoders raise a dozen kinds for a broken file
                said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                reason = " ".join(said.split())[:200] or type(error).__name__
                skipped.append((name, reason))
            else:
                write(picture)
                digest.update(picture.data)
                count += 1
            advance()
    if count == 0:
        first = f"; the first: {_shown(skipped[0][0])}: {skipped[0][1]}" if skipped else ""
        raise ValueError(
            f"no usable picture in {listing.name!r}: {tried} picture files tried, {len(skipped)} could not be used, "
            f"{listing.ignored} other files ignored{advice(listing.kinds)}{first}"
            + ("" if channels in MODES else f" (channels={channels} needs .npy files with that many)")
        )
    digest.update(repr((count, *shape)).encode())
    if progress and not sys.stderr.isatty():
        seconds = time.perf_counter() - started
        print(
            f"decoded {count:,} pictures of {listing.name} to {image_size}x{image_size} in {seconds:.1f} s, "
            f"{len(skipped)} skipped",
            file=sys.stderr,
        )
    return count, digest.hexdigest(), skipped


@contextlib.contextmanager
def _progress(total: int | None, wanted: bool) -> Iterator[Callable[[], None]]:
    if not wanted or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("decoding pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
