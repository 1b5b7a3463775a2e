"""``fastgan sample``."""

from __future__ import annotations

from pathlib import Path

import typer

from fastgan.cli.failures import in_one_line


def sample(
    folder: Path = typer.Argument(help="The folder of a run.", metavar="DIR"),
    n: int = typer.Option(64, "--n", min=1, help="How many pictures."),
    out: Path = typer.Option(Path("grid.png"), help="The PNG file to write."),
    seed: int = typer.Option(0, min=0, max=2**63 - 1, help="Of the noise; the run's samples/ have its own seed's."),
) -> None:
    """Draw pictures with the generator of a run's last checkpoint.

    For example: fastgan sample runs/dcgan-digits-64 --n 100 --out grid.png
    """
    if not out.absolute().parent.is_dir():
        raise typer.BadParameter(f"--out: there is no folder {out.parent}")
    if out.suffix.lower() not in ("", ".png"):
        raise typer.BadParameter(f"--out: a PNG file is written; {out.name!r} would say otherwise")
    import torch

    from fastgan import fold_norms, replace_modules
    from fastgan.training.checkpoint import RunError, replace_file
    from fastgan.training.gan import GANTrainer
    from fastgan.training.pictures import grid_png
    from fastgan.training.run import load_generator

    with in_one_line():
        generator, config, step = load_generator(folder)
        generator = fold_norms(replace_modules(generator))
        pictures = GANTrainer.sample_from(generator, (config.latent, 1, 1), n, seed)
        if not bool(torch.isfinite(pictures).all()):
            raise RunError(f"{folder}: the generator of step {step} makes values that are not finite")
        replace_file(out, grid_png(pictures))
    typer.echo(f"{out}: {n} pictures of step {step}")
