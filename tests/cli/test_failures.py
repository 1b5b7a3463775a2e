"""What goes wrong in a command is one line and a status, whatever the terminal."""

import io
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fastgan.cli import app
from fastgan.cli.progress import Lines, reporter
from tests.cli.test_train import SMALL

MODULE = [sys.executable, "-m", "fastgan"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path_factory, tmp_path):
    monkeypatch.setattr("fastgan.training.run_folder.RunFolder.write_events", lambda self: None)
    monkeypatch.setattr("fastgan.training.pictures.curves_png", lambda rows, title: b"png")
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)


def fastgan(*arguments, status):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status, result.output
    return " ".join(result.output.split())


def test_cifar10_that_cannot_be_had_is_one_line(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")

    def offline(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setenv("FASTGAN_DATA", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", offline)
    for command in (("train", "dcgan", *SMALL), ("demo",)):
        assert "fastgan: CIFAR-10 could not be loaded" in fastgan(*command, "--data", "cifar10", status=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", ["", "~nobody-of-this-name/x", "a" * 300, "CIFAR10", "/dev/null/x"])
@pytest.mark.parametrize("command", [("train", "dcgan"), ("demo",)])
def test_data_that_is_not_there_is_a_wrong_option(command, data, tmp_path):
    assert "--data: " in fastgan(*command, "--data", data, status=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["meta", "mps" if sys.platform == "linux" else "xla", "banana"])
def test_devices_that_do_not_compute_are_refused_in_a_sentence(device):
    said = fastgan("train", "dcgan", *SMALL, "--device", device, status=2)
    assert f"--device {device!r} cannot be used" in said
    assert "FuncTorch" not in said  # the list of all that torch can dispatch to


def test_more_memory_than_there_is_is_one_line(tmp_path):
    said = fastgan("train", "dcgan", "--image-size", 65536, "--out", tmp_path / "run", status=1)
    assert "image_size = 65536" in said
    assert not list(tmp_path.iterdir())
    fastgan("train", "dcgan", *SMALL, "--max-steps", 1, "--out", tmp_path / "run", status=0)
    assert "fastgan: not enough memory" in fastgan("sample", tmp_path / "run", "--n", 10**14, status=1)
    assert "PNG file is written" in fastgan("sample", tmp_path / "run", "--out", "grid.jpg", status=2)
    assert "is a file" in fastgan("sample", tmp_path / "run" / "config.json", status=1)


def test_the_default_folder_is_named_after_the_pictures(tmp_path):
    pictures = tmp_path / "my.pictures"
    pictures.mkdir()
    from PIL import Image

    Image.new("RGB", (8, 8)).save(pictures / "a.png")
    os.chdir(pictures)
    fastgan("train", "dcgan", *SMALL, "--max-steps", 1, "--data", ".", status=0)
    assert os.listdir("runs") == ["dcgan-my.pictures-8"]


def test_a_demo_deletes_nothing_that_is_not_a_demos(tmp_path):
    (tmp_path / "summary.json").write_text("mine")
    assert "not a demo's folder" in fastgan("demo", "--out", tmp_path, status=2)
    assert "is not a folder" in fastgan("demo", "--out", tmp_path / "summary.json", status=2)
    assert (tmp_path / "summary.json").read_text() == "mine"


def test_lines_go_on_where_the_terminal_has_gone(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    Lines().start(0, 1, 1)
    monkeypatch.setattr(sys, "stdout", Broken())
    with pytest.raises(BrokenPipeError):
        Lines().start(0, 1, 1)


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert isinstance(reporter(), Lines)


def test_the_module_is_the_command_and_survives_any_output(tmp_path):
    # ASCII alone, a folder of any bytes, and a reader that leaves after one line
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    command = [*MODULE, "train", "dcgan", *SMALL, "--max-steps", "1000000", "--epochs", "1000000", "--out", b"run\xff"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=tmp_path)
    try:
        assert process.stdout.readline().startswith(b"training in run")
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=120) == 1
    finally:
        process.kill()
        process.stderr.close()
    assert b"Traceback" not in errors
    assert b"Exception ignored" not in errors


def test_help_shows_an_example():
    for command in (("train", "dcgan"), ("sample",)):
        assert f"For example: fastgan {command[0]}" in fastgan(*command, "--help", status=0)
