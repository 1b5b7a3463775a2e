"""Measures of text beside the libraries' own commands and beside their definitions."""

from __future__ import annotations

import csv
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from fastgan import metrics

sacrebleu = pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")

WORDS = (
    *("the", "a", "cat", "dog", "sat", "on", "mat", ".", ",", "It's", "ran", "don't", "house", "und", "größer"),
    *("3.5", "%", "sleeping", "sleeps", "runs"),
)


def sentences(count, seed, near=None):
    """Random sentences, or ``near`` with a fifth of its words changed."""
    generator = np.random.default_rng(seed)
    if near is None:
        return [" ".join(generator.choice(WORDS, generator.integers(1, 14))) for _ in range(count)]
    change = lambda word: str(generator.choice(WORDS)) if generator.random() < 0.2 else word
    return [" ".join(change(word) for word in line.split()) for line in near]


REFERENCE = sentences(60, 0)
SYSTEM, OTHER = sentences(60, 1, REFERENCE), sentences(60, 2, sentences(60, 3, REFERENCE))
SECOND = sentences(60, 4, REFERENCE)


def written(folder, **files):
    for name, lines in files.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return [str(folder / name) for name in files]


def run(*command):
    ran = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize(
    ("measure", "settings", "arguments"),
    [
        ("bleu", {}, []),
        ("bleu", {"tokenize": "char", "lowercase": True}, ["-tok", "char", "-lc"]),
        ("chrf", {}, ["-m", "chrf"]),
        ("chrf", {"word_order": 2}, ["-m", "chrf", "--chrf-word-order", "2"]),
    ],
)
def test_bleu_and_chrf_are_the_commands_to_the_last_digit(tmp_path, measure, settings, arguments):
    system, first, second = written(tmp_path, system=[f"{line}  " for line in SYSTEM], first=REFERENCE, second=SECOND)
    line = run("sacrebleu", first, second, "-i", system, "-w", "9", "-ci", "-f", "text", *arguments).strip()
    ours = getattr(metrics, measure)(SYSTEM, [REFERENCE, SECOND], width=9, **settings)
    assert str(ours) == line
    (result,) = ours.results
    assert result.low < result.score < result.high
    assert "seed:12345" in result.signature


@pytest.mark.parametrize("measure", ["bleu", "chrf"])
def test_the_paired_test_is_the_commands(tmp_path, measure):
    names = written(tmp_path, reference=REFERENCE, system=SYSTEM, other=OTHER)
    table = run("sacrebleu", names[0], "-i", *names[1:], "-m", measure, "--paired-bs", "-w", "9", "-f", "text")
    first, second = re.findall(r"│ +([\d.]+) \(", table)
    (p,) = re.findall(r"\(p = ([\d.]+)\)", table)
    (comparison,) = getattr(metrics, measure)(SYSTEM, [REFERENCE], other=OTHER).comparisons
    assert (f"{comparison.score:.9f}", f"{comparison.other:.9f}", f"{comparison.p:.4f}") == (first, second, p)
    assert comparison.difference == comparison.other - comparison.score < 0
    assert comparison.signature in table


def test_resamples_without_any_match_do_not_stop_chrf():
    """sacrebleu's own command ends in a TypeError there: float32 and Python's float in one mean."""
    (result,) = metrics.chrf(["abc", "xyz"], [["abc", "qqq"]], samples=200).results
    assert result.low < result.score < result.high


def test_rouge_is_the_commands_line_by_line(tmp_path):
    target, prediction = written(tmp_path, target=REFERENCE, prediction=SYSTEM)
    out = tmp_path / "scores.csv"
    run("rouge_score.rouge", f"--target_filepattern={target}", f"--prediction_filepattern={prediction}",
        f"--output_filename={out}", "--noaggregate", "--use_stemmer")  # fmt: skip
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 60
    for result in metrics.rouge(SYSTEM, [REFERENCE], stemmer=True).results:
        theirs = np.array([[float(row[f"{result.name}-{letter}"]) for letter in "FPR"] for row in rows]).mean(0)
        ours = [result.score, result.details["precision"], result.details["recall"]]
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
        assert result.low < result.score < result.high


def test_rouges_interval_is_the_librarys_and_leaves_numpys_generator_alone():
    from rouge_score import rouge_scorer, scoring

    scorer, aggregator = rouge_scorer.RougeScorer(["rougeL"]), scoring.BootstrapAggregator(n_samples=200)
    for target, prediction in zip(REFERENCE, SYSTEM, strict=True):
        aggregator.add_scores(scorer.score(target, prediction))
    np.random.seed(7)
    expected = aggregator.aggregate()["rougeL"]
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    (result,) = metrics.rouge(SYSTEM, [REFERENCE], types=["rougeL"], samples=200, seed=7).results
    assert (result.low, result.high) == (expected.low.fmeasure, expected.high.fmeasure)
    assert (np.random.get_state()[1] == before).all()


def test_rouge_takes_the_best_of_several_references():
    evaluation = metrics.rouge(["a cat sat"], [["dogs ran off"], ["a cat sat"]], samples=0)
    assert evaluation["rouge2"] == 1.0
    assert evaluation.results[0].low is None


def test_paired_test_knows_a_difference_from_none():
    golds = [["paris"]] * 40
    right, wrong = ["Paris"] * 40, ["paris"] * 20 + ["rome"] * 20
    nothing = ["paris", "rome"] * 20
    (em, _) = metrics.em_f1(right, golds, other=wrong).comparisons
    assert (em.difference, em.p) == (-50.0, pytest.approx(1 / 1001))
    (em, _) = metrics.em_f1(wrong, golds, other=nothing).comparisons
    assert em.difference == 0
    assert em.p == 1.0
    for kind in metrics.rouge(SYSTEM, [REFERENCE], other=OTHER, types=["rouge1"], samples=300).comparisons:
        assert kind.difference < 0
        assert kind.p < 0.05


def test_the_paired_bootstrap_rejects_true_nothing_one_time_in_twenty():
    from fastgan.metrics.results import paired_p

    generator = np.random.default_rng(0)
    found = [paired_p(*generator.normal(size=(2, 50)), samples=199) < 0.05 for _ in range(300)]
    assert 0.02 < np.mean(found) < 0.10


@pytest.mark.parametrize(
    ("answer", "gold", "em", "score"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1, 1),
        ("the tower", "Eiffel Tower", 0, 2 / 3),
        ("tower tower", "tower", 0, 2 / 3),
        ("an apple a day", "apple day", 1, 1),
        ("it's", "its", 1, 1),
        ("“quoted”", "quoted", 0, 0),
        ("", "", 1, 1),
        ("", "something", 0, 0),
        ("the", "a", 1, 1),
        ("the", "word", 0, 0),
    ],
)
def test_exact_match_and_f1_follow_the_official_rules(answer, gold, em, score):
    assert metrics.exact_match(answer, gold) == em
    assert metrics.f1(answer, gold) == pytest.approx(score)


def test_em_f1_takes_the_best_gold_answer_and_knows_questions_without_one():
    answers = ["in Paris", "", "", "guess"]
    golds = [["London", "Paris"], [], ["", "the"], [""]]
    evaluation = metrics.em_f1(answers, golds)
    assert evaluation["EM"] == 50.0
    assert evaluation["F1"] == pytest.approx(100 * (2 / 3 + 1 + 1 + 0) / 4)
    assert evaluation.results[0].low <= 50.0 <= evaluation.results[0].high


def test_distinct_counts_ngrams():
    evaluation = metrics.distinct(["a b a", "a b", "C"])
    assert [result.details for result in evaluation.results] == [
        {"distinct": 3, "total": 6},
        {"distinct": 2, "total": 3},
        {"distinct": 1, "total": 1},
    ]
    assert evaluation["distinct-1"] == 0.5
    assert metrics.distinct(["a"], orders=[2])["distinct-2"] == 0.0


@pytest.mark.parametrize("order", [2, 4])
def test_self_bleu_equals_sentence_bleu_against_all_others(order):
    lines = [*SYSTEM[:25], *SYSTEM[:3], "alone", "alone alone alone"]
    metric = sacrebleu.metrics.BLEU(effective_order=True, max_ngram_order=order)
    expected = [metric.sentence_score(line, lines[:n] + lines[n + 1 :]).score for n, line in enumerate(lines)]
    evaluation = metrics.self_bleu(lines, order=order)
    assert evaluation["self-BLEU"] == pytest.approx(np.mean(expected), rel=1e-12)
    assert evaluation.results[0].low < np.mean(expected) < evaluation.results[0].high
    assert metrics.self_bleu(["one and the same sentence"] * 3)["self-BLEU"] == pytest.approx(100)


def test_wrong_arguments_are_refused():
    for call, words in [
        (lambda: metrics.bleu(["a"], [["a", "b"]]), "1 hypotheses, but 2 references"),
        (lambda: metrics.bleu([], [[]]), "no hypotheses"),
        (lambda: metrics.bleu("a", [["a"]]), "list of strings"),
        (lambda: metrics.chrf(["a"], ["a"]), "list of strings"),
        (lambda: metrics.bleu(["a"], [["a"]], tokenize="no"), "tokenize must be"),
        (lambda: metrics.rouge(["a"], [["a"]], types=["rougeX"]), "rougeX"),
        (lambda: metrics.rouge(["a"], [["a"]], other=[]), "of the other system"),
        (lambda: metrics.em_f1(["a"], [["a"], ["b"]]), "2 lists"),
        (lambda: metrics.self_bleu(["a"]), "at least 2"),
        (lambda: metrics.distinct(["a"], orders=[0]), "orders"),
        (lambda: metrics.bleu(["a"], [["a"]], samples=-1), "samples"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    for call in (metrics.bleu, metrics.rouge):
        with pytest.raises(ImportError, match=r"pip install 'fastgan\[metrics\]'"):
            call(["a"], [["a"]])
    assert math.isclose(metrics.em_f1(["a b"], [["b"]])["F1"], 100.0)  # needs neither
