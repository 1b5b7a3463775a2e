"""Pretraining of tiny models: it learns, resumes to the same bits, and says what is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fastgan.data.corpus import prepare_text
from fastgan.training.checkpoint import RunError
from fastgan.training.pretrain import PretrainConfig, pretrain, resume_pretrain
from fastgan.training.run import Silent

LINES = [f"the {color} {noun} number {n} is {color} ." for n in range(60) for color, noun in
         (("red", "cat"), ("blue", "boat"))]  # fmt: skip
TINY = {"layers": 1, "width": 16, "heads": 2, "length": 16, "batch_size": 4, "warmup": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("\n".join(LINES))
    prepare_text([folder / "a.txt"], folder / "out", vocab_size=300, validation=0.2)
    return folder / "out"


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(corpus, **options):
    settings = {"objective": "clm", "data": str(corpus), "max_steps": 8, "eval_every": 3, **TINY, **options}
    return PretrainConfig(**settings)


def as_options(config):
    """The configuration as options of the command."""
    told = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    return [f"--{name.replace('_', '-')}={value}" for name, value in told.items()]


def validation_losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


class StopsAt(Silent):
    """Nobody reads any more at some step, which ends a run as a signal would."""

    def __init__(self, step):
        self.step = step

    def update(self, step, metrics, images):
        if step == self.step:
            raise BrokenPipeError


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_it_learns_and_transformers_reads_the_folder(corpus, tmp_path, objective):
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    config = tiny(corpus, objective=objective, max_steps=60, eval_every=30, lr=1e-2, dropout=0.0, width=32)
    result = pretrain(config, tmp_path / "run")
    assert (result.step, result.interrupted) == (60, False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.75 * losses[0]
    assert validation_losses(tmp_path / "run")[60] == result.validation_loss < 0.75 * losses[0]
    assert (result.validation_loss_per_character is not None) == (objective == "clm")
    assert (tmp_path / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    kind = AutoModelForMaskedLM if objective == "mlm" else AutoModelForCausalLM
    model = kind.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert model.config.vocab_size == len(tokenizer)
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize(("objective", "stop"), [("mlm", 3), ("mlm", 5), ("clm", 7)])
def test_R65_stopped_and_resumed_it_has_the_same_weights(corpus, tmp_path, objective, stop):
    config = tiny(corpus, objective=objective, gradient_accumulation=2)
    pretrain(config, tmp_path / "whole")
    first = pretrain(config, tmp_path / "run", reporter=StopsAt(stop))
    assert (first.step, first.interrupted) == (stop, True)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    torch.rand(7)  # the process's own generator is of no account
    second = resume_pretrain(tmp_path / "run")
    assert second.step == 8
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("validation_loss") == 3
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-8"]
    before = weights(tmp_path / "run")
    assert resume_pretrain(tmp_path / "run").step == 8
    assert weights(tmp_path / "run") == before


def test_seed_changes_the_weights_and_generators_are_left_alone(corpus, tmp_path):
    state = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain(tiny(corpus, max_steps=2, seed=seed), tmp_path / name)
    assert torch.equal(state, torch.get_rng_state())
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_early_stopping_keeps_the_best_weights(corpus, tmp_path):
    # So large a step that the loss rises after a while.
    config = tiny(corpus, max_steps=60, eval_every=4, lr=0.3, early_stopping=2, dropout=0.0, warmup=10)
    result = pretrain(config, tmp_path / "run")
    assert result.stopped_early
    assert result.step < 60
    validation = validation_losses(tmp_path / "run")
    assert result.validation_loss == min(validation.values())
    best = min(validation, key=validation.__getitem__)
    assert result.step == best + 8
    assert resume_pretrain(tmp_path / "run") == result
    # The kept weights are the best step's.
    pretrain(dataclasses.replace(config, early_stopping=0), tmp_path / "to-best", reporter=StopsAt(best))
    found = tmp_path / "to-best" / "checkpoints" / f"checkpoint-{best}"
    assert weights(found) == weights(tmp_path / "run")


def test_a_model_is_gone_on_from_and_another_tokenizer_is_refused(corpus, tmp_path):
    pretrain(tiny(corpus, max_steps=2), tmp_path / "first")
    result = pretrain(tiny(corpus, max_steps=2, model=tmp_path / "first"), tmp_path / "second")
    assert result.step == 2
    assert weights(tmp_path / "second") != weights(tmp_path / "first")
    (tmp_path / "b.txt").write_text("\n".join(line[::-1] for line in LINES))
    prepare_text([tmp_path / "b.txt"], tmp_path / "other", vocab_size=300)
    for config, error, words in [
        (tiny(tmp_path / "other", model=tmp_path / "first"), ValueError, "another tokenizer"),
        (tiny(corpus, model=tmp_path / "first", length=17), ValueError, "length must be at most 16"),
        (tiny(corpus, model=tmp_path / "nowhere"), FileNotFoundError, "nowhere"),
        (tiny(corpus, model=tmp_path / "first", objective="mlm"), ValueError, "objective mlm"),
    ]:
        with pytest.raises(error, match=words):
            pretrain(config, tmp_path / "third")
        assert not (tmp_path / "third").exists()


def test_what_cannot_be_is_refused_by_name(corpus, tmp_path):
    for options, words in [
        ({"width": 15}, "width"), ({"heads": 0}, "heads"), ({"lr": 0.0}, "lr"), ({"objective": "nsp"}, "objective"),
        ({"precision": "int8"}, "precision"), ({"length": 3}, "length"), ({"dropout": 1.0}, "dropout"),
        ({"max_steps": 0}, "max_steps"), ({"seed": -1}, "seed"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            tiny(corpus, **options)
    with pytest.raises(ValueError, match="do not fill"):
        pretrain(tiny(corpus, length=100_000), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no corpus"):
        pretrain(tiny(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resuming_refuses_other_settings_other_text_and_damage(corpus, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(RunError, match="no such folder"):
        resume_pretrain(folder)
    pretrain(tiny(corpus), folder, reporter=StopsAt(4))
    with pytest.raises(RunError, match="holds a run already"):
        pretrain(tiny(corpus), folder)
    with pytest.raises(RunError, match="width = 16, not 32"):
        resume_pretrain(folder, {"width": 32})
    (tmp_path / "b.txt").write_text("\n".join(LINES[::-1]))
    prepare_text([tmp_path / "b.txt"], tmp_path / "other", vocab_size=300)
    with pytest.raises(RunError, match="other text"):
        resume_pretrain(folder, {"data": str(tmp_path / "other")})
    file = folder / "checkpoints" / "checkpoint-4" / "optimizer.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(RunError, match=r"optimizer\.pt: damaged"):
        resume_pretrain(folder)


def test_R65_killed_while_it_writes_the_older_checkpoint_stands(corpus, tmp_path, monkeypatch):
    from fastgan.training import language_trainer

    config = tiny(corpus)
    pretrain(config, tmp_path / "whole")

    class Killed(BaseException):
        pass

    def seal(folder, real=language_trainer._seal):
        if folder.name == "checkpoint-6":
            (folder / "optimizer.pt").write_bytes(b"half of it")
            raise Killed
        real(folder)

    monkeypatch.setattr(language_trainer, "_seal", seal)
    with pytest.raises(Killed):
        pretrain(config, tmp_path / "run")
    monkeypatch.undo()
    assert language_trainer.find_checkpoint(tmp_path / "run")[0].name == "checkpoint-3"
    resume_pretrain(tmp_path / "run")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_bfloat16_trains(corpus, tmp_path):
    result = pretrain(tiny(corpus, objective="mlm", precision="bfloat16", max_steps=3), tmp_path / "run")
    assert 0 < result.validation_loss < 20


def _command(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "fastgan", *map(str, arguments)], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("objective", ["mlm", "rtd"])
def test_R65_killed_with_sigkill_and_resumed(corpus, tmp_path, objective):
    config = dataclasses.replace(tiny(corpus), max_steps=60, eval_every=2, objective=objective)
    pretrain(config, tmp_path / "whole")
    options = as_options(config)
    folder, kills = tmp_path / "run", 0
    while not (folder / "result.json").exists():
        resume = (folder / "run.json").exists()
        process = _command("pretrain", "--out", folder, *(["--resume"] if resume else options))
        before, limit = set(folder.glob("checkpoints/checkpoint-*")), time.monotonic() + 120
        while kills < 6 and process.poll() is None and time.monotonic() < limit:
            if set(folder.glob("checkpoints/checkpoint-*")) - before:  # it has come on: now, in mid-work
                time.sleep(0.013 * (kills + 1))
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        output, _ = process.communicate(timeout=120)
        assert process.returncode in (0, -signal.SIGKILL), output
    assert kills == 6
    for part in (".", "generator") if objective == "rtd" else (".",):
        assert weights(folder / part) == weights(tmp_path / "whole" / part)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_do_as_one_with_the_double_batch(corpus, tmp_path):
    config = tiny(corpus, objective="clm", dropout=0.0, batch_size=2)
    pretrain(dataclasses.replace(config, batch_size=4), tmp_path / "one")
    options = as_options(config)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastgan",
         "pretrain", "--out", tmp_path / "two", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (validation_losses(tmp_path / name) for name in ("one", "two"))
    assert list(two) == [3, 6, 8]
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)


# Which words a generator draws depends on the process, as dropout does; here they are its likeliest.
RTD = """
import sys
from fastgan.training.pretrain import PretrainConfig, pretrain
from fastgan.training.rtd import Players

Players._sample = lambda self, logits, originals: logits.argmax(-1)
data, out, size = sys.argv[1:]
pretrain(PretrainConfig(objective="rtd", data=data, max_steps=8, eval_every=3, dropout=0.0, batch_size=int(size),
                        layers=1, width=16, heads=2, length=16, warmup=2, lr=1e-2), out)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_of_rtd_do_as_one_with_the_double_batch(corpus, tmp_path):
    (tmp_path / "run.py").write_text(RTD)
    distributed = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, size, launcher in (("one", 4, []), ("two", 2, distributed)):
        done = subprocess.run(
            [sys.executable, *launcher, tmp_path / "run.py", corpus, tmp_path / name, str(size)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    one, two = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
                for name in ("one", "two"))  # fmt: skip
    assert {"generator_loss", "validation_generator_loss", "validation_accuracy"} <= {key for row in one for key in row}
    for mine, other in zip(one, two, strict=True):
        # What is shown of the generator is a mean of the batches' means, which have unequal numbers of masks, and an
        # evaluation's last batch is filled up where processes share it.
        roughly = [name for name in mine if name == "generator_loss" or name.startswith("validation_")]
        assert [other.pop(name) for name in roughly] == pytest.approx([mine.pop(name) for name in roughly], rel=0.03)
        assert other == pytest.approx(mine, rel=1e-4)
