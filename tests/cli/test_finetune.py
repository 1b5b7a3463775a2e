"""The commands ``fastgan finetune`` and ``fastgan evaluate`` of a fine-tuned model."""

import dataclasses
import inspect
import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fastgan.cli import finetune as commands
from fastgan.training.generate import GENERATE
from fastgan.training.qa import QA
from fastgan.training.sentiment import SENTIMENT
from fastgan.training.summarize import SUMMARIZE
from fastgan.training.translate import TRANSLATE
from tests.cli.test_language import fastgan
from tests.training.test_finetune import files  # noqa: F401  a fixture

pytestmark = pytest.mark.usefixtures("one_thread")


def test_sentiment_resumed_and_evaluated(files, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    given = ["--model", files / "encoder", "--train", files / "train.tsv", "--validation", files / "dev.tsv"]
    result = fastgan("finetune", "sentiment", *given, "--out", run, "--epochs", 2, "--batch-size", 8)
    assert result.exit_code == 0, result.output
    for words in ("step 7: validation accuracy", "step 14 of 14", "finished: 14 steps", "commonest label"):
        assert words in result.output
    result = fastgan("finetune", "sentiment", "--out", run, "--resume", "--epochs", 3)
    assert result.exit_code == 0, result.output
    assert "finished: 21 steps" in result.output
    result = fastgan("evaluate", "sentiment", "--model", run, "--data", files / "dev.tsv")
    assert result.exit_code == 0, result.output
    for words in ("accuracy|items:20", "macro F1|", "95 %", "predicted", "commonest label = 70.00"):
        assert words in result.output
    result = fastgan("evaluate", "sentiment", "--model", run, "--data", files / "dev.tsv", "--json", "--samples", 0)
    document = json.loads(result.output)
    assert document["results"][0]["details"]["classes"] == ["bad", "good"]


def test_adversaries_by_command(files, tmp_path):  # noqa: F811
    given = ["--model", files / "encoder", "--train", files / "train.tsv", "--validation", files / "dev.tsv",
             "--max-steps", 2, "--batch-size", 8]  # fmt: skip
    freelb = ["--adversary", "freelb", "--adversary-steps", 1, "--adversary-radius", 0.05, "--adversary-norm", "linf"]
    result = fastgan("finetune", "sentiment", *given, *freelb, "--out", tmp_path / "freelb")
    assert result.exit_code == 0, result.output
    assert "freelb: 2 passes a step, radius 0.05 of" in result.output
    result = fastgan("finetune", "sentiment", "--out", tmp_path / "freelb", "--resume", "--adversary", "pgd")
    assert result.exit_code == 1
    assert "this run has adversary = 'freelb', not 'pgd'" in result.output
    (tmp_path / "raw.txt").write_text("the dull film .\nthe fine film .\n")
    players = ["--adversary", "gan-bert", "--unlabelled", tmp_path / "raw.txt"]
    result = fastgan("finetune", "sentiment", *given, *players, "--out", tmp_path / "players")
    assert result.exit_code == 0, result.output
    assert "finished: 2 steps" in result.output
    document = json.loads((tmp_path / "players" / "run.json").read_text())
    assert str(tmp_path / "raw.txt") in document["files"]
    vat = ["--adversary", "vat", "--unlabelled", tmp_path / "raw.txt"]
    result = fastgan("finetune", "sentiment", *given, *vat, "--out", tmp_path / "vat")
    assert result.exit_code == 0, result.output
    assert "vat: 1 pass over labelled and 3 over unlabelled texts a step" in " ".join(result.output.split())


def test_translate_and_generate(tmp_path):
    pytest.importorskip("sacrebleu")
    lines = [f"{a} {b}" for a in ("rot", "blau", "alt") for b in ("hund", "katze", "haus")] * 3
    (tmp_path / "a.de").write_text("\n".join(lines))
    (tmp_path / "a.en").write_text("\n".join(line.upper() for line in lines))
    (tmp_path / "b.de").write_text("rot hund\nblau haus\n")
    (tmp_path / "b.en").write_text("ROT HUND\nBLAU HAUS\n")
    sides = [tmp_path / name for name in ("a.de", "a.en", "b.de", "b.en")]
    small = ["--layers", 1, "--width", 16, "--heads", 2, "--vocab-size", 280, "--length", 16, "--batch-size", 8]
    result = fastgan("finetune", "translate", "--from-scratch", "small", "--train", *sides[:2], "--validation",
                     *sides[2:], "--out", tmp_path / "pair", "--epochs", 1, "--beams", 2, *small)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "BLEU on validation" in result.output
    assert "with 2 beams" in result.output
    result = fastgan("evaluate", "translate", "--model", tmp_path / "pair", "--data", *sides[2:], "--out",
                     tmp_path / "out.en", "--samples", 0)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "chrF2" in result.output
    assert len((tmp_path / "out.en").read_text().split("\n")) == 3
    result = fastgan("generate", tmp_path / "pair", "--prompt", "rot hund", "--beams", 2, "--max-tokens", 4)
    assert result.exit_code == 0, result.output

    result = fastgan("finetune", "generate", "--from-scratch", "small", "--train", sides[0], "--validation", sides[0],
                     "--out", tmp_path / "lm", "--epochs", 1, *small)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "nats per token" in result.output
    result = fastgan("generate", tmp_path / "lm", "--input", sides[2], "--n", 2, "--max-tokens", 3, "--json")
    rows = [json.loads(line) for line in result.output.splitlines()]
    assert [(row["prompt"], len(row["texts"])) for row in rows] == [("rot hund", 2), ("blau haus", 2)]
    result = fastgan("evaluate", "generate", "--model", tmp_path / "lm", "--data", sides[0], "--length", 12, "--n", 3)
    assert result.exit_code == 0, result.output
    for words in ("perplexity|", "data distinct-1|", "self-BLEU|"):
        assert words in result.output


def test_qa(tmp_path, monkeypatch):
    from fastgan.training import sentiment
    from tests.training.test_qa import _document

    shape = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    monkeypatch.setattr(sentiment, "_SMALL", shape)
    run = tmp_path / "run"
    (tmp_path / "a.json").write_text(json.dumps(_document(0, 12)))
    result = fastgan("finetune", "qa", "--from-scratch", "small", "--train", tmp_path / "a.json", "--validation",
                     tmp_path / "a.json", "--out", run, "--epochs", 1, "--length", 40, "--stride", 8)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "11 texts of" in result.output
    assert "F1 on validation" in result.output
    result = fastgan("evaluate", "qa", "--model", run, "--data", tmp_path / "a.json", "--out",
                     tmp_path / "answers.json", "--samples", 0)  # fmt: skip
    assert result.exit_code == 0, result.output
    again = fastgan("evaluate", "em-f1", "--hypotheses", tmp_path / "answers.json", "--references", tmp_path / "a.json",
                    "--samples", 0)  # fmt: skip
    assert result.output == again.output


def test_failures_are_one_line(files, tmp_path):  # noqa: F811
    (tmp_path / "bad.tsv").write_text("good\t1\nbad\n")
    data = ["--train", files / "train.tsv", "--validation", files / "dev.tsv"]
    out, uneven = ["--out", tmp_path / "o"], [files / "dev.tsv", tmp_path / "bad.tsv"]
    for arguments, status, words in [
        (("finetune", "sentiment", *data, *out), 2, "--model"),
        (("finetune", "sentiment", *data, *out, "--model", "x", "--from-scratch", "small"), 2, "--model"),
        (("finetune", "sentiment", "--model", files / "encoder", *out), 2, "--train"),
        (("finetune", "sentiment", *data, *out, "--from-scratch", "huge"), 2, "--from-scratch"),
        (("finetune", "sentiment", *data, *out, "--from-scratch", "small", "--adversary", "x"), 2, "--adversary"),
        (("finetune", "sentiment", *data, *out, "--from-scratch", "small", "--adversary", "pgd", "--adversary-steps",
          "0"), 2, "--adversary-steps"),
        (("finetune", "sentiment", *data, *out, "--from-scratch", "small", "--adversary", "gan-bert"), 2,
         "--unlabelled"),
        (("finetune", "sentiment", *data, *out, "--from-scratch", "small", "--adversary", "gan-bert", "--unlabelled",
          tmp_path / "no.txt"), 1, "no.txt"),
        (("finetune", "sentiment", *data, *out, "--model", tmp_path / "no"), 1, "no such folder"),
        (("finetune", "sentiment", *data[2:], *out, "--model", files / "encoder", "--train", tmp_path / "bad.tsv"), 1,
         "line 2: has 1 columns"),
        (("finetune", "translate", *out, "--from-scratch", "small", "--train", *uneven, "--validation", *uneven), 1,
         "dev.tsv has 20 lines and"),
        (("finetune", "translate", *out, "--from-scratch", "small", "--train", "a", "b"), 2, "--validation"),
        (("generate", tmp_path), 2, "--prompt"),
        (("generate", tmp_path, "--prompt", "a"), 1, "no config.json"),
        (("finetune", "sentiment", *out, "--resume"), 1, "no such folder"),
        (("evaluate", "sentiment", "--model", files / "encoder", "--data", files / "dev.tsv"), 1, "label"),
    ]:  # fmt: skip
        result = fastgan(*arguments)
        assert result.exit_code == status, result.output
        assert words in result.output
        assert status == 2 or len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("task", [SENTIMENT, TRANSLATE, SUMMARIZE, QA, GENERATE], ids=lambda task: task.name)
def test_the_defaults_shown_are_the_configurations(task):
    options = inspect.signature(getattr(commands, task.name)).parameters
    fields = dataclasses.fields(task.config)
    for field in fields:
        if field.name not in task.config.FILES:
            assert options[field.name].default.default == field.default, field.name
    assert set(options) - {"context", "out", "resume"} == {field.name for field in fields}
