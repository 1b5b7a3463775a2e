"""Each script of examples/ runs, with a few steps."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name, *arguments, cache):
    # Small work: threads that wait for each other take longer than one, above all beside other tests.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "FASTGAN_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        cwd=cache,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "needs"), [("one_line.py", "sklearn"), ("penalty.py", None)], ids=["one_line", "penalty"]
)
def test_example_runs(name, needs, tmp_path):
    if needs:
        pytest.importorskip(needs)
    out = run(name, "3", cache=tmp_path)
    last = out.splitlines()[-1]
    assert last.startswith("step 3/3")
    numbers = [float(n) for n in re.findall(r"(?:loss_\w|distance|penalty) (\S+)", last)]
    assert len(numbers) == 2
    assert all(map(math.isfinite, numbers))
    if name == "one_line.py":
        assert "7 swapped" in out


def test_pretraining_example_runs(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    text = "\n".join(f"The cat number {n} is red, and the boat is {'blue' if n % 2 else 'old'}." for n in range(200))
    (tmp_path / "cats.txt").write_text(text)
    out = run("pretrain.py", "cats.txt", "here", "4", cache=tmp_path)
    losses = re.search(r"validation loss (\S+) per token, (\S+) per letter", out)
    assert 0 < float(losses[2]) < float(losses[1]) < 10
    assert "\nThe " in out


def test_finetuning_examples_run(tmp_path):
    for module in ("transformers", "accelerate", "sacrebleu"):
        pytest.importorskip(module)
    kinds = [("warm", 1), ("dull", 0)]
    (tmp_path / "a.tsv").write_text("".join(f"a {word} film number {n}\t{label}\n" for n in range(20)
                                            for word, label in kinds))  # fmt: skip
    out = run("sentiment.py", "a.tsv", "a.tsv", "classes", "small", "2", cache=tmp_path)
    assert "2 steps: accuracy" in out
    assert "macro F1" in out
    for side in ("de", "en"):
        (tmp_path / f"a.{side}").write_text("".join(f"{side} number {n}\n" for n in range(40)))
    out = run("translate.py", "a.de", "a.en", "a.de", "a.en", "pair", "2", cache=tmp_path)
    assert "BLEU" in out
    assert "chrF2" in out
    (tmp_path / "a.txt").write_text("The cat is red, and the boat is blue.\n" * 50)
    out = run("generate.py", "a.txt", "a.txt", "words", "small", "2", cache=tmp_path)
    assert 0 < float(re.search(r"validation loss (\S+) per token", out)[1]) < 10
    assert re.search(r"1\.0: ['\"]The ", out)
    assert "data distinct-1" in out


def test_freelb_example_runs(tmp_path):
    pytest.importorskip("transformers")
    out = run("freelb.py", "2", cache=tmp_path)
    assert "freelb: 3 passes a step" in out
    clean, perturbed = map(float, re.search(r"step 2/2  loss (\S+)  perturbed (\S+)", out).groups())
    assert perturbed > clean


def test_question_and_summary_examples_run(tmp_path):
    for module in ("transformers", "accelerate", "bm25s", "rouge_score"):
        pytest.importorskip(module)
    paragraphs = [{"context": f"The boat number {n} is blue.", "qas": [{"id": str(n), "question": f"What is boat {n}?",
                   "answers": [{"text": "blue", "answer_start": len(f"The boat number {n} is ")}]}]}
                  for n in range(6)]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    (tmp_path / "a.txt").write_text("\n\n".join(each["context"] for each in paragraphs))
    out = run("qa.py", "a.json", "a.json", "questions", "small", "2", cache=tmp_path)
    assert "EM|norm:squad-2.0" in out
    assert out.count("right: (('blue'") == 3
    out = run("answer.py", "a.json", "a.json", "more", "a.txt", "What is boat 3?", "small", "2", cache=tmp_path)
    assert "R@5|retrieval:bm25|questions:6|passages:6" in out
    assert out.count("a.txt, line ") == 3
    rows = [{"document": f"The boat is {n}. It is blue.", "summary": f"Boat {n}"} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run("summarize.py", "a.jsonl", "a.jsonl", "short", "small", "2", cache=tmp_path)
    assert "first sentence" in out
    assert "\ngiven:   Boat 0" in out


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60
