"""Run folders: what they hold, exact resuming, and what is refused with the last good checkpoint untouched."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan.training import DCGANConfig, RunError, load_generator, resume_dcgan, run_dcgan
from fastgan.training import checkpoint as checkpoints
from fastgan.training.gan import GANTrainer
from fastgan.training.pictures import grid_png
from fastgan.training.presets import article, digits_demo
from fastgan.training.run import Silent

CONFIG = DCGANConfig(
    image_size=8, channels=1, batch_size=4, latent=4, ngf=2, ndf=2, max_steps=6, seed=3, checkpoint_every=2,
    sample_every=3,
)  # fmt: skip


class Pictures:
    """Nine pictures with an ImageArray's methods, made in memory."""

    digest, skipped = "0" * 64, ()

    def __init__(self, count=9):
        self.pixels = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def __len__(self):
        return len(self.pixels)

    def batch(self, indices, flip=False):
        return self.pixels[torch.as_tensor(np.array(indices))]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("fastgan.training.run_folder.RunFolder.write_events", lambda self: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(folder, **changes):
    return run_dcgan(dataclasses.replace(CONFIG, **changes), folder, data=Pictures())


def resume(folder, changes=None, **settings):
    return resume_dcgan(folder, changes, data=Pictures(), **settings)


def weights(folder):
    return {
        name: (folder / "last" / f"{name}.safetensors").read_bytes() for name in (*checkpoints.MODELS, "optimizers")
    }


def tree(folder):
    """Every file's content and time, links as such."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, os.readlink(path) if path.is_symlink() else
                                        path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }  # fmt: skip


class StopAt(Silent):
    def __init__(self, step, number=signal.SIGINT):
        self.step, self.number = step, number

    def update(self, step, metrics, images):
        if step == self.step:
            os.kill(os.getpid(), self.number)


class Crash(Silent):
    """Ends the run without a word, as a kill would."""

    def __init__(self, step):
        self.step = step

    def update(self, step, metrics, images):
        if step == self.step:
            raise SystemExit


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder).finished
    torch.set_num_threads(threads)
    return folder


def test_what_a_run_folder_holds(whole):
    document = json.loads((whole / "config.json").read_text())
    assert document["config"] == dataclasses.asdict(CONFIG)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == [0, 0, 0, 1, 1, 1]  # nine pictures in batches of four, four and one
    assert {"loss_d", "loss_g", "d_real", "d_fake", "wait", "seconds"} <= set(rows[0])
    assert all(0 <= row["wait"] < row["seconds"] + 1 for row in rows)
    assert sorted(path.name for path in (whole / "samples").iterdir()) == ["step-000000003.png", "step-000000006.png"]
    assert Image.open(whole / "samples" / "step-000000006.png").size == (8 * 10 + 2, 8 * 10 + 2)
    assert Image.open(whole / "curves.png").size[0] > 400
    names = {path.name for path in (whole / "last").iterdir()}
    assert names == {"generator.safetensors", "discriminator.safetensors", "optimizers.safetensors", "trainer.json"}
    assert [path.name for path in (whole / "checkpoints").iterdir()] == ["step-000000006"]
    assert not [path for path in whole.rglob("*") if "tmp" in path.name or path.suffix in (".pt", ".pkl")]


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_R65_resumed_runs_end_with_the_same_bits(tmp_path, whole, step):
    with pytest.raises(SystemExit):
        run_dcgan(CONFIG, tmp_path / "run", data=Pictures(), reporter=Crash(step))
    torch.randn(7)  # nothing may depend on torch's own generator
    assert resume(tmp_path / "run").finished
    assert weights(tmp_path / "run") == weights(whole)
    strip = lambda path: [
        {name: value for name, value in json.loads(line).items() if name not in ("seconds", "wait")}
        for line in (path / "metrics.jsonl").read_text().splitlines()
    ]
    assert strip(tmp_path / "run") == strip(whole)
    for picture in (whole / "samples").iterdir():
        assert (tmp_path / "run" / "samples" / picture.name).read_bytes() == picture.read_bytes()


def test_R65_a_finished_run_stays_as_it_is(whole):
    before = tree(whole)
    result = resume(whole)
    assert result.finished
    assert result.step == 6
    assert tree(whole) == before


def test_a_finished_run_can_be_made_longer(tmp_path, whole):
    folder = tmp_path / "run"
    run(folder, max_steps=3)
    assert resume(folder, {"max_steps": 6}).finished
    assert weights(folder) == weights(whole)


def test_a_copy_that_followed_links_goes_on(tmp_path, whole):
    run(tmp_path / "run", max_steps=3)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert not (tmp_path / "copy" / "last").is_symlink()
    shutil.rmtree(tmp_path / "copy" / "checkpoints")
    assert resume(tmp_path / "copy", {"max_steps": 6}).finished
    assert weights(tmp_path / "copy") == weights(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves(tmp_path, whole, number):
    before = signal.getsignal(number)
    result = run_dcgan(CONFIG, tmp_path / "run", data=Pictures(), reporter=StopAt(3, number))
    assert signal.getsignal(number) == before
    assert (result.interrupted, result.step) == (True, 3)
    assert os.readlink(tmp_path / "run" / "last").endswith("step-000000003")
    assert resume(tmp_path / "run").finished
    assert weights(tmp_path / "run") == weights(whole)


def test_R66_same_seed_same_bits_another_seed_other_weights(tmp_path, whole):
    run(tmp_path / "same")
    run(tmp_path / "other", seed=4)
    assert weights(tmp_path / "same") == weights(whole)
    assert weights(tmp_path / "other")["generator"] != weights(whole)["generator"]


def test_R62_fewer_pictures_than_a_batch_train(tmp_path):
    result = run_dcgan(dataclasses.replace(CONFIG, batch_size=64, max_steps=2), tmp_path / "run", data=Pictures(3))
    assert (result.step, result.finished) == (2, True)


def unfinished(folder):
    with pytest.raises(SystemExit):
        run_dcgan(CONFIG, folder, data=Pictures(), reporter=Crash(5))
    return folder


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_bit, lambda path: path.write_bytes(b""), lambda path: path.unlink()]
)
@pytest.mark.parametrize(
    "name", ["generator.safetensors", "discriminator.safetensors", "optimizers.safetensors", "trainer.json"]
)
def test_R65_a_damaged_checkpoint_is_refused_by_name_and_changes_no_file(tmp_path, whole, damage, name):
    folder = shutil.copytree(whole, tmp_path / "run", symlinks=True)
    damage(folder / "last" / name)
    before = tree(folder)
    with pytest.raises(RunError, match=name):
        resume(folder, {"max_steps": 9})
    assert tree(folder) == before


def rewritten(folder, change):
    """The checkpoint's header changed by somebody who also mends its hash."""
    path = folder / "last" / "trainer.json"
    header = json.loads(path.read_text())
    header.pop("sha256")
    change(header)
    header["sha256"] = checkpoints.sha256(checkpoints.canonical(header))
    path.write_text(json.dumps(header))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.update(format="other"), "not a checkpoint of fastgan"),
        (lambda header: header.update(version=99), "version 99"),
        (lambda header: header.update(config_sha256="0"), "another configuration"),
    ],
)
def test_foreign_checkpoints_are_refused(tmp_path, change, message):
    folder = unfinished(tmp_path / "run")
    rewritten(folder, change)
    before = tree(folder)
    with pytest.raises(RunError, match=message):
        resume(folder)
    assert tree(folder) == before


def test_R65_resuming_from_nothing_is_refused_by_name(tmp_path):
    with pytest.raises(RunError, match="nowhere"):
        resume(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(RunError, match="holds no run"):
        resume(tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_configuration_is_refused(tmp_path):
    folder = unfinished(tmp_path / "run")
    before = tree(folder)
    with pytest.raises(RunError, match="batch_size = 4, not 8"):
        resume(folder, {"batch_size": 8})
    with pytest.raises(RunError, match="holds a run already"):
        run(folder)
    other = Pictures()
    other.digest = "1" * 64
    with pytest.raises(RunError, match="not the pictures"):
        resume_dcgan(folder, data=other)
    assert tree(folder) == before
    document = json.loads((folder / "config.json").read_text())
    document["config"]["lr"] = 0.5
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(RunError, match="another configuration"):
        resume(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"format": "fastgan-run", "version": 1}', b"\xff"])
def test_a_damaged_config_is_refused_by_name(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RunError, match=r"config\.json"):
        resume(tmp_path)


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "disk")


@pytest.mark.parametrize("at", ["write", "rename", "fsync"])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, whole, at):
    folder = tmp_path / "run"
    run(folder, max_steps=2)
    before = weights(folder)
    with monkeypatch.context() as patch:
        if at == "write":
            write = checkpoints.write_file
            patch.setattr(checkpoints, "write_file", lambda p, d: full() if p.name == "trainer.json" else write(p, d))
        elif at == "rename":
            patch.setattr(checkpoints.os, "rename", full)
        else:
            patch.setattr(checkpoints, "fsync_folder", full)
        with pytest.raises(OSError, match="last good checkpoint is untouched"):
            resume(folder, {"max_steps": 6})
    assert weights(folder) == before
    assert not [path for path in (folder / "checkpoints").iterdir() if path.name.startswith(".tmp")]
    assert resume(folder).finished
    assert weights(folder) == weights(whole)


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path):
    bad = Pictures()
    folder = tmp_path / "run"
    run(folder, max_steps=2)
    before = weights(folder)
    bad.pixels[:] = float("nan")
    with pytest.raises(RunError, match=r"loss_d is nan at step 2.*step 2, is untouched.*last"):
        resume_dcgan(folder, {"max_steps": 6}, data=bad)
    assert weights(folder) == before


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run(folder, max_steps=2)
    before = weights(folder)
    from fastgan.training.gan import GANTrainer

    step = GANTrainer.train_step

    def ruin(self, real):
        result = step(self, real)
        next(self.generator.parameters()).data[0] = float("inf")
        return result

    monkeypatch.setattr(GANTrainer, "train_step", ruin)
    monkeypatch.setattr(GANTrainer, "sample", lambda self, count, seed: torch.zeros(1, 1, 8, 8))
    with pytest.raises(RunError, match="not finite after step 3"):
        resume(folder, {"max_steps": 3})
    assert weights(folder) == before


def test_a_second_process_is_refused(tmp_path):
    class Second(Silent):
        def update(self, step, metrics, images):
            if step == 3:
                code = (
                    "import sys\nfrom fastgan.training.run_folder import RunFolder, RunError\n"
                    "try: RunFolder(sys.argv[1]).lock()\n"
                    "except RunError as error: print(error); sys.exit(7)"
                )
                got = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True)
                assert got.returncode == 7, got.stderr
                assert "another process" in got.stdout
                seen.append(step)

    seen = []
    run_dcgan(CONFIG, tmp_path / "run", data=Pictures(), reporter=Second())
    assert seen == [3]


def test_the_generator_of_a_run(whole):
    generator, config, step = load_generator(whole)
    assert (config, step, generator.training) == (CONFIG, 6, False)
    assert generator(torch.randn(2, 4, 1, 1)).shape == (2, 1, 8, 8)


def test_optimizer_moments_get_their_parameters_layout_back(whole):
    from fastgan.training.run import make_trainer

    trainer = make_trainer(CONFIG)
    checkpoints.load_checkpoint(trainer, whole / "last")
    moments = [
        (parameter.stride(), value.stride())
        for optimizer in (trainer.optimizer_g, trainer.optimizer_d)
        for parameter, state in optimizer.state.items()
        for value in state.values()
        if value.shape == parameter.shape
    ]
    assert moments
    assert all(parameter == value for parameter, value in moments)


@pytest.mark.parametrize(
    "name", ["batch_size", "ngf", "ndf", "latent", "channels", "epochs", "max_steps", "sample_every"]
)
@pytest.mark.parametrize("value", [0, -1])
def test_R63_numbers_below_one_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        DCGANConfig(**{name: value})


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 48},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"beta1": 1.0},
        {"loss": "x"},
        {"precision": "x"},
        {"seed": -1},
    ],
)
def test_other_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DCGANConfig(**wrong)


def test_presets_are_valid():
    assert digits_demo().image_size == 32
    assert article().image_size == 64


def test_a_grid_is_laid_out_row_by_row():
    pictures = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 3, 4, 5)
    import io

    grid = np.asarray(Image.open(io.BytesIO(grid_png(pictures, columns=3))))
    assert grid.shape == (2 * 6 + 2, 3 * 7 + 2, 3)
    assert [int(grid[2 + 6 * (i // 3), 2 + 7 * (i % 3), 0]) for i in range(6)] == [0, 51, 102, 153, 204, 255]


class Watching(Silent):
    def __init__(self):
        self.seen = []

    def update(self, step, metrics, images):
        self.seen.append(step)


def lines_of(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in ("wait", "seconds")} for line in lines]


def test_a_gpus_steps_are_reported_in_order_and_before_the_checkpoint(tmp_path, whole, monkeypatch):
    """There a step is reported once the next has been started; the lines and the weights are the same."""
    reporter, reported = Watching(), []
    monkeypatch.setattr("fastgan.training.gan.GANTrainer._looks_early", False)
    save = checkpoints.save_checkpoint

    def saving(trainer, *rest):
        reported.append((trainer.step, list(reporter.seen)))
        return save(trainer, *rest)

    monkeypatch.setattr("fastgan.training.run.save_checkpoint", saving)
    begun = []
    start = GANTrainer.train_step
    monkeypatch.setattr(GANTrainer, "train_step", lambda *a: begun.append(list(reporter.seen)) or start(*a))
    assert run_dcgan(CONFIG, tmp_path / "run", data=Pictures(), reporter=reporter).finished
    assert begun == [[], [], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]]  # 2, 4 and 6 are saved, 3 and 6 drawn
    assert reported == [(step, list(range(1, step + 1))) for step in (2, 4, 6)]
    assert lines_of(tmp_path / "run") == lines_of(whole)
    assert weights(tmp_path / "run") == weights(whole)


@pytest.mark.filterwarnings("ignore:real runs from inf")
def test_a_gpus_loss_that_is_not_finite_ends_the_run_with_its_step(tmp_path, monkeypatch):
    monkeypatch.setattr("fastgan.training.gan.GANTrainer._looks_early", False)
    pictures = Pictures()
    pictures.pixels[:] = float("inf")
    with pytest.raises(RunError, match=r"loss_d is nan at step 1: training has diverged.*no checkpoint"):
        run_dcgan(CONFIG, tmp_path / "run", data=pictures)
