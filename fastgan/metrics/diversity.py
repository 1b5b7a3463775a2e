"""How varied generated text is: distinct-n and self-BLEU. Both stand beside a measure of quality, never alone."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from fastgan.metrics.results import SAMPLES, SEED, Evaluation, Result, check_samples, interval
from fastgan.metrics.translation import _sacrebleu


def distinct(hypotheses: Sequence[str], *, orders: Sequence[int] = (1, 2, 3), lowercase: bool = False) -> Evaluation:
    """distinct-n: different n-grams over all n-grams of all lines together (Li et al. 2016); words end at white space.

    It falls with the amount of text, so compare equal numbers of words (the details tell them). No interval: a resample
    with replacement holds lines twice, and is less varied for that alone.

    Raises:
        ValueError: no lines, or an order below 1.
    """
    _check(hypotheses, 1)
    if not orders or min(orders) < 1:
        raise ValueError(f"orders must be 1 or more, got {list(orders)}")
    lines = [(line.lower() if lowercase else line).split() for line in hypotheses]
    words = sum(map(len, lines))
    results = []
    for order in orders:
        total = sum(max(0, len(line) - order + 1) for line in lines)
        kinds = len({tuple(line[at : at + order]) for line in lines for at in range(len(line) - order + 1)})
        score = kinds / total if total else 0.0
        signature = f"tok:space|case:{'lc' if lowercase else 'mixed'}|lines:{len(lines)}|words:{words}"
        name = f"distinct-{order}"
        text = f"{name}|{signature} = {score:.4f} ({kinds} of {total})"
        results.append(Result(name, score, None, None, signature, text, {"distinct": kinds, "total": total}))
    return Evaluation(results)


def self_bleu(
    hypotheses: Sequence[str],
    *,
    order: int = 4,
    tokenize: str | None = None,
    lowercase: bool = False,
    samples: int = SAMPLES,
    seed: int = SEED,
) -> Evaluation:
    """Self-BLEU: the mean of each line's sentence BLEU against all others as references (Zhu et al. 2018).

    High is monotonous: 100 for one sentence repeated. sacrebleu's sentence BLEU (exponential smoothing, effective
    order), which needs time square in the number of lines; here the two highest counts of each n-gram are kept, which
    gives the same figures in linear time. The interval is over lines, the set that they are compared with being fixed.

    Args:
        hypotheses: two lines or more.
        order: the longest n-gram.
        tokenize: sacrebleu's tokenizer, "13a" if None.
        lowercase: case does not count.
        samples: bootstrap resamples; 0 for no interval.
        seed: of the resamples.

    Raises:
        ImportError: sacrebleu is not installed.
        ValueError: fewer than two lines, an unknown tokenizer, or an order below 1.
    """
    _check(hypotheses, 2)
    check_samples(samples)
    if order < 1:
        raise ValueError(f"order must be 1 or more, got {order}")
    kind = _sacrebleu().metrics.BLEU
    if tokenize is not None and tokenize not in kind.TOKENIZERS:
        raise ValueError(f"tokenize must be one of {', '.join(kind.TOKENIZERS)}, got {tokenize!r}")
    metric = kind(lowercase=lowercase, tokenize=tokenize, effective_order=True, max_ngram_order=order, force=True)
    lines = [metric._preprocess_segment(line.rstrip()).split() for line in hypotheses]
    scores = _sentence_scores(kind, lines, order)
    score = sum(scores) / len(scores)
    signature = f"case:{'lc' if lowercase else 'mixed'}|eff:yes|tok:{tokenize or '13a'}|smooth:exp|order:{order}"
    signature += f"|lines:{len(lines)}|bs:{samples}|seed:{seed}"
    text, low, high = f"self-BLEU|{signature} = {score:.2f}", None, None
    if samples:
        low, high = interval(scores, samples, seed)
        text += f" (95 %: {low:.2f} to {high:.2f})"
    return Evaluation([Result("self-BLEU", score, low, high, signature, text)])


def _sentence_scores(kind, lines: list[list[str]], order: int) -> list[float]:
    counts = [
        Counter(tuple(line[at : at + n]) for n in range(1, order + 1) for at in range(len(line) - n + 1))
        for line in lines
    ]
    highest: dict[tuple[str, ...], tuple[int, int, int]] = {}  # n-gram → most, in which line, most in any other
    for number, each in enumerate(counts):
        for ngram, count in each.items():
            most, where, second = highest.get(ngram, (0, -1, 0))
            if count > most:
                highest[ngram] = (count, number, most)
            elif count > second:
                highest[ngram] = (most, where, count)
    lengths = sorted(map(len, lines))
    scores = []
    for number, (line, each) in enumerate(zip(lines, counts, strict=True)):
        correct, total = [0] * order, [max(0, len(line) - n) for n in range(order)]
        for ngram, count in each.items():
            most, where, second = highest[ngram]
            correct[len(ngram) - 1] += min(count, second if where == number else most)
        nearest = _nearest_other(lengths, len(line))
        settings = {"smooth_method": "exp", "effective_order": True, "max_ngram_order": order}
        scores.append(kind.compute_bleu(correct, total, len(line), nearest, **settings).score)
    return scores


def _nearest_other(lengths: list[int], length: int) -> int:
    """The nearest length of another line, the shorter of two as near; ``lengths`` are sorted and hold ``length``."""
    at = bisect_left(lengths, length)
    around = [lengths[i] for i in (at - 1, at + 1) if 0 <= i < len(lengths)]
    return min(around, key=lambda other: (abs(other - length), other))


def _check(hypotheses: Sequence[str], least: int) -> None:
    if isinstance(hypotheses, str):
        raise ValueError("hypotheses must be a list of strings")
    if len(hypotheses) < least:
        raise ValueError(f"at least {least} lines are needed, got {len(hypotheses)}")
