"""The commands ``fastgan prepare text`` and ``fastgan pretrain``."""

import dataclasses
import inspect
import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fastgan.cli import app, pretrain
from fastgan.training.pretrain import PretrainConfig

SMALL = ["--layers", 1, "--width", 16, "--heads", 2, "--length", 16, "--batch-size", 4, "--warmup", 2, "--max-steps", 4,
         "--eval-every", 2]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text("\n".join(f"the {kind} number {n} is there ." for n in range(60) for kind in ("cat", "boat")))
    return file


def fastgan(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


@pytest.mark.parametrize(("objective", "tokenizer"), [("clm", "bpe"), ("mlm", "wordpiece"), ("rtd", "bpe")])
def test_prepare_pretrain_and_resume(text, tmp_path, objective, tokenizer):
    corpus, run = tmp_path / "corpus", tmp_path / "run"
    result = fastgan("prepare", "text", text, "--out", corpus, "--vocab-size", 300, "--lowercase", "--tokenizer",
                     tokenizer, "--validation", 0.2)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "train:" in result.output
    assert "lines" in result.output
    result = fastgan("pretrain", "--objective", objective, "--data", corpus, "--out", run, *SMALL)
    assert result.exit_code == 0, result.output
    for words in ("step 2: validation loss", "step 4 of 4", "tokens/s", "finished: 4 steps", " per token"):
        assert words in result.output
    assert ("nats per masked word" in result.output) == (objective == "rtd")
    assert ("per character" in result.output) == (objective == "clm")
    result = fastgan("pretrain", "--out", run, "--resume", "--max-steps", 6)
    assert result.exit_code == 0, result.output
    assert "finished: 6 steps" in result.output
    assert json.loads((run / "result.json").read_text())["step"] == 6


def test_failures_are_one_line(text, tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9\n")
    (tmp_path / "empty.txt").touch()
    for arguments, status, words in [
        (("prepare", "text", latin, "--out", tmp_path / "o"), 1, "byte 3"),
        (("prepare", "text", tmp_path / "empty.txt", "--out", tmp_path / "o"), 1, "empty"),
        (("prepare", "text", tmp_path / "no.txt", "--out", tmp_path / "o"), 1, "no.txt"),
        (("prepare", "text", text, "--out", tmp_path / "o", "--vocab-size", 100), 1, "261"),
        (("pretrain", "--data", tmp_path, "--out", tmp_path / "o"), 2, "--objective"),
        (("pretrain", "--objective", "clm", "--data", tmp_path, "--out", tmp_path / "o"), 1, "no corpus"),
        (("pretrain", "--objective", "clm", "--data", tmp_path, "--out", tmp_path / "o", "--lr", 0), 2, "--lr"),
        (("pretrain", "--out", tmp_path / "o", "--resume"), 1, "no such folder"),
    ]:
        result = fastgan(*arguments)
        assert result.exit_code == status, result.output
        assert words in result.output
        assert status == 2 or len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_the_defaults_shown_are_the_configurations():
    options = inspect.signature(pretrain.pretrain).parameters
    fields = dataclasses.fields(PretrainConfig)
    for field in fields:
        if field.default is not dataclasses.MISSING:
            assert options[field.name].default.default == field.default, field.name
    assert set(pretrain._FIELDS) == {field.name for field in fields}
