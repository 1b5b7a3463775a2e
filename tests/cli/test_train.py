"""The commands ``fastgan train dcgan`` and ``fastgan sample``."""

import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastgan.cli import app, train
from fastgan.training import DCGANConfig

SMALL = ["--image-size", "8", "--channels", "1", "--ngf", "2", "--ndf", "2", "--latent", "4", "--batch-size", "16",
         "--checkpoint-every", "2", "--sample-every", "2"]  # fmt: skip
COMMAND = [sys.executable, "-c", "from fastgan.cli import main; main()"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("fastgan.training.run_folder.RunFolder.write_events", lambda self: None)
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fastgan(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def test_train_sample_and_resume(tmp_path):
    folder = tmp_path / "run"
    result = fastgan("train", "dcgan", *SMALL, "--max-steps", 3, "--out", folder)
    assert result.exit_code == 0, result.output
    assert "step 3 of 3" in result.output
    assert "images/s" in result.output
    assert "% waiting for data" in result.output
    assert "loss_d" in result.output
    result = fastgan("train", "dcgan", "--resume", folder, "--max-steps", 5)
    assert result.exit_code == 0, result.output
    assert os.readlink(folder / "last").endswith("5")
    assert fastgan("train", "dcgan", "--resume", folder).exit_code == 0
    result = fastgan("sample", folder, "--n", 5, "--out", tmp_path / "grid.png")
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "grid.png").size == (3 * 10 + 2, 2 * 10 + 2)
    again = fastgan("sample", folder, "--n", 5, "--out", tmp_path / "again.png")
    assert again.exit_code == 0
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    fastgan("sample", folder, "--n", 5, "--out", tmp_path / "other.png", "--seed", 1)
    assert (tmp_path / "grid.png").read_bytes() != (tmp_path / "other.png").read_bytes()


def test_failures_are_one_line_and_status_one(tmp_path):
    folder = tmp_path / "run"
    assert fastgan("train", "dcgan", *SMALL, "--max-steps", 1, "--out", folder).exit_code == 0
    for arguments, words in [
        (("train", "dcgan", *SMALL, "--out", folder), "holds a run already"),
        (("train", "dcgan", "--resume", tmp_path / "nowhere"), "nowhere"),
        (("train", "dcgan", "--resume", folder, "--ngf", "5"), "ngf = 2, not 5"),
        (("sample", tmp_path), "no run"),
    ]:
        result = fastgan(*arguments)
        assert result.exit_code == 1
        assert words in result.output
    (folder / "last" / "generator.safetensors").write_bytes(b"no")
    for arguments in (("sample", folder), ("train", "dcgan", "--resume", folder, "--max-steps", 4)):
        result = fastgan(*arguments)
        assert result.exit_code == 1
        assert "generator.safetensors" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("--batch-size", "0"),
        ("--batch-size", "-4"),
        ("--image-size", "0"),
        ("--image-size", "-64"),
        ("--image-size", "48"),
        ("--ngf", "0"),
        ("--ndf", "-1"),
        ("--latent", "0"),
        ("--channels", "0"),
        ("--epochs", "0"),
        ("--max-steps", "0"),
        ("--checkpoint-every", "0"),
        ("--sample-every", "-1"),
        ("--num-workers", "-1"),
        ("--seed", "-1"),
        ("--lr", "0"),
        ("--lr", "-1"),
        ("--lr", "nan"),
        ("--loss", "mse"),
        ("--precision", "int8"),
        ("--device", "quantum"),
        ("--data", "/nowhere/at/all"),
        ("--nonsense", "1"),
    ],
)
def test_R63_wrong_values_are_refused_by_the_options_name(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "dumb")
    result = fastgan("train", "dcgan", *arguments)
    assert result.exit_code == 2, result.output
    assert arguments[0] in result.output
    assert not list(tmp_path.iterdir())


def test_the_defaults_shown_are_the_configurations():
    options = inspect.signature(train.dcgan).parameters
    for field in dataclasses.fields(DCGANConfig):
        assert options[field.name].default.default == field.default, field.name
    assert set(train._FIELDS) == {field.name for field in dataclasses.fields(DCGANConfig)}


def test_R67_ctrl_c_saves_and_says_how_to_go_on_and_no_process_is_started(tmp_path):
    folder = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*COMMAND, "train", "dcgan", *SMALL, "--num-workers", "2", "--max-steps", "1000000", "--epochs", "100000",
         "--out", folder],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        limit = time.monotonic() + 120
        while not (folder / "last").exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        # Batches are prepared by threads: there is no second process whose main module would have to be guarded.
        children = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True)
        assert not children.stdout.split()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert f"fastgan train dcgan --resume {folder}" in output
    assert "Traceback" not in errors
    step = json.loads((folder / "last" / "trainer.json").read_text())["step"]
    assert step == len((folder / "metrics.jsonl").read_text().splitlines())


def test_help_names_every_option():
    output = CliRunner().invoke(app, ["train", "dcgan", "--help"], env={"COLUMNS": "200"}).output
    for option in ("--data", "--image-size", "--resume", "--precision", "--num-workers", "--max-steps", "--out"):
        assert option in output
