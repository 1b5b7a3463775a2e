"""The command ``fastgan``."""

from __future__ import annotations

import typer

from fastgan.cli import sample, train

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Adversarial training for PyTorch, made fast.")


def _print_version(value: bool) -> None:
    if value:
        from fastgan import __version__

        typer.echo(f"fastgan {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    pass


@app.command()
def info() -> None:
    """Print versions, instruction set, what is built, what is missing and how to get it."""
    import fastgan

    typer.echo(str(fastgan.info()))


app.add_typer(train.app, name="train")
app.command()(sample.sample)


def main() -> None:
    app()
