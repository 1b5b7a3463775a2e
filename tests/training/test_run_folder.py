"""What a run leaves alone, and checkpoints that somebody changed and sealed again."""

import dataclasses
import json
import os
import resource
import shutil
import signal

import pytest
import torch
from safetensors.torch import load, save

from fastgan.training import RunError, load_generator, resume_dcgan, run_dcgan
from fastgan.training import checkpoint as checkpoints
from fastgan.training.run import Silent, check_memory
from fastgan.training.run_folder import NAMES, RunFolder
from tests.training.test_run import CONFIG, Crash, Pictures, StopAt, resume, run, tree, weights


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("fastgan.training.pictures.curves_png", lambda rows, title: b"png")
    monkeypatch.setattr("fastgan.training.run_folder.RunFolder.write_events", lambda self: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that ended at step 5 without a word; its checkpoint is step 4's."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(SystemExit):
        run_dcgan(CONFIG, folder, data=Pictures(), reporter=Crash(5))
    return folder


@pytest.fixture
def folder(tmp_path, killed):
    return shutil.copytree(killed, tmp_path / "run", symlinks=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_run_overwrites_nothing_that_is_there(tmp_path, name):
    mine = tmp_path / "run" / name
    if "." in name:
        mine.parent.mkdir()
        mine.write_text("mine")
    else:
        (mine / "step-000000001").mkdir(parents=True)
        (mine / "step-000000001" / "best.safetensors").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(RunError, match="already"):
        run(tmp_path / "run")
    assert tree(tmp_path) == before


def test_other_files_in_the_folder_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    run(tmp_path, max_steps=2)
    (tmp_path / "checkpoints" / "mine").mkdir()
    resume(tmp_path, {"max_steps": 4})
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "checkpoints" / "mine").exists()


def test_pictures_may_move_but_not_change(folder, tmp_path):
    with pytest.raises(RunError, match=r"nowhere.*--data"):
        resume_dcgan(folder, {"data": str(tmp_path / "nowhere")})
    document = json.loads((folder / "config.json").read_text())
    assert document["config"]["data"] == CONFIG.data
    assert resume(folder, {"data": str(tmp_path)}).finished  # the pictures themselves are handed in
    assert json.loads((folder / "config.json").read_text())["config"]["data"] == str(tmp_path)


def sealed(folder, name, change):
    """Changes a file's tensors and mends every hash, as somebody would who knows the format."""
    path = folder / "last" / name
    path.write_bytes(save(change(dict(load(path.read_bytes())))))
    header = json.loads((folder / "last" / "trainer.json").read_text())
    header.pop("sha256")
    header["files"][name] = {"bytes": path.stat().st_size, "sha256": checkpoints.sha256(path.read_bytes())}
    header["sha256"] = checkpoints.sha256(checkpoints.canonical(header))
    (folder / "last" / "trainer.json").write_text(json.dumps(header))


def largest(change):
    """``change`` on the tensor with the most numbers."""

    def on(tensors):
        name = max(tensors, key=lambda key: tensors[key].numel())
        return {**tensors, name: change(tensors[name])}

    return on


@pytest.mark.parametrize("name", ["generator.safetensors", "optimizers.safetensors"])
@pytest.mark.parametrize(
    "change",
    [
        largest(lambda tensor: torch.zeros(3, 3)),
        largest(lambda tensor: tensor.double()),
        largest(lambda tensor: tensor * float("nan")),
        lambda tensors: dict(list(tensors.items())[1:]),
        lambda tensors: {**tensors, "other": torch.zeros(1)},
        lambda tensors: {"other": torch.zeros(1)},
    ],
    ids=["shape", "type", "nan", "missing", "extra", "foreign"],
)
def test_R65_a_checkpoint_changed_and_sealed_is_refused_by_name(folder, name, change):
    sealed(folder, name, change)
    before = tree(folder)
    with pytest.raises(RunError, match=name):
        resume(folder)
    if name.startswith("generator"):
        with pytest.raises(RunError, match=name):
            load_generator(folder)
    assert tree(folder) == before


def test_R65_an_optimizer_without_its_state_is_refused(folder):
    # it would go on with moments of zero: no error, worse pictures
    sealed(folder, "optimizers.safetensors", lambda tensors: {k: v for k, v in tensors.items() if k[0] == "d"})
    with pytest.raises(RunError, match=r"optimizers\.safetensors: holds nothing of the generator's"):
        resume(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.update(step="4"),
        lambda header: header.update(step=-1),
        lambda header: header.pop("step"),
        lambda header: header.pop("files"),
        lambda header: header.update(optimizers=[]),
        lambda header: header["optimizers"].pop("generator"),
        lambda header: header["optimizers"]["generator"].update(groups=[]),
        lambda header: header["optimizers"]["generator"]["groups"][0].update(lr="fast"),
        lambda header: header["optimizers"]["generator"].update(type="SGD"),
        lambda header: header.pop("config_sha256"),
    ],
)
def test_R65_a_header_without_its_parts_is_refused_by_name(folder, change):
    path = folder / "last" / "trainer.json"
    header = json.loads(path.read_text())
    header.pop("sha256")
    change(header)
    header["sha256"] = checkpoints.sha256(checkpoints.canonical(header))
    path.write_text(json.dumps(header))
    before = tree(folder)
    with pytest.raises(RunError, match=r"trainer\.json"):
        resume(folder)
    assert tree(folder) == before


@pytest.mark.parametrize("wrong", [{"lr": "x"}, {"seed": 1.5}, {"data": 3}, {"flip": "no"}, {"beta1": None}])
def test_settings_of_another_type_are_refused_by_name(folder, wrong):
    path = folder / "config.json"
    document = json.loads(path.read_text())
    document["config"].update(wrong)
    path.write_text(json.dumps(document))
    with pytest.raises(RunError, match=rf"config\.json: {next(iter(wrong))} must be"):
        resume(folder)


def test_metrics_of_another_kind_are_dropped(folder):
    (folder / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\n[]\n{"step": 2, "seconds": "x"}\n{"step": 3, "los')
    assert resume(folder).finished
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 6]


@pytest.mark.parametrize("room", [0, 200, 3000])
def test_a_disk_that_fills_up_anywhere_is_named_and_leaves_the_checkpoint(folder, room):
    before = weights(folder)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            resume(folder, {"sample_every": 5, "checkpoint_every": 6})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert str(folder) in str(caught.value.filename)
    assert weights(folder) == before
    assert not [path for path in folder.rglob("*") if "tmp" in path.name]
    assert resume(folder).finished


def test_sighup_saves_and_what_is_ignored_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves
    try:
        assert run_dcgan(CONFIG, tmp_path / "a", data=Pictures(), reporter=StopAt(3, signal.SIGHUP)).interrupted
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        assert run_dcgan(CONFIG, tmp_path / "b", data=Pictures(), reporter=StopAt(3, signal.SIGHUP)).finished
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reader_that_has_gone_ends_the_run_saved(tmp_path):
    class Head(Silent):
        def update(self, step, metrics, images):
            if step == 3:
                raise BrokenPipeError

    assert run_dcgan(CONFIG, tmp_path / "run", data=Pictures(), reporter=Head()).interrupted
    assert os.readlink(tmp_path / "run" / "last").endswith("3")


def test_what_does_not_fit_into_memory_is_refused_before_any_work(tmp_path):
    config = dataclasses.replace(CONFIG, image_size=65536)
    with pytest.raises(ValueError, match=r"image_size = 65536 .* GB with gradients"):
        run_dcgan(config, tmp_path / "run", data=Pictures(), device="cpu")
    assert not list(tmp_path.iterdir())
    check_memory(CONFIG, "cpu")


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fastgan.training.run_folder.fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="No locks available"):
        assert run(tmp_path / "run", max_steps=1).finished


def test_tensorboard_that_does_not_fit_is_said_once_and_left_out(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("fastgan.training.pictures.curves_png", lambda rows, title: b"png")

    class Broken:
        def __init__(self, *_, **__):
            raise TypeError("Descriptors cannot be created directly.\nSee ...")

    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    monkeypatch.setattr(tensorboard, "SummaryWriter", Broken)
    with pytest.warns(UserWarning, match=r"no TensorBoard events are written: TypeError: Descriptors") as caught:
        assert run(tmp_path / "run").finished
    assert len(caught) == 1


@pytest.mark.parametrize("name", ["a$\\foo$b", "日本", "x\udcff"])
def test_curves_are_drawn_in_a_folder_of_any_name(tmp_path, monkeypatch, name):
    monkeypatch.undo()
    folder = RunFolder(tmp_path / name)
    folder.path.mkdir()
    folder._rows = [{"step": step, "loss_d": 1.0, "loss_g": 1.0, "d_real": 0.5, "d_fake": 0.5} for step in (1, 2)]
    folder.draw_curves(force=True)
    assert (folder.path / "curves.png").read_bytes().startswith(b"\x89PNG")
