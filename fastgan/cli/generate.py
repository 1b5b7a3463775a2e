"""``fastgan generate``."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from fastgan.cli.failures import in_one_line


def generate(
    model: str = typer.Argument(help="The folder of a model, or a name on the hub.", metavar="DIR"),
    prompt: str = typer.Option(None, help="What is to be gone on from, or translated."),
    file: Path = typer.Option(None, "--input", help="Or a file of them, one a line, plain or .gz."),
    n: int = typer.Option(1, "--n", help="Texts for each prompt."),
    max_tokens: int = typer.Option(100, help="New tokens at most."),
    temperature: float = typer.Option(1.0, help="Less is less varied; 0 takes the best word each time."),
    top_k: int = typer.Option(0, help="Draw from the best so many words; 0: from all."),
    top_p: float = typer.Option(1.0, help="Draw from the best words that make up this share."),
    beams: int = typer.Option(1, help="More than 1 searches instead of drawing."),
    seed: int = typer.Option(0, min=0, max=2**63 - 1, help="Same seed, same texts."),
    attention: str = typer.Option("fastgan", help="fastgan, or transformers' own: sdpa, eager."),
    as_json: bool = typer.Option(False, "--json", help="An object a line: prompt and texts."),
) -> None:
    """Write text with a causal model, or with an encoder and decoder.

    For example: fastgan generate runs/mine --prompt "Once upon a time" --n 3 --temperature 0.8
    """
    if (prompt is None) == (file is None):
        raise typer.BadParameter("--prompt, or else --input, is needed")
    with in_one_line():
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise ImportError(f"generate needs transformers ({error}): pip install 'fastgan[text]'") from None
        from fastgan.data.labelled import read_text
        from fastgan.training import generate as module

        prompts = [prompt] if file is None else read_text(file).removesuffix("\n").split("\n")
        network = module.load(model, attention)
        for number, each in enumerate(prompts):
            texts = module.generate(
                network, each, n=n, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                beams=beams, seed=seed, first=number,
            )[0]  # fmt: skip
            if as_json:
                typer.echo(json.dumps({"prompt": each, "texts": texts}, ensure_ascii=False))
            else:
                typer.echo("\n".join(texts) if file is not None else "\n---\n".join(texts))
