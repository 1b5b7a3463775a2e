"""Text: from files, and the Python language reference that every CPython carries; tokens, blocks, splits.

Needs ``tokenizers`` and ``transformers`` for :func:`train_tokenizer` alone, which imports them when called.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")

#: Chapters for :func:`labelled_sentences`: topics of the reference that are long and far apart in meaning. A sentence
#: that two of them share goes to neither.
CHAPTERS: dict[str, tuple[str, ...]] = {
    "data model": ("specialnames",),
    "compound statements": ("compound",),
    "built-in types": ("types", "objects"),
    "strings": ("string-methods", "formatstrings", "strings"),
    "containers": ("typesseq", "typesseq-mutable", "typesmapping"),
    "debugger": ("debugger",),
}

_RULE = re.compile(r"\s*[-=*~^+|_#]{3,}[-=*~^+| ]*")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]”]*\s+(?=[A-Z\"“*(])")
_SPACE = re.compile(r"\s+")
_LONG_WORD = re.compile(r"\w{100}(?=\w)")


def read_texts(source: str | os.PathLike[str]) -> list[str]:
    """The texts of a file, or of every ``.txt``, ``.md`` and ``.rst`` file of a folder, in the order of their names.

    UTF-8 with or without a byte order mark, lines ended in any way. Hidden files and folders are left out. Raises
    FileNotFoundError where there is nothing at ``source``, OSError naming a file that cannot be read, and ValueError
    naming the file for another encoding or for what is no text, or where there is no text at all.
    """
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        found = (Path(folder, name) for folder, subfolders, names in _walk(path) for name in names)
        files = sorted(file for file in found if file.suffix.lower() in (".txt", ".md", ".rst"))
    elif os.path.isfile(path):
        files = [path]
    else:
        raise FileNotFoundError(f"no file or folder at {str(source)!r}")
    texts = [text for text in map(_read_text, files) if text.strip()]
    if not texts:
        raise ValueError(f"no text in {str(source)!r}: {len(files)} .txt, .md or .rst files looked at")
    return texts


def _walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk without what is hidden; links to folders are not followed."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield folder, subfolders, [name for name in names if not name.startswith(".")]


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{str(file)!r} is UTF-16 text; save it as UTF-8")
    if b"\0" in data:
        raise ValueError(f"{str(file)!r} is not text: byte {data.index(0)} is zero")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is not UTF-8 text: byte {error.start} cannot be read") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def python_reference() -> dict[str, str]:
    """The topics of the Python language reference (``pydoc_data.topics``), topic to text.

    Cleaned: one paragraph a line, without the rules under headings and around tables, without runs of spaces.
    """
    from pydoc_data.topics import topics

    return {name: "\n".join(paragraphs(text)) for name, text in sorted(topics.items())}


def paragraphs(text: str) -> list[str]:
    """The paragraphs of wrapped plain text, each unwrapped into one line."""
    found = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip().strip("|").strip() for line in block.splitlines() if not _RULE.fullmatch(line)]
        line = _SPACE.sub(" ", " ".join(lines)).strip()
        if line:
            found.append(line)
    return found


def unique_paragraphs(texts: Iterable[str]) -> list[str]:
    """Every line of ``texts`` once, in the order of first appearance: the reference prints whole sections twice."""
    return list(dict.fromkeys(line for text in texts for line in text.splitlines() if line.strip()))


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph of prose; headings, code and tables give none."""
    if any(sign in paragraph for sign in (">>>", "::=", "(Pdb)", " | ")):
        return []
    found = []
    for sentence in _SENTENCE_END.split(paragraph.lstrip("*- ")):
        words = re.findall(r"[A-Za-z]{2,}", sentence)
        letters = sum(character.isalpha() or character == " " for character in sentence)
        if (
            len(words) >= 6
            and sentence.rstrip("\"')]”").endswith((".", "!", "?", ":"))
            and letters > 0.75 * len(sentence)
        ):
            found.append(sentence)
    return found


def labelled_sentences(
    chapters: dict[str, tuple[str, ...]] | None = None, per_chapter: int | None = None
) -> tuple[list[str], list[int], list[str]]:
    """Sentences of the Python reference with the chapter each comes from: (sentences, labels, chapter names).

    Each sentence appears once; one that two chapters share is left out. ``per_chapter`` keeps at most so many of each,
    chosen by hash, the same in every run. Chapters of which this Python's reference has nothing are left out.
    """
    reference = python_reference()
    owners: dict[str, set[str]] = defaultdict(set)
    for chapter, topics in (CHAPTERS if chapters is None else chapters).items():
        for topic in topics:
            for paragraph in reference.get(topic, "").splitlines():
                for sentence in sentences(paragraph):
                    owners[sentence].add(chapter)
    by_chapter: dict[str, list[str]] = defaultdict(list)
    for sentence, found_in in owners.items():
        if len(found_in) == 1:
            by_chapter[next(iter(found_in))].append(sentence)
    names = list(by_chapter)
    result: list[tuple[str, int]] = []
    for label, chapter in enumerate(names):
        chosen = sorted(by_chapter[chapter], key=_fraction)[:per_chapter]
        result += [(sentence, label) for sentence in chosen]
    result.sort(key=lambda pair: _fraction(pair[0]))
    return [sentence for sentence, _ in result], [label for _, label in result], names


def _fraction(text: str, salt: str = "") -> float:
    """A number in [0, 1) that depends on the words of the text alone (case and spaces do not count)."""
    normal = salt + " ".join(text.split()).lower()
    return (
        int.from_bytes(hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") / 2**64
    )


def split_by_hash(texts: Sequence[str], validation: float = 0.1, salt: str = "") -> tuple[list[int], list[int]]:
    """Indices of (training, validation) texts, chosen by a hash of each text.

    Equal texts, up to case and spacing, fall on the same side, so that none is validated on that was trained on; and
    a text keeps its side when others come or go. About ``validation`` (in [0, 1]) of the texts are in the second list.
    """
    if not 0.0 <= validation <= 1.0:
        raise ValueError(f"validation must be between 0 and 1, got {validation}")
    training: list[int] = []
    held_out: list[int] = []
    for index, text in enumerate(texts):
        (held_out if _fraction(text, "split:" + salt) < validation else training).append(index)
    return training, held_out


def list_of_texts(texts: Iterable[str]) -> list[str]:
    """Those that are not blank. One string alone is one text: its letters are not."""
    texts = [texts] if isinstance(texts, (str, bytes)) else list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"texts must be strings, got {type(text).__name__}")
    return [text for text in texts if text.strip()]


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 4096, lowercase: bool = True, max_length: int = 512
) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer with BERT's special tokens, learnt from ``texts``.

    Returns a transformers fast tokenizer: ``[CLS] text [SEP]``, ``mask_token``, ``save_pretrained(folder)``, and read
    back by ``AutoTokenizer.from_pretrained(folder)``. The same texts give the same vocabulary in the same order. It has
    fewer words than ``vocab_size`` where the texts have no more, and more where their letters alone are more.
    Raises ValueError where ``vocab_size`` does not hold the five special tokens or there is no text, and TypeError for
    texts that are no strings.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    if vocab_size <= len(special):
        raise ValueError(f"vocab_size must be more than the {len(special)} special tokens, got {vocab_size}")
    texts = list_of_texts(texts)
    if not texts:
        raise ValueError("there is no text to learn a vocabulary from")
    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()
    # A word of a hundred thousand letters (a file without spaces) takes the trainer minutes, being quadratic in it.
    texts = [_LONG_WORD.sub(r"\g<0> ", normalizer.normalize_str(text)) for text in texts]
    # The trainer numbers the letters within words in the order of a hash table, another one in each run, and decides by
    # these numbers which of two equally frequent pairs to join. Told of them beforehand, it keeps this order.
    words = (word for text in texts for word, _ in pre_tokenizer.pre_tokenize_str(text))
    within = sorted({letter for word in words for letter in word[1:]})
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special.values(), *(f"##{letter}" for letter in within)],
        show_progress=False,
        min_frequency=2,
    )
    learner = Tokenizer(models.WordPiece(unk_token=special["unk"]))
    learner.pre_tokenizer = pre_tokenizer
    learner.train_from_iterator(texts, trainer)
    learnt = sorted(set(learner.get_vocab()) - set(special.values()))
    numbered = {word: number for number, word in enumerate([*special.values(), *learnt])}
    tokenizer = Tokenizer(models.WordPiece(vocab=numbered, unk_token=special["unk"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(special.values()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", tokenizer.token_to_id("[CLS]")), ("[SEP]", tokenizer.token_to_id("[SEP]"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in special.items()},
    )


def pack(sequences: Iterable[Sequence[int]], length: int, cls_id: int, sep_id: int) -> torch.Tensor:
    """Token sequences (without special tokens) joined and cut into full blocks: int64 (blocks, length).

    Every block is ``[CLS] ... [SEP]``, and one [SEP] stands between two sequences; what does not fill the last block
    is left out. Raises ValueError where not even one block is filled.
    """
    if length < 3:
        raise ValueError(f"length must be at least 3, got {length}")
    stream: list[int] = []
    for sequence in sequences:
        stream += [*sequence, sep_id]
    body = length - 2
    count = len(stream) // body
    if count == 0:
        raise ValueError(f"{len(stream)} tokens do not fill a block of {length}")
    blocks = torch.full((count, length), sep_id, dtype=torch.int64)
    blocks[:, 0] = cls_id
    blocks[:, 1:-1] = torch.tensor(stream[: count * body], dtype=torch.int64).view(count, body)
    return blocks


_EXCEPTION = re.compile(r"\w*(?:Error|Exception|StopIteration|Interrupt|Warning)\b")


def exceptions_told_of() -> list[tuple[str, str, str]]:
    """Sentences of the Python reference that name one exception, once: (exception, sentence, the same without it).

    Each sentence appears once; in the third the exception's name is an ellipsis.
    """
    found: dict[str, tuple[str, str, str]] = {}
    for paragraph in unique_paragraphs(python_reference().values()):
        for sentence in sentences(paragraph):
            named = [each for each in _EXCEPTION.finditer(sentence) if each[0] not in ("Error", "Exception", "Warning")]
            if len(named) == 1:
                first, last = named[0].span()
                found[sentence] = (named[0][0], sentence, f"{sentence[:first]}…{sentence[last:]}")
    return list(found.values())
