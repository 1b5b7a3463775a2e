"""The command ``fastgan``."""

from __future__ import annotations

import io
import os
import sys
import warnings

import typer

from fastgan.cli import answer, demo, evaluate, finetune, generate, prepare, pretrain, sample, train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Adversarial training for PyTorch, made fast.",
    epilog="Begin with: fastgan demo, or fastgan train dcgan --data my_pictures",
)


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
app.add_typer(prepare.app, name="prepare")
app.command()(pretrain.pretrain)
app.add_typer(finetune.app, name="finetune")
app.add_typer(evaluate.app, name="evaluate")
app.command()(generate.generate)
app.command()(answer.answer)
app.command()(sample.sample)
app.command()(demo.demo)


def main() -> None:
    # Closed by who started us (a service, >&-), they are None.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  until the process ends
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A folder's name can be any bytes, and a terminal may know no ×: neither is a reason to stop.
            stream.reconfigure(errors="backslashreplace")
    # On a line of its own and without the place in our source, which tells a user nothing.
    warnings.formatwarning = lambda message, *_, **__: f"fastgan: {message}\n"
    app()
