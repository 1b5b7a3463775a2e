"""``fastgan demo``: the main job on real input, in seven parts, with pictures at the end.

1. a DCGAN draws handwritten digits;
2. a small BERT learns to guess masked words from the reference manual that every CPython carries;
3. the same BERT is fine-tuned to tell which chapter a sentence comes from;
4. a GPT-2 learns to write like the manual;
5. a reader answers questions about exceptions, the manual's two thousand paragraphs before it;
6. each kernel is timed beside PyTorch's own;
7. GAN and language model together: FreeLB and GAN-BERT beside plain fine-tuning, with few labels.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fastgan.cli.demo_adversaries import compete
from fastgan.cli.demo_language import ask, write
from fastgan.cli.failures import in_one_line
from fastgan.cli.train import check_data

if TYPE_CHECKING:
    from fastgan.data import ImageArray
    from fastgan.training import DCGANConfig

PROBES = (
    "the function returns a new [MASK] .",
    "if the attribute is not found , an attributeerror [MASK] is raised .",
)


def _say(text: str = "") -> None:
    typer.echo(text)


def _title(number: int, text: str) -> None:
    _say(f"\n[{number}/7] {text}")


def _pictures(data: str, seed: int, quick: bool) -> tuple[DCGANConfig, ImageArray]:
    from fastgan.data import load_images
    from fastgan.training.presets import article, digits_demo

    config = digits_demo(seed=seed) if data == "digits" else article(data, max_steps=300, seed=seed)
    if quick:
        config = replace(config, max_steps=6)
    return config, load_images(config.data, config.image_size, config.channels)


def _gan(out: Path, config: DCGANConfig, images: ImageArray) -> dict[str, Any]:
    from fastgan.cli.progress import reporter
    from fastgan.training import load_generator, run_dcgan
    from fastgan.training.gan import GANTrainer
    from fastgan.training.pictures import grid_png

    begin = time.perf_counter()
    shown = reporter()
    try:
        result = run_dcgan(config, out, data=images, reporter=shown)
    finally:
        shown.close()
    if result.interrupted:
        raise typer.Exit(130)
    seconds = time.perf_counter() - begin
    generator, _, _ = load_generator(out)
    pictures = GANTrainer.sample_from(generator, (config.latent, 1, 1), 64, config.seed)
    (out / "samples.png").write_bytes(grid_png(pictures))
    chosen = range(0, len(images), max(1, len(images) // 64))
    (out / "real.png").write_bytes(grid_png(images.batch(list(chosen)[:64])))
    _say(
        f"      {len(images)} pictures at {config.image_size}×{config.image_size}, {result.step} steps of "
        f"{config.batch_size} in {seconds:.0f} s: {result.step / seconds:.1f} steps/s"
    )
    return {"seconds": seconds, "steps": result.step, "image_size": config.image_size, "data": config.data}


def _language(out: Path, seed: int, steps: int) -> dict[str, Any]:
    from fastgan.data.text import python_reference, train_tokenizer
    from fastgan.training.language import pretrain_bert

    texts = list(python_reference().values())
    # A small vocabulary and many masks: 400 KB of text and a few minutes give each word few chances to be learnt.
    tokenizer = train_tokenizer(texts, vocab_size=1000)
    result = pretrain_bert(
        texts, tokenizer, out=out, length=32, batch_size=32, steps=steps, lr=2e-3, mlm_probability=0.4, probes=PROBES,
        seed=seed, progress=True,
    )  # fmt: skip
    _say(
        f"      {result.parameters / 1e6:.1f} million parameters, {result.steps} steps in {result.seconds:.0f} s: "
        f"loss on held-out text {result.validation_before:.2f} before, {result.validation_after:.2f} after"
    )
    for probe, guesses in result.guesses.items():
        _say(f"      “{probe}”")
        for when in ("before", "after"):
            _say(f"        {when:>6}: " + ", ".join(f"{word} {p:.0%}" for word, p in guesses[when]))
    return {
        "seconds": result.seconds,
        "steps": result.steps,
        "loss_first": result.validation_before,
        "loss_last": result.validation_after,
        "guesses": result.guesses,
    }


def _classification(model: Path, out: Path, seed: int, epochs: int) -> dict[str, Any]:
    from fastgan.data.text import labelled_sentences
    from fastgan.training.language import finetune_classifier

    sentences, labels, names = labelled_sentences(per_chapter=180)
    result = finetune_classifier(
        model, sentences, labels, label_names=names, out=out, epochs=epochs, seed=seed, progress=True
    )
    _say(
        f"      {len(names)} chapters, {result.training_sentences} sentences to learn from, {result.steps} steps in "
        f"{result.seconds:.0f} s: {result.accuracy:.0%} of {result.validation_sentences} held-out sentences right "
        f"(the commonest chapter alone: {result.commonest:.0%})"
    )
    return {"seconds": result.seconds, "accuracy": result.accuracy, "chance": result.commonest, "chapters": names}


def _kernels(out: Path) -> list[dict[str, Any]]:
    from fastgan.cli.kernels import cases, compare, plot, table

    out.mkdir(parents=True, exist_ok=True)
    timings = [compare(case) for case in cases()]
    text = table(timings)
    (out / "kernels.txt").write_text(text + "\n", encoding="utf-8")
    plot(timings, out / "kernels.png")
    _say("\n".join("      " + line for line in text.splitlines()))
    return [vars(timing) for timing in timings]


def demo(
    out: Path = typer.Option(Path("runs/demo"), help="Folder for all it writes; an earlier demo is replaced."),
    data: str = typer.Option("digits", help="Pictures for part 1: digits, cifar10, or a folder or zip of pictures."),
    seed: int = typer.Option(0, min=0, max=2**32 - 1, help="Seed of every part."),
    quick: bool = typer.Option(False, help="A few steps of each part, to see that all of it runs."),
) -> None:
    """Train, fine-tune and measure on real input; a few minutes on two cores."""
    check_data(data)
    if os.path.lexists(out):
        if not out.is_dir():
            raise typer.BadParameter(f"{out} is not a folder", param_hint="--out")
        if not (out / ".demo").exists() and any(out.iterdir()):
            raise typer.BadParameter(f"{out} is not a demo's folder, and holds files", param_hint="--out")
    with in_one_line():
        _demo(out, data, seed, quick)


def _demo(out: Path, data: str, seed: int, quick: bool) -> None:
    begin = time.perf_counter()
    summary: dict[str, Any] = {}

    _title(1, f"A DCGAN, trained through fastgan's kernels, learns to draw {data}.")
    config, images = _pictures(data, seed, quick)  # before an earlier demo is deleted: there may be none
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / ".demo").touch()
    summary["gan"] = _gan(out / "gan", config, images)
    _title(2, "A BERT, pretrained through fastgan's attention, learns to guess masked words of the Python reference.")
    summary["language"] = _language(out / "language", seed, steps=20 if quick else 700)
    _title(3, "The same BERT, fine-tuned, tells which chapter a sentence comes from.")
    summary["classification"] = _classification(out / "language", out / "classification", seed, 1 if quick else 3)
    _title(4, "A GPT-2, from nothing, learns to write like the Python reference.")
    summary["generation"] = write(out / "generation", seed, steps=4 if quick else 500)
    _title(5, "A reader, from nothing, is asked which exception it was: it finds the paragraph and points at the name.")
    summary["answers"] = ask(out / "answers", seed, steps=2 if quick else 60)
    _title(6, "Each kernel beside PyTorch's own, in one run.")
    summary["kernels"] = _kernels(out / "kernels")
    _title(7, "GAN and language model together: adversaries of the same BERT, which sees few labels.")
    effort = {"passes": 6, "draws": 1} if quick else {}
    summary["adversaries"] = compete(out / "language", out / "adversaries", seed, **effort)

    summary["seconds"] = time.perf_counter() - begin
    (out / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _say(f"\nDone in {summary['seconds'] / 60:.1f} minutes. Look at")
    for picture in sorted(out.rglob("*.png")):
        _say(f"  {picture}")
