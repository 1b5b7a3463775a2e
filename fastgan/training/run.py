"""Training a DCGAN in a run folder: saved whole, resumed bit for bit.

Everything random is a pure function of the seed and the step (weights, the order of the pictures, flips, noise), so
that a checkpoint holds weights, optimizer and step, and nothing else is needed to go on exactly.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fastgan._version import __version__
from fastgan.data import ImageArray, ImageBatches, load_images
from fastgan.data.sources import as_text
from fastgan.models.dcgan import DCGAN, check_image_size
from fastgan.ops.gan_loss import LOSSES
from fastgan.training.checkpoint import (
    RunError,
    check_state,
    find_checkpoint,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from fastgan.training.gan import PRECISIONS, GANTrainer
from fastgan.training.pictures import grid_png
from fastgan.training.run_folder import RunFolder, changed, config_digest
from fastgan.training.step_result import StepResult
from fastgan.training.streams import INIT, mixed_seed


@dataclass(frozen=True)
class DCGANConfig:
    """What ``fastgan train dcgan`` is told; every default is here and nowhere else."""

    data: str = "digits"  # a folder, a zip file, "cifar10" or "digits"
    image_size: int = 64  # 4·2ⁿ
    channels: int = 3
    batch_size: int = 64
    latent: int = 100  # length of a noise vector
    ngf: int = 64  # width of the generator
    ndf: int = 64  # width of the discriminator
    lr: float = 2e-4
    beta1: float = 0.5
    loss: str = "bce"
    flip: bool = False  # mirror pictures at random
    precision: str = "float32"
    seed: int = 0
    # What follows may change when a run is resumed.
    epochs: int = 100
    max_steps: int | None = None
    checkpoint_every: int = 500
    sample_every: int = 500

    def __post_init__(self) -> None:
        for name in ("channels", "batch_size", "latent", "ngf", "ndf", "epochs", "max_steps", "checkpoint_every",
                     "sample_every", "image_size"):  # fmt: skip
            value = getattr(self, name)
            if value is None and name == "max_steps":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not isinstance(self.data, (str, os.PathLike)):
            raise TypeError(f"data must be a path, 'cifar10' or 'digits', got {self.data!r}")
        object.__setattr__(self, "data", as_text(self.data))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an integer, got {self.seed!r}")
        for name in ("lr", "beta1"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), (int, float)):
                raise TypeError(f"{name} must be a number, got {getattr(self, name)!r}")
        if not isinstance(self.flip, bool):
            raise TypeError(f"flip must be True or False, got {self.flip!r}")
        check_image_size(self.image_size)
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if not 0 <= self.beta1 < 1:
            raise ValueError(f"beta1 must be in [0, 1), got {self.beta1}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")

    def total_steps(self, pictures: int) -> int:
        total = self.epochs * -(-pictures // self.batch_size)
        return total if self.max_steps is None else min(total, self.max_steps)


#: fields that a resumed run may change; ``data`` only in its place: the pictures themselves must be the same
CHANGEABLE = ("data", "epochs", "max_steps", "checkpoint_every", "sample_every")


class Reporter(Protocol):
    """Is told how a run goes."""

    def start(self, step: int, total: int, batch_size: int) -> None: ...

    def update(self, step: int, metrics: dict[str, float], images: int) -> None: ...

    def say(self, message: str) -> None: ...


class Silent:
    """A reporter that says nothing."""

    def start(self, step: int, total: int, batch_size: int) -> None:
        pass

    def update(self, step: int, metrics: dict[str, float], images: int) -> None:
        pass

    def say(self, message: str) -> None:
        pass


@dataclass(frozen=True)
class Result:
    """How a run ended: where, at which step, and whether there is more to do."""

    folder: Path
    step: int
    total: int
    interrupted: bool = False

    @property
    def finished(self) -> bool:
        return self.step >= self.total


def run_dcgan(
    config: DCGANConfig,
    out: str | os.PathLike[str],
    *,
    device: str | None = None,
    num_workers: int = 0,
    cache_dir: str | None = None,
    reporter: Reporter | None = None,
    data: ImageArray | None = None,
) -> Result:
    """Trains a new DCGAN in ``out``, which may exist, but holds nothing that a run writes.

    Args:
        config: what to train on what.
        out: the run's folder.
        device: "cpu", "cuda", ...; None takes a GPU if there is one.
        num_workers: threads that prepare batches. The result does not depend on it.
        cache_dir: where decoded pictures are kept, see ``fastgan.data.load_images``.
        reporter: is told how it goes.
        data: pictures loaded already, in place of loading ``config.data``.

    SIGINT, SIGTERM and SIGHUP end the run after the current step, saved, and so does a reporter that nobody reads any
    more (BrokenPipeError). Raises RunError, ValueError, FileNotFoundError or OSError (a full disk) with the file's
    name, and leaves the last whole checkpoint as it was.
    """
    folder = RunFolder(out)
    folder.refuse_used()
    check_memory(config, device)
    images = _load(config, cache_dir) if data is None else data
    trainer = make_trainer(config, device)  # what does not fit into memory leaves no folder behind
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.lock()
    try:
        folder.refuse_used()
        folder.write_config(_document(config, images))
        return _train(config, folder, images, None, trainer, num_workers, reporter or Silent())
    finally:
        folder.close()


def resume_dcgan(
    out: str | os.PathLike[str],
    changes: dict[str, Any] | None = None,
    *,
    device: str | None = None,
    num_workers: int = 0,
    cache_dir: str | None = None,
    reporter: Reporter | None = None,
    data: ImageArray | None = None,
) -> Result:
    """Goes on with the run in ``out`` from its last checkpoint, with the same bits as if it had never stopped.

    ``changes`` may name ``epochs``, ``max_steps``, ``checkpoint_every``, ``sample_every``, and ``data`` where the same
    pictures lie in another place now; another field must be as it was. A finished run is left as it is. Everything is
    checked before any file is changed; arguments and errors otherwise as ``run_dcgan``'s.
    """
    folder = RunFolder(out)
    document = folder.read_config()
    before = config_of(document, folder.path)
    config = changed(before, changes, CHANGEABLE, folder.path)
    folder.lock()
    try:
        checkpoint = find_checkpoint(folder.path)
        step = 0
        if checkpoint is not None:
            header, _ = read_checkpoint(checkpoint)
            step = header["step"]
            if header.get("config_sha256") != _digest(document):
                raise RunError(f"{checkpoint / 'trainer.json'}: belongs to another configuration than config.json")
        total = config.total_steps(document["pictures"])
        if step >= total:
            return Result(folder.path, step, total)
        try:
            images = _load(config, cache_dir) if data is None else data
        except FileNotFoundError as error:
            raise RunError(
                f"{error}; the run in {folder.path} was started with these pictures. Where they have moved, name "
                "their new place (--data)"
            ) from error
        if images.digest != document["data_sha256"]:
            raise RunError(f"{config.data}: these are not the pictures that the run in {folder.path} was started with")
        trainer = make_trainer(config, device)
        if checkpoint is not None:
            load_checkpoint(trainer, checkpoint, _digest(document))
        if config != before:
            folder.write_config(_document(config, images))
        return _train(config, folder, images, checkpoint, trainer, num_workers, reporter or Silent())
    finally:
        folder.close()


def config_of(document: dict[str, Any], folder: Path) -> DCGANConfig:
    """The configuration within a config.json; RunError if it is none."""
    fields = {field.name for field in dataclasses.fields(DCGANConfig)}
    stored = document.get("config")
    path = folder / "config.json"
    if document.get("kind") != "dcgan" or not isinstance(stored, dict) or set(stored) != fields:
        raise RunError(f"{path}: not the configuration of a DCGAN run of this fastgan")
    if not isinstance(document.get("pictures"), int) or not isinstance(document.get("data_sha256"), str):
        raise RunError(f"{path}: does not say what data it was started with")
    try:
        return DCGANConfig(**stored)
    except (TypeError, ValueError) as error:
        raise RunError(f"{path}: {error}") from error


def load_generator(folder: str | os.PathLike[str]) -> tuple[torch.nn.Module, DCGANConfig, int]:
    """The generator of a run's last checkpoint, in evaluation mode, its configuration and step; RunError if damaged."""
    run = RunFolder(folder)
    config = config_of(run.read_config(), run.path)
    for attempt in range(3):
        checkpoint = find_checkpoint(run.path)
        if checkpoint is None:
            raise RunError(f"{run.path}: has no checkpoint yet")
        try:
            header, tensors = read_checkpoint(checkpoint)
            break
        except RunError:
            # A run that is going on deletes its older checkpoint; then there is a newer one.
            if attempt == 2 or find_checkpoint(run.path) == checkpoint:
                raise
    assert checkpoint is not None
    model = DCGAN(config.image_size, config.channels, config.latent, config.ngf, config.ndf).generator
    if config.precision == "float64":
        model.double()
    check_state(model, tensors["generator"], checkpoint / "generator.safetensors")
    model.load_state_dict(tensors["generator"])
    return model.eval(), config, int(header["step"])


def _load(config: DCGANConfig, cache_dir: str | None) -> ImageArray:
    return load_images(config.data, config.image_size, config.channels, cache_dir=cache_dir)


def _document(config: DCGANConfig, images: ImageArray) -> dict[str, Any]:
    return {
        "kind": "dcgan",
        "fastgan": __version__,
        "config": dataclasses.asdict(config),
        "pictures": len(images),
        "data_sha256": images.digest,
    }


def _digest(document: dict[str, Any]) -> str:
    """Of everything that the weights depend on."""
    identity = {name: value for name, value in document["config"].items() if name not in CHANGEABLE}
    # the pictures themselves, wherever they lie
    return config_digest({**identity, "data": document["data_sha256"], "pictures": document["pictures"]})


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_memory(config: DCGANConfig, device: str | None = None) -> None:
    """ValueError where the weights alone, with gradients and Adam's averages, do not fit into this machine's memory."""
    with torch.device("meta"):
        gan = DCGAN(config.image_size, config.channels, config.latent, config.ngf, config.ndf)
    weights = sum(parameter.numel() for parameter in gan.parameters())
    needed = 4 * weights * (8 if config.precision == "float64" else 4)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there and (device or _default_device()).startswith("cpu"):
        raise ValueError(
            f"image_size = {config.image_size} with ngf = {config.ngf}, ndf = {config.ndf} and latent = "
            f"{config.latent} makes {weights / 1e6:,.0f} million weights, {needed / 1e9:,.0f} GB with gradients and "
            f"Adam's averages; this machine has {there / 1e9:,.0f} GB. A smaller image_size, or ngf and ndf, fits"
        )


def make_trainer(config: DCGANConfig, device: str | None = None) -> GANTrainer:
    """The networks and their trainer at step 0, a pure function of the configuration."""
    device = device or _default_device()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed_seed(config.seed, INIT, 0))
        gan = DCGAN(config.image_size, config.channels, config.latent, config.ngf, config.ndf)
    return GANTrainer(
        gan.generator,
        gan.discriminator,
        (config.latent, 1, 1),
        config.lr,
        (config.beta1, 0.999),
        config.loss,
        seed=config.seed,
        device=device,
        precision=config.precision,
    )


def _train(
    config: DCGANConfig,
    folder: RunFolder,
    images: ImageArray,
    checkpoint: Path | None,
    trainer: GANTrainer,
    num_workers: int,
    reporter: Reporter,
) -> Result:
    """The loop. Its order matters: metrics and pictures of a step are on disk before the checkpoint that ends it."""
    digest = _digest(_document(config, images))
    total = config.total_steps(len(images))
    folder.start_metrics(trainer.step)
    batches = ImageBatches(images, config.batch_size, config.seed, flip=config.flip, num_workers=num_workers)
    reporter.start(trainer.step, total, config.batch_size)
    saved: int | None = trainer.step if checkpoint is not None else None
    begin = time.monotonic() - folder.seconds
    unread = False
    unreported: list[Callable[[], None]] = []  # a GPU's last step, until the next one has been started

    def report(step: int, metrics: dict[str, float], wait: float, count: int) -> None:
        nonlocal unread
        epoch, _ = batches.order.position(step - 1)
        metrics["wait"] = round(wait, 6)
        folder.log({"step": step, "epoch": epoch, **metrics, "seconds": round(time.monotonic() - begin, 3)})
        try:
            reporter.update(step, metrics, count)
        except BrokenPipeError:
            unread = True

    def finish() -> None:
        while unreported:
            unreported.pop()()

    try:
        with _stop_when_asked() as stopping:
            for real, wait in _timed(batches.steps(trainer.step, total)):
                try:
                    metrics = trainer.train_step(real)
                    finish()
                    step = trainer.step
                    unreported.append(functools.partial(report, step, metrics, wait, len(real)))
                    if not isinstance(metrics, StepResult):
                        finish()
                    stop = unread or stopping() or step == total
                    samples = step % config.sample_every == 0 or step == total
                    saves = stop or step % config.checkpoint_every == 0
                    if samples or saves:
                        finish()
                except FloatingPointError as error:
                    raise RunError(f"{folder.path}: {error}. {_kept(folder.path, saved)}") from error
                stop = stop or unread
                if samples:
                    folder.write_sample(step, grid_png(trainer.sample(64, config.seed)))
                if stop or saves:
                    _refuse_not_finite(trainer, folder.path, saved)
                    folder.flush()
                    folder.draw_curves(force=stop)
                    folder.write_events()
                    save_checkpoint(trainer, folder.path, digest)
                    saved = step
                if stop:
                    break
    except OSError as error:
        if error.filename is None:
            raise
        raise OSError(error.errno, f"{error.strerror}. {_kept(folder.path, saved)}", error.filename) from error
    return Result(folder.path, trainer.step, total, interrupted=trainer.step < total)


def _timed(batches: Iterator[torch.Tensor]) -> Iterator[tuple[torch.Tensor, float]]:
    """Each batch, and the seconds that the step waited for it."""
    while True:
        begin = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - begin


def _kept(folder: Path, saved: int | None) -> str:
    if saved is None:
        return "There was no checkpoint yet"
    return f"The last good checkpoint, of step {saved}, is untouched: {folder / 'last'}"


def _refuse_not_finite(trainer: GANTrainer, folder: Path, saved: int | None) -> None:
    """Weights that the last step ruined would show in the next loss, after they had been saved."""
    for name, model in (("generator", trainer.generator), ("discriminator", trainer.discriminator)):
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise RunError(
                    f"{folder}: {name}.{key} is not finite after step {trainer.step}: training has diverged. "
                    f"{_kept(folder, saved)}"
                )


@contextmanager
def _stop_when_asked() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT, SIGTERM or SIGHUP came. A second SIGINT ends the process at once, as usual.

    A signal that is ignored stays so: nohup ignores SIGHUP, a shell SIGINT for what it runs in the background.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def handler(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in wanted if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield lambda: bool(asked)
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
