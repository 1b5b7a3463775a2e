"""``fastgan train dcgan``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer

from fastgan.cli.failures import in_one_line

app = typer.Typer(no_args_is_help=True, help="Train a model.")

# The defaults shown here are DCGANConfig's own (a test compares them): reading them would import torch for `--help`.
_FIELDS = ("data", "image_size", "channels", "batch_size", "latent", "ngf", "ndf", "lr", "beta1", "loss", "flip",
           "precision", "seed", "epochs", "max_steps", "checkpoint_every", "sample_every")  # fmt: skip


@app.callback()
def _train() -> None:
    pass


@app.command()
def dcgan(
    context: typer.Context,
    data: str = typer.Option("digits", help="A folder or zip file of pictures, cifar10 or digits."),
    image_size: int = typer.Option(64, help="Height and width: 8, 16, 32, 64, 128, ..."),
    channels: int = typer.Option(3, min=1, help="3 for colour, 1 for grey."),
    batch_size: int = typer.Option(64, min=1),
    latent: int = typer.Option(100, min=1, help="Length of a noise vector."),
    ngf: int = typer.Option(64, min=1, help="Width of the generator."),
    ndf: int = typer.Option(64, min=1, help="Width of the discriminator."),
    lr: float = typer.Option(2e-4, help="Learning rate of both."),
    beta1: float = typer.Option(0.5, help="Adam's first beta."),
    loss: str = typer.Option("bce", help="bce, hinge, lsgan or wasserstein."),
    flip: bool = typer.Option(False, "--flip", help="Mirror pictures at random."),
    precision: str = typer.Option("float32", help="float32, float64 or bfloat16."),
    seed: int = typer.Option(0, min=0, help="Same seed, same weights."),
    epochs: int = typer.Option(100, min=1),
    max_steps: int | None = typer.Option(None, min=1, help="Stop after so many steps, before the epochs are over."),
    checkpoint_every: int = typer.Option(500, min=1, help="Steps between checkpoints."),
    sample_every: int = typer.Option(500, min=1, help="Steps between pictures of samples."),
    out: Path | None = typer.Option(None, help="The run's folder. Default: runs/dcgan-<data>-<image size>."),
    resume: Path | None = typer.Option(None, help="Go on with the run in this folder."),
    device: str | None = typer.Option(None, help="cpu, cuda, ... Default: a GPU if there is one."),
    num_workers: int = typer.Option(0, min=0, help="Threads that prepare batches."),
    cache_dir: Path | None = typer.Option(None, help="Where decoded pictures are kept."),
) -> None:
    """Train a DCGAN, or go on with one.

    Ctrl-C saves and says how to go on. A run killed in any way goes on from its last checkpoint by --resume, and ends
    with the same weights, bit for bit.

    For example: fastgan train dcgan --data my_pictures --image-size 64 --out runs/mine

    Then: fastgan train dcgan --resume runs/mine --epochs 200
    """
    given = {name: context.params[name] for name in _FIELDS if _source(context, name) not in ("DEFAULT", "DEFAULT_MAP")}
    if resume is not None and out is not None:
        raise typer.BadParameter("--resume names the folder already; leave out --out")

    from fastgan.cli.progress import reporter
    from fastgan.training.run import DCGANConfig, resume_dcgan, run_dcgan

    settings: dict[str, Any] = {"device": _device(device), "num_workers": num_workers, "reporter": reporter()}
    settings["cache_dir"] = None if cache_dir is None else str(cache_dir)
    try:
        config = DCGANConfig(**given)
    except (TypeError, ValueError) as error:
        raise _usage(str(error)) from error
    if resume is None:
        check_data(config.data)
    try:
        with in_one_line():
            if resume is None:
                folder = out or _free_folder(config)
                typer.echo(f"training in {folder}")
                result = run_dcgan(config, folder, **settings)
            else:
                typer.echo(f"resuming {resume}")
                result = resume_dcgan(resume, given, **settings)
    finally:
        settings["reporter"].close()
    if result.interrupted:
        typer.echo(
            f"stopped at step {result.step} of {result.total}, saved. Go on with:\n"
            f"  fastgan train dcgan --resume {result.folder}"
        )
        raise typer.Exit(130)
    typer.echo(f"finished: {result.step} steps in {result.folder}; pictures in {result.folder / 'samples'}")


def _usage(message: str) -> typer.BadParameter:
    """A ValueError that begins with a field's name, as the option's."""
    name, _, rest = message.partition(" ")
    return typer.BadParameter(f"--{name.replace('_', '-')} {rest}" if name in _FIELDS else message)


def _source(context: typer.Context, name: str) -> str:
    source = context.get_parameter_source(name)
    return "DEFAULT" if source is None else source.name


def check_data(data: str) -> None:
    from fastgan.data.sources import locate

    try:
        locate(data)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--data: {error}") from error


def _device(device: str | None) -> str | None:
    if device is None:
        return None
    import torch

    try:
        torch.empty(0, device=torch.device(device))
        torch.Generator(device)  # "meta" has tensors, but nothing in them
    except Exception as error:  # each kind of device that is not there says so in its own way
        reason = "this PyTorch was built without it" if "Could not run" in str(error) else str(error).splitlines()[0]
        raise typer.BadParameter(f"--device {device!r} cannot be used: {reason}") from error
    return device


def _free_folder(config: Any) -> Path:
    """runs/dcgan-<data>-<size>, with a number behind it where that is there already."""
    data = Path(os.path.abspath(os.path.expanduser(config.data)))  # "." and "pictures/" have names, too
    name = f"dcgan-{data.name if data.is_dir() else data.stem}-{config.image_size}"
    folder, number = Path("runs") / name, 2
    while os.path.lexists(folder):
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder
