"""``fastgan sample``."""

from __future__ import annotations

from pathlib import Path

import typer


def sample(
    folder: Path = typer.Argument(help="The folder of a run.", metavar="DIR"),
    n: int = typer.Option(64, "--n", min=1, help="How many pictures."),
    out: Path = typer.Option(Path("grid.png"), help="The PNG file to write."),
    seed: int = typer.Option(0, min=0, help="Of the noise; the run's samples/ have its own seed's."),
) -> None:
    """Draw pictures with the generator of a run's last checkpoint."""
    if not out.absolute().parent.is_dir():
        raise typer.BadParameter(f"--out: there is no folder {out.parent}")
    import torch

    from fastgan.training.checkpoint import RunError, replace_file
    from fastgan.training.gan import GANTrainer
    from fastgan.training.pictures import grid_png
    from fastgan.training.run import load_generator

    try:
        generator, config, step = load_generator(folder)
        pictures = GANTrainer.sample_from(generator, (config.latent, 1, 1), n, seed)
        if not bool(torch.isfinite(pictures).all()):
            raise RunError(f"{folder}: the generator of step {step} makes values that are not finite")
        replace_file(out, grid_png(pictures))
    except RunError as error:
        typer.echo(f"fastgan: {error}", err=True)
        raise typer.Exit(1) from error
    except OSError as error:
        typer.echo(f"fastgan: {error.filename or out}: {error.strerror or error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{out}: {n} pictures of step {step}")
