"""What stands beside the models in ``benchmarks.quality``: the same data without a network, or with a frozen one."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastgan.data.documents import sentences_of

# ---- sentiment ----


def linear_on_words(train: Any, dev: Any) -> float:
    """Accuracy in percent of logistic regression on tf-idf of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=1000))
    return 100 * float(model.fit(train.texts, train.labels).score(dev.texts, dev.labels))


def linear_on_frozen(train: Any, dev: Any, encoder: tuple[Any, Any]) -> float:
    """The same on a frozen encoder's embeddings."""
    from sklearn.linear_model import LogisticRegression

    from fastgan.training.retrieval import embed

    model = LogisticRegression(max_iter=1000).fit(embed(*encoder, train.texts), train.labels)
    return 100 * float(model.score(embed(*encoder, dev.texts), dev.labels))


# ---- summaries ----


def nearest_to_mean(documents: Sequence[str], encoder: tuple[Any, Any]) -> list[str]:
    """Of each document the sentence whose embedding is nearest to the mean of all of its sentences'."""
    from fastgan.training.retrieval import embed

    pieces = [sentences_of(each) for each in documents]
    vectors = embed(*encoder, [sentence for own in pieces for sentence in own])
    lines, start = [], 0
    for own in pieces:
        part = vectors[start : start + len(own)]
        start += len(own)
        lines.append(own[int((part @ part.mean(0)).argmax())])
    return lines


def best_single(documents: Sequence[str], summaries: Sequence[Sequence[str]]) -> list[str]:
    """Of each document the sentence that the summaries themselves choose: no extraction can do better."""
    from fastgan.training.extract import best_sentences

    lines = []
    for document, own in zip(documents, summaries, strict=True):
        pieces = sentences_of(document)
        lines.append(pieces[best_sentences(pieces, own, 1)[0]])
    return lines


# ---- question answering ----

_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"[$£€]?\d[\d,.]*\d|\d")
_NAME = re.compile(r"(?:[A-Z][\w'’-]*)(?:\s+(?:of|the|and|de|von|van)?\s*[A-Z][\w'’-]*)*")
_CHUNK = re.compile(r"[^,;:()\"“”]+")
_ASKS_NUMBER = re.compile(
    r"\bhow (?:many|much|long|old|far|tall|large|big)\b|\bwhen\b|\bwhat (?:year|percent|date)\b", re.I
)
_ASKS_NAME = re.compile(r"\bwho\b|\bwhom\b|\bwhose\b|\bwhere\b|\bwhich\b", re.I)


def spans_without_network(questions: Sequence[Any]) -> dict[str, list[str]]:
    """Answers by three rules, each in the sentence that shares most with the question (words weighted by idf).

    "sentence": all of it. "chunk": its piece between commas that shares least with the question, as what is asked for
    is not in the question. "kind": a number where a number is asked for, a name where a name is, else a chunk, the one
    nearest to the question's words in the sentence (Richardson et al.'s sliding window, 2013, on candidates).
    """
    pieces = {text: sentences_of(text) for text in dict.fromkeys(each.context for each in questions)}
    seen = Counter(word for own in pieces.values() for sentence in own for word in set(_words(sentence)))
    total = sum(map(len, pieces.values()))

    def weight(words: Any) -> float:
        return sum(np.log((1 + total) / (1 + seen[word])) for word in set(words))

    answers: dict[str, list[str]] = {"sentence": [], "chunk": [], "kind": []}
    for each in questions:
        asked = set(_words(each.question))
        sentence = max(pieces[each.context], key=lambda text: weight(asked & set(_words(text))))
        answers["sentence"].append(sentence)
        chunks = [found.group().strip() for found in _CHUNK.finditer(sentence) if found.group().strip()]
        chunk = min(chunks, key=lambda text: weight(asked & set(_words(text))) / max(1e-9, weight(_words(text))))
        answers["chunk"].append(chunk)
        pattern = _NUMBER if _ASKS_NUMBER.search(each.question) else _NAME if _ASKS_NAME.search(each.question) else None
        found = [one for one in pattern.finditer(sentence) if not set(_words(one.group())) & asked] if pattern else []
        if not found:
            answers["kind"].append(chunk)
            continue
        places = [one.start() for one in _WORD.finditer(sentence) if one.group().lower() in asked] or [0]
        answers["kind"].append(min(found, key=lambda one: np.mean([abs(one.start() - at) for at in places])).group())
    return answers


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


# ---- generation ----


def kneser_ney(train: str, validation: str, order: int = 5) -> float:
    """Nats a character of an interpolated Kneser-Ney model (Chen and Goodman 1999), each order with its own discount.

    The highest order counts how often, the lower ones after how many different letters. The lowest mixes with all
    letters of both texts alike.
    """
    letters = len(set(train) | set(validation))
    counts = [Counter(train[at : at + order] for at in range(len(train) - order + 1))]
    for _ in range(order - 1):
        counts.insert(0, Counter(gram[1:] for gram in counts[0]))
    tables = []
    for own in counts:  # of one letter, two, ...
        once, twice = (sum(count == number for count in own.values()) for number in (1, 2))
        totals: dict[str, int] = defaultdict(int)
        kinds: dict[str, int] = defaultdict(int)
        for gram, count in own.items():
            totals[gram[:-1]] += count
            kinds[gram[:-1]] += 1
        tables.append((own, once / (once + 2 * twice) if once else 0.5, totals, kinds))
    total = 0.0
    for at in range(order - 1, len(validation)):
        chance = 1 / letters
        for size, (own, discount, totals, kinds) in enumerate(tables, 1):
            gram = validation[at - size + 1 : at + 1]
            if all_of := totals.get(gram[:-1], 0):
                chance = (max(own.get(gram, 0) - discount, 0) + discount * kinds[gram[:-1]] * chance) / all_of
        total -= np.log(chance)
    return total / (len(validation) - order + 1)
