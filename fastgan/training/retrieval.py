"""Finding the passages that a question is about: by the words it shares (BM25), by meaning (an encoder), or by both.

The questions are known before the passages are read, so nothing is stored of a passage but what they need: BM25 keeps
the counts of the questions' words, the dense search the best so far. Memory stays small however long the texts are.
"""

from __future__ import annotations

import array
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastgan.data.grouped import batches_of_like_length
from fastgan.data.squad import read_questions
from fastgan.metrics.results import SAMPLES, SEED, Evaluation, Result, interval
from fastgan.training.hub import encode, evaluating, most_tokens

KINDS = ("bm25", "dense", "both")
MOST = 100  # passages that each search hands on to be combined
_STEM = 6  # letters of a word that count: "plague" is found by "plagues", in any language and without a word list
_WORD = re.compile(r"\w+")
_POOL = 512  # passages that are sorted by length and encoded together
_LENGTH = 256  # tokens of a passage that the encoder reads
_SHARE = 0.4  # of BM25 in "both"; from 0.35 to 0.5 the recall on XQuAD hardly differs


@dataclass(frozen=True)
class Found:
    """Passages for a question, best first: their numbers in the order of reading, int64, and scores, float32."""

    numbers: np.ndarray
    scores: np.ndarray


def words_of(text: str) -> list[str]:
    """What BM25 compares: words in small letters, cut to their first six."""
    return [word[:_STEM] for word in _WORD.findall(text.lower())]


class _Counted:
    """Passages for bm25s, as lists of ids that are made when they are asked for: 0 is any word of no question."""

    def __init__(self, questions: Sequence[Sequence[str]]) -> None:
        self.vocab = {"": 0}
        for word in itertools.chain.from_iterable(questions):
            self.vocab.setdefault(word, len(self.vocab))
        self.ids = self
        self._ids, self._ends, self._lengths = array.array("I"), array.array("Q", [0]), array.array("I")

    def add(self, text: str) -> None:
        words = words_of(text)
        self._ids.extend(self.vocab[word] for word in words if word in self.vocab)
        self._ends.append(len(self._ids))
        self._lengths.append(len(words))

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[list[int]]:
        for number, length in enumerate(self._lengths):
            known = self._ids[self._ends[number] : self._ends[number + 1]]
            yield [0] * (length - len(known)) + list(known)


def bm25(questions: Sequence[str], passages: Iterable[str], most: int = MOST) -> list[Found]:
    """BM25 (Lucene's form, k1 = 1.5, b = 0.75) by bm25s; passages that share no word with a question are not found."""
    try:
        from bm25s import BM25
    except ImportError as error:
        raise ImportError(f"BM25 needs bm25s ({error}): pip install 'fastgan[retrieval]'") from None

    asked = [words_of(question) for question in questions]
    counted = _Counted(asked)
    for text in passages:
        counted.add(text)
    index = BM25(method="lucene", k1=1.5, b=0.75)
    index.index(counted, create_empty_token=False, show_progress=False)
    found = []
    for words in asked:
        ids = [counted.vocab[word] for word in words]
        scores = index.get_scores_from_ids(ids) if ids else np.zeros(len(counted), np.float32)
        found.append(_best(np.flatnonzero(scores > 0), scores[scores > 0], most))
    return found


def _best(numbers: np.ndarray, scores: np.ndarray, most: int) -> Found:
    """The best, the earliest of equals first."""
    order = np.lexsort((numbers, -scores))[:most]
    return Found(numbers[order].astype(np.int64), scores[order].astype(np.float32))


@torch.no_grad()
def embed(network: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
    """The mean of an encoder's last hidden states over each text's tokens, at length 1: float32 (texts, width).

    ``network``: a transformers encoder, or a model with a head on one. The first 256 tokens of a text are read.
    """
    encoder, device = getattr(network, "base_model", network), next(network.parameters()).device
    ids, _ = encode(tokenizer, texts, most_tokens(network, tokenizer, _LENGTH))
    found = np.zeros((len(texts), network.config.hidden_size), np.float32)
    for chosen in batches_of_like_length([len(each) for each in ids], batch_size):
        batch = tokenizer.pad({"input_ids": [ids[index] for index in chosen]}, return_tensors="pt").to(device)
        hidden = encoder(**batch)[0].float()  # (B, S, width)
        real = batch["attention_mask"][..., None].float()
        mean = (hidden * real).sum(1) / real.sum(1).clamp(min=1)
        found[chosen] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
    return found


def dense(questions: Sequence[str], passages: Iterable[str], encoder: tuple[Any, Any], most: int = MOST) -> list[Found]:
    """The passages whose embeddings are nearest to the question's, by cosine. ``encoder``: (model, tokenizer)."""
    asked = embed(*encoder, questions)
    best = [Found(np.zeros(0, np.int64), np.zeros(0, np.float32))] * len(questions)
    passages, first = iter(passages), 0
    while pool := list(itertools.islice(passages, _POOL)):
        scores = asked @ embed(*encoder, pool).T
        numbers = np.arange(first, first + len(pool))
        first += len(pool)
        best = [_best(np.concatenate([known.numbers, numbers]), np.concatenate([known.scores, row]), most)
                for known, row in zip(best, scores, strict=True)]  # fmt: skip
    return best


def combine(left: Sequence[Found], right: Sequence[Found], share: float = _SHARE, most: int = MOST) -> list[Found]:
    """Two searches as one: each question's scores brought to [0, 1], ``share`` of the left's, the rest the right's.

    What only one of them found has 0 from the other.
    """
    found = []
    for pair in zip(left, right, strict=True):
        total: dict[int, float] = {}
        for each, weight in zip(pair, (share, 1 - share), strict=True):
            low = each.scores[-1] if len(each.scores) > 1 else 0.0
            scaled = (each.scores - low) / max(each.scores[0] - low, 1e-9) if len(each.scores) else each.scores
            for number, score in zip(each.numbers.tolist(), scaled.tolist(), strict=True):
                total[number] = total.get(number, 0.0) + weight * score
        numbers = np.array(list(total), np.int64)
        found.append(_best(numbers, np.array(list(total.values()), np.float32), most))
    return found


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"retrieval must be one of {', '.join(KINDS)}, got {kind!r}")


def retrieve(
    questions: Sequence[str],
    read: Callable[[], Iterable[str]],
    kind: str = "both",
    encoder: tuple[Any, Any] | None = None,
    most: int = MOST,
) -> list[Found]:
    """The best ``most`` passages for each question. ``read`` begins to read the passages anew each time it is called.

    ``kind``: "bm25", "dense" (which needs an ``encoder``: (model, tokenizer)) or "both" combined. Raises ValueError.
    """
    check_kind(kind)
    if kind != "bm25" and encoder is None:
        raise ValueError(f"retrieval {kind} needs an encoder")
    each = MOST if kind == "both" else most
    words = bm25(questions, read(), max(each, most)) if kind != "dense" else None
    meaning = dense(questions, read(), encoder, max(each, most)) if kind != "bm25" and encoder is not None else None
    if words is not None and meaning is not None:
        return combine(words, meaning, most=most)
    return words or meaning or []


def evaluate_retrieval(
    data: Sequence[str | os.PathLike[str]],
    model: str | os.PathLike[str] | tuple[Any, Any] | None = None,
    *,
    retrieval: str = "both",
    ranks: Sequence[int] = (1, 5),
    samples: int = SAMPLES,
    seed: int = SEED,
    attention: str = "fastgan",
) -> Evaluation:
    """How often a question's own text is among the best, all texts of SQuAD's files being looked through: R@1, R@5.

    Args:
        data: SQuAD's JSON files; each different text is a passage, whole.
        model: the encoder, for "dense" and "both": a folder, a name on the hub, or a (model, tokenizer) pair.
        retrieval: "bm25", "dense" or "both".
        ranks: the numbers of passages that are looked at.

    Raises ValueError (TextError for what a file holds) or FileNotFoundError, naming the file, folder or argument.
    """
    check_kind(retrieval)
    questions = [each for path in data for each in read_questions(path)]
    texts = {text: number for number, text in enumerate(dict.fromkeys(each.context for each in questions))}
    asked = [each.question for each in questions]
    if retrieval == "bm25":
        found = retrieve(asked, lambda: texts, retrieval, most=max(ranks))
    else:
        if model is None:
            raise ValueError(f"model must name an encoder for retrieval {retrieval}")
        with evaluating(model, "AutoModel", attention, "embeddings", whole=False) as encoder:
            found = retrieve(asked, lambda: texts, retrieval, encoder, most=max(ranks))
    results = []
    signature = f"retrieval:{retrieval}|questions:{len(asked)}|passages:{len(texts)}|bs:{samples}|seed:{seed}"
    for rank in ranks:
        pairs = zip(questions, found, strict=True)
        right = [100.0 * (texts[each.context] in one.numbers[:rank]) for each, one in pairs]
        score, (low, high) = float(np.mean(right)), interval(right, samples, seed) if samples else (None, None)
        shown = "" if low is None else f" (95 %: {low:.2f} to {high:.2f})"
        name = f"R@{rank}"
        results.append(Result(name, score, low, high, signature, f"{name}|{signature} = {score:.2f}{shown}"))
    return Evaluation(results)
