"""A corpus: text as token ids in two memory-mapped files, training and validation, with the tokenizer beside them.

::

    corpus.json              what it was made from, counts, and the hash of each file
    train.bin  validation.bin   the ids one after the other, little-endian uint16 or uint32
    tokenizer.json ...       the tokenizer, as ``AutoTokenizer.from_pretrained`` reads it

Written under another name and renamed when it is whole. Needs ``pip install 'fastgan[text]'``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgan.data.text import _LONG_WORD, _fraction, train_tokenizer
from fastgan.data.units import UNITS, Read, TextError, guess_unit, read_units, text_files, where_it_is_wrong

FORMAT = "fastgan-corpus"
VERSION = 1
SPLITS = ("train", "validation")
TOKENIZERS = ("bpe", "wordpiece")
#: of the byte-level tokenizer; the first ends a document
SPECIAL = {"eos": "<|endoftext|>", "pad": "<|pad|>", "cls": "<|cls|>", "sep": "<|sep|>", "mask": "<|mask|>"}
SMALLEST = {"bpe": 256 + len(SPECIAL), "wordpiece": 6}

_SAMPLE = 16 << 20  # bytes of text that a vocabulary is learnt from; the trainer holds its words in memory
_WINDOW = 1 << 18
_PIECE = 1 << 14  # letters that are encoded in one go: the library's memory is a hundred times that
_BATCH = 1 << 20


# ---- tokenizers ----


def train_bpe(texts: Iterable[str], vocab_size: int, lowercase: bool = False) -> Any:
    """A byte-level BPE tokenizer learnt from ``texts``: every text can be written with it, and read back unchanged.

    As GPT-2's, but a newline is always a token of its own, so that lines joined have the tokens of the lines alone.
    Special tokens as in ``SPECIAL``, so that it serves masked models as well as causal ones. With a ``vocab_size`` of
    261 its tokens are the bytes. Raises ValueError for a smaller one.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST["bpe"]:
        raise ValueError(
            f"vocab_size must be at least {SMALLEST['bpe']} (256 bytes and {len(SPECIAL)} special tokens), "
            f"got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\n"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        max_token_length=64,
        show_progress=False,
    )
    tokenizer.train_from_iterator((_LONG_WORD.sub(r"\g<0> ", text) for text in texts), trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL["eos"],
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": token for name, token in SPECIAL.items()},
    )


def _own_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of many kinds, one for each way in which a folder is not a tokenizer's
        raise ValueError(f"{folder}: holds no tokenizer ({(str(error).splitlines() or [''])[0]})") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: its tokenizer has no tokenizer.json, which reading big texts needs")
    return tokenizer


def vocabulary_digest(tokenizer: Any) -> str:
    """A hash of the words and their ids, of nothing else."""
    words = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(words, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


# ---- preparing ----


@dataclass(frozen=True)
class Prepared:
    """What :func:`prepare_text` made: ``counts`` is what stands in ``corpus.json`` under each split's name."""

    folder: Path
    counts: dict[str, dict[str, int]]
    vocabulary: int
    unit: str
    sampled: int
    read: Read


def prepare_text(
    files: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    vocab_size: int = 8192,
    lowercase: bool = False,
    tokenizer: str | os.PathLike[str] = "bpe",
    validation: float = 0.05,
    unit: str = "auto",
    skip_bad_lines: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Trains a tokenizer on text files and writes a corpus: token ids, split for training and validation.

    Args:
        files: UTF-8 text files, or folders of them. They are streamed: memory stays the same whatever their size.
        out: the new folder, written whole or not at all; it may exist if it is empty.
        vocab_size: tokens of the vocabulary; fewer are learnt where the text has no more.
        lowercase: letters are made small (for "wordpiece", accents are taken off as well, as in BERT).
        tokenizer: "bpe" (byte-level; nothing is lost), "wordpiece" (BERT's), or the folder of one that is there.
        validation: share of the lines or paragraphs that is held out, chosen by a hash of each, so that equal ones, up
            to case and spacing, are on one side.
        unit: what is held out or not as a whole: "line", "paragraph" (parted by blank lines) or "auto", which takes
            paragraphs where the first file has blank lines.
        skip_bad_lines: leave out, and count, lines that are not UTF-8 or hold a NUL, instead of refusing the file.
        progress: called with (bytes read, bytes in all).

    The vocabulary is learnt from the training lines alone, and from 16 MB of them spread over the files where there is
    more. Raises ValueError (units.TextError for a file's content), FileNotFoundError, FileExistsError or OSError.
    """
    if unit not in ("auto", *UNITS):
        raise ValueError(f"unit must be auto, {' or '.join(UNITS)}, got {unit!r}")
    if not 0.0 <= validation < 1.0:
        raise ValueError(f"validation must be at least 0 and less than 1, got {validation}")
    kind = str(tokenizer)
    if kind in TOKENIZERS:
        if vocab_size < SMALLEST[kind]:
            raise ValueError(f"vocab_size must be at least {SMALLEST[kind]} for {kind}, got {vocab_size}")
    elif not Path(kind).is_dir():
        raise ValueError(f"tokenizer must be {', '.join(TOKENIZERS)} or the folder of a tokenizer, got {kind!r}")
    found = text_files(list(files))
    sizes = [file.stat().st_size for file in found]
    if not sum(sizes):
        raise ValueError(f"{', '.join(map(str, found[:3])) or 'no file'}: empty, there is no text")
    if unit == "auto":
        unit = guess_unit(next(file for file, size in zip(found, sizes, strict=True) if size))

    with _staged(Path(out)) as folder:
        sampled = Read()
        if kind in TOKENIZERS:
            texts = _sample(found, sizes, unit, validation, sampled)
            if kind == "bpe":
                learnt = train_bpe(texts, vocab_size, lowercase)
            else:
                learnt = train_tokenizer(texts, vocab_size, lowercase)
            del texts
        else:
            learnt = _own_tokenizer(Path(kind))
        learnt.save_pretrained(folder)
        writers = {name: _Writer(folder / f"{name}.bin", len(learnt)) for name in SPLITS}
        read = Read()
        try:
            _encode(found, sum(sizes), unit, validation, learnt, writers, read, skip_bad_lines, progress)
        finally:
            for writer in writers.values():
                writer.close()
        counts = {name: writer.counts for name, writer in writers.items()}
        if not counts["train"]["tokens"]:
            raise ValueError(f"{found[0]}: there is no text to train on in {read.bytes:,} bytes")
        document = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": kind if kind in TOKENIZERS else "own",
            "vocabulary": len(learnt),
            "vocabulary_sha256": vocabulary_digest(learnt),
            "lowercase": lowercase,
            "unit": unit,
            "dtype": writers["train"].dtype.name,
            "sampled_bytes": sampled.bytes,
            "read": vars(read),
            "files": [{"name": str(file), "bytes": size} for file, size in zip(found, sizes, strict=True)],
            **{name: {**counts[name], "sha256": writer.hash.hexdigest()} for name, writer in writers.items()},
        }
        (folder / "corpus.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return Prepared(Path(out), counts, len(learnt), unit, sampled.bytes, read)


@contextlib.contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its name when all went well, and is gone otherwise."""
    if os.path.lexists(out) and not (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        raise FileExistsError(17, "is there already; name a new folder", str(out))
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = out.absolute().parent / f".{out.absolute().name}.partial"
    folder.mkdir(exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(17, "another process is preparing this folder", str(out)) from error
        try:
            for left in folder.iterdir():  # by a process that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield folder
            for path in folder.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            os.fsync(lock)
            os.rename(folder, out.absolute())
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _held_out(text: str, validation: float) -> bool:
    return _fraction(text[:65536], "split:") < validation


def _sample(files: list[Path], sizes: list[int], unit: str, validation: float, read: Read) -> list[str]:
    """Training text: all of it up to ``_SAMPLE`` bytes, else whole lines from windows spread evenly over the files."""
    total = sum(sizes)
    texts: list[str] = []
    for file, size in zip(files, sizes, strict=True):
        share = _SAMPLE * size // total
        if total <= _SAMPLE:
            for text, _, _ in read_units(file, unit, read, skip_bad_lines=True):
                texts += [] if _held_out(text, validation) else [text]
            continue
        windows = max(1, share // _WINDOW)
        with open(file, "rb") as stream:
            for number in range(windows):
                stream.seek(number * size // windows)
                data = stream.read(min(_WINDOW, size // windows))
                read.bytes += len(data)
                # The first and the last line are parts, unless it is all one line.
                lines = data.decode("utf-8", "ignore").replace("\0", "").splitlines()
                lines = lines[1:-1] if len(lines) > 2 else lines
                texts += [line for line in lines if line.strip() and not _held_out(line, validation)]
    if not texts:
        # The sample leaves out what is no text; where nothing else was there, that is what to say.
        wrong = next(filter(None, map(where_it_is_wrong, files)), None)
        raise TextError(wrong) if wrong else ValueError(f"{files[0]}: there is no text to learn a vocabulary from")
    return texts


class _Writer:
    """Appends ids to a file, as the smallest type that holds the vocabulary, and counts."""

    def __init__(self, path: Path, vocabulary: int) -> None:
        self.path = path
        self.dtype = np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")
        self.counts = {"tokens": 0, "units": 0, "characters": 0, "bytes": 0}
        self.hash = hashlib.sha256()
        self._file = open(path, "wb")  # noqa: SIM115  closed by close()

    def write(self, ids: list[int]) -> None:
        data = np.array(ids, dtype=self.dtype).tobytes()
        self.hash.update(data)
        self.counts["tokens"] += len(ids)
        try:
            self._file.write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        self._file.close()


def _encode(
    files: list[Path],
    total: int,
    unit: str,
    validation: float,
    tokenizer: Any,
    writers: dict[str, _Writer],
    read: Read,
    skip_bad_lines: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # what looks like a special token in the text is text
    # WordPiece keeps no newlines: [SEP] stands between its texts. Others keep them, and mark the end of a file.
    parting, ending = tokenizer.sep_token_id, tokenizer.eos_token_id
    newline = "" if ending is None and parting is not None else ("\n\n" if unit == "paragraph" else "\n")
    pending: list[tuple[str, str, bool]] = []  # split, text, whether it ends its unit
    waiting = 0

    def work(batch: list[tuple[str, str, bool]]) -> None:
        encoded = backend.encode_batch_fast([text for _, text, _ in batch], add_special_tokens=False)
        for (side, text, whole), encoding in zip(batch, encoded, strict=True):
            ids = encoding.ids
            if whole and not newline:
                ids = [*ids, parting]
            writers[side].write(ids)
            writers[side].counts["characters"] += len(text)
            writers[side].counts["bytes"] += len(text.encode("utf-8"))

    def flush() -> None:
        nonlocal pending, waiting
        if running:
            running.pop().result()
        running.append(worker.submit(work, pending))
        pending, waiting = [], 0
        if progress is not None:
            progress(min(read.bytes, total), total)

    # One batch is encoded while the next is read: the library leaves Python free.
    running: list[Future[None]] = []
    with ThreadPoolExecutor(1) as worker:
        for file in files:
            side, used = "train", set()
            for text, begins, ends in read_units(file, unit, read, skip_bad_lines):
                if begins:
                    side = SPLITS[_held_out(text, validation)]
                    writers[side].counts["units"] += 1
                used.add(side)
                *parts, last = _pieces(text + newline * ends)
                # Lines that follow each other are encoded together: the library is quicker with longer texts.
                if (
                    newline
                    and not parts
                    and pending
                    and pending[-1][0] == side
                    and len(pending[-1][1]) + len(text) < _PIECE
                ):
                    pending[-1] = (side, pending[-1][1] + last, True)
                else:
                    pending += [(side, part, False) for part in parts]
                    pending.append((side, last, ends))
                waiting += len(text)
                if waiting >= _BATCH:
                    flush()
            flush()
            running.pop().result()
            for side in sorted(used):
                if newline and ending is not None:
                    writers[side].write([ending])


def _pieces(text: str) -> Iterator[str]:
    """Of at most ``_PIECE`` letters, cut before spaces where there are any."""
    while len(text) > _PIECE:
        cut = text.rfind(" ", _PIECE // 2, _PIECE)
        cut = cut if cut > 0 else _PIECE
        yield text[:cut]
        text = text[cut:]
    yield text


# ---- reading ----


class Corpus:
    """A folder that :func:`prepare_text` made. ``ids(split)`` is the memory-mapped array of a split's tokens.

    Raises FileNotFoundError or ValueError, naming the file, where it is not one or is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / "corpus.json"
        if not path.is_file():
            raise FileNotFoundError(2, "holds no corpus of fastgan (no corpus.json); see fastgan prepare text",
                                    str(self.folder))  # fmt: skip
        try:
            self.document: dict[str, Any] = json.loads(path.read_bytes())
            right = self.document["format"] == FORMAT and self.document["version"] == VERSION
            self.dtype = np.dtype(self.document["dtype"]).newbyteorder("<")
            self.counts: dict[str, dict[str, int]] = {name: self.document[name] for name in SPLITS}
            self.vocabulary = int(self.document["vocabulary"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged, or not of fastgan ({error!r})") from error
        if not right:
            raise ValueError(f"{path}: not a corpus that this fastgan reads")
        for name in SPLITS:
            file = self.folder / f"{name}.bin"
            size = file.stat().st_size if file.is_file() else -1
            if size != self.counts[name]["tokens"] * self.dtype.itemsize:
                raise ValueError(f"{file}: damaged, it does not have the size that corpus.json recorded")

    def digest(self) -> str:
        """One hash for the ids and the vocabulary."""
        parts = [self.counts[name]["sha256"] for name in SPLITS] + [self.document["vocabulary_sha256"]]
        return hashlib.sha256("".join(map(str, parts)).encode()).hexdigest()

    def tokenizer(self) -> Any:
        return _own_tokenizer(self.folder)

    def ids(self, split: str) -> np.ndarray:
        if not self.counts[split]["tokens"]:
            return np.zeros(0, self.dtype)
        return np.memmap(self.folder / f"{split}.bin", self.dtype, "r")
