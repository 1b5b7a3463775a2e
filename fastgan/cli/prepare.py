"""``fastgan prepare text``."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from fastgan.cli.failures import in_one_line

app = typer.Typer(no_args_is_help=True, help="Prepare data for training.")


@app.callback()
def _prepare() -> None:
    pass


@app.command()
def text(
    files: list[Path] = typer.Argument(
        help="UTF-8 text files, or folders of .txt, .md and .rst files.", metavar="FILE..."
    ),
    out: Path = typer.Option(..., help="The new folder; written whole or not at all."),
    vocab_size: int = typer.Option(8192, min=6, help="Tokens of the vocabulary; with 261, bpe's are the bytes."),
    lowercase: bool = typer.Option(False, "--lowercase", help="Make all letters small."),
    tokenizer: str = typer.Option("bpe", help="bpe (byte-level), wordpiece (BERT's), or a tokenizer's folder."),
    validation: float = typer.Option(0.05, min=0.0, max=0.99, help="Share that is held out."),
    unit: str = typer.Option("auto", help="What is held out as a whole: line, paragraph or auto."),
    skip_bad_lines: bool = typer.Option(False, "--skip-bad-lines", help="Leave out lines that are no UTF-8."),
) -> None:
    """Train a tokenizer on text, and pack the text as tokens for fastgan pretrain.

    Equal lines (or paragraphs) fall on the same side of the split, so that nothing is validated on that was trained on.

    For example: fastgan prepare text book.txt --out runs/corpus --vocab-size 4096
    """  # fmt: skip
    with in_one_line():
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"text needs transformers and tokenizers: pip install 'fastgan[text]' ({error})"
            ) from None
        from fastgan.data.corpus import prepare_text

        shown = _Share()
        try:
            made = prepare_text(
                list(files),
                out,
                vocab_size=vocab_size,
                lowercase=lowercase,
                tokenizer=tokenizer,
                validation=validation,
                unit=unit,
                skip_bad_lines=skip_bad_lines,
                progress=shown,
            )
        finally:
            shown.close()
    typer.echo(f"{out}: {made.vocabulary:,} tokens in the vocabulary, learnt from {made.sampled / 1e6:,.1f} MB")
    for name, count in made.counts.items():
        typer.echo(
            f"  {name:>10}: {count['tokens']:>12,} tokens, {count['units']:>10,} {made.unit}s, "
            f"{count['characters']:>12,} characters"
        )
    for number, what in (
        (made.read.blank_files, "files without text were skipped"),
        (made.read.bad_lines, "lines that are no UTF-8 text were skipped"),
        (made.read.long, f"{made.unit}s longer than 1 MB were read in pieces"),
    ):
        if number:
            typer.echo(f"  {number:,} {what}")
    if not made.counts["validation"]["tokens"]:
        typer.echo(f"  no {made.unit} was held out: with so little text, --validation must be larger")


class _Share:
    """The share that is done, on a terminal; nothing elsewhere."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        if self._shown:
            print(f"\r{done / 1e6:,.0f} of {total / 1e6:,.0f} MB", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._shown:
            print("\r" + " " * 40 + "\r", end="", file=sys.stderr, flush=True)
