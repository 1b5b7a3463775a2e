"""BLEU and chrF by sacrebleu, with its signatures, its bootstrap intervals and its paired bootstrap test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastgan.metrics.results import SAMPLES, Comparison, Evaluation, Result, check_pairs, check_samples


def bleu(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    other: Sequence[str] | None = None,
    tokenize: str | None = None,
    lowercase: bool = False,
    samples: int = SAMPLES,
    width: int = 1,
) -> Evaluation:
    """Corpus BLEU (Papineni et al. 2002) as the ``sacrebleu`` command computes it (Post 2018).

    Args:
        hypotheses: the system's lines, detokenised.
        references: one list of lines, or several, each as long as hypotheses.
        other: a second system's lines, for the paired bootstrap test.
        tokenize: sacrebleu's tokenizer: "13a" if None; "intl", "zh", "char", "none", ...
        lowercase: case does not count.
        samples: bootstrap resamples; 0 for no interval.
        width: digits after the point in the text.

    Raises:
        ImportError: sacrebleu is not installed.
        ValueError: no lines, or unequal numbers of them; an unknown tokenizer.
    """
    metrics = _sacrebleu().metrics
    if tokenize is not None and tokenize not in metrics.BLEU.TOKENIZERS:
        raise ValueError(f"tokenize must be one of {', '.join(metrics.BLEU.TOKENIZERS)}, got {tokenize!r}")
    make = lambda references: metrics.BLEU(lowercase=lowercase, tokenize=tokenize, references=references)
    return _evaluate(make, hypotheses, references, other, samples, width)


def chrf(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    other: Sequence[str] | None = None,
    word_order: int = 0,
    lowercase: bool = False,
    samples: int = SAMPLES,
    width: int = 1,
) -> Evaluation:
    """chrF2 (Popović 2015) as the ``sacrebleu -m chrf`` command computes it; ``word_order=2`` is chrF++.

    Arguments and errors as :func:`bleu`'s.
    """
    if word_order < 0:
        raise ValueError(f"word_order must not be negative, got {word_order}")
    metrics = _sacrebleu().metrics
    make = lambda references: metrics.CHRF(word_order=word_order, lowercase=lowercase, references=references)
    return _evaluate(make, hypotheses, references, other, samples, width)


def _evaluate(make: Any, hypotheses: Any, references: Any, other: Any, samples: int, width: int) -> Evaluation:
    check_pairs(hypotheses, references, other)
    check_samples(samples)
    # What the command does to the lines it reads.
    systems = [[line.rstrip() for line in system] for system in (hypotheses, other) if system is not None]
    metric = make([[line.rstrip() for line in each] for each in references])
    results = []
    for system in systems:
        score = _score(metric, system, samples)
        signature = metric.get_signature().format()
        mean, half = (score._mean, score._ci) if samples > 1 else (None, None)
        text = score.format(width=width, signature=signature)
        if samples > 1 and not mean:  # sacrebleu leaves out an interval around zero
            text += " (95 %: 0)"
        details = {"confidence_mean": mean, "confidence_half_width": half}
        for name in ("precisions", "bp", "sys_len", "ref_len", "char_order", "word_order", "beta"):
            if hasattr(score, name):
                details[name] = getattr(score, name)
        low, high = (None, None) if mean is None else (mean - half, mean + half)
        results.append(Result(score.name, float(score.score), low, high, signature, text, details))
    if other is None:
        return Evaluation(results)
    from sacrebleu.significance import PairedTest

    first, second = results
    test = PairedTest(
        [("first", systems[0]), ("second", systems[1])],
        {first.name: metric},
        references=None,
        test_type="bs",
        n_samples=samples if samples > 1 else SAMPLES,
    )
    signatures, scores = test()
    outcome: Any = scores[first.name][1]
    p = float(outcome.p_value)
    signature = signatures[first.name].format()
    comparison = Comparison(first.name, first.score, second.score, second.score - first.score, p, signature)
    return Evaluation([first], [comparison])


def _score(metric: Any, system: list[str], samples: int) -> Any:
    try:
        return metric.corpus_score(system, references=None, n_bootstrap=samples if samples > 1 else 1)
    except TypeError:
        # chrF's resamples are float32 where anything matched and Python's 0.0 where nothing did; sacrebleu (2.6) cannot
        # take the mean of both. One type, and its own estimate:
        from sacrebleu.significance import _bootstrap_resample

        score = metric.corpus_score(system, references=None)
        _, resampled = _bootstrap_resample(metric._extract_corpus_statistics(system, None), metric, samples)
        for each in resampled:
            each.score = float(each.score)
        score.estimate_ci(resampled)
        return score


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError(f"BLEU and chrF need sacrebleu ({error}): pip install 'fastgan[metrics]'") from error
    return sacrebleu
