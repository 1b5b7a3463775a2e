"""Two parts of ``fastgan demo``: a GPT-2 that writes, and questions that are answered from many texts.

Both are the ordinary commands' functions, on the reference manual that every CPython carries.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import typer


def write(out: Path, seed: int, steps: int) -> dict[str, Any]:
    """A GPT-2 from nothing on the reference, and what it writes."""
    from fastgan.cli.progress import Lines
    from fastgan.data.text import python_reference, split_by_hash, unique_paragraphs
    from fastgan.training.finetune import finetune
    from fastgan.training.generate import GENERATE, GenerateConfig, generate

    begin = time.perf_counter()
    out.mkdir(parents=True)
    texts = unique_paragraphs(python_reference().values())
    for name, chosen in zip(("train", "held-out"), split_by_hash(texts, 0.05), strict=True):
        (out / f"{name}.txt").write_text("\n".join(texts[index] for index in chosen) + "\n", encoding="utf-8")
    config = GenerateConfig(
        train=str(out / "train.txt"), validation=str(out / "held-out.txt"), from_scratch="small", layers=2, width=128,
        heads=4, vocab_size=1000, length=64, batch_size=16, max_steps=steps, epochs=50, lr=4e-3,
        eval_every=max(1, steps // 2), dropout=0.0, seed=seed,
    )  # fmt: skip
    result = finetune(GENERATE, config, out / "model", reporter=Lines(seconds=20, unit="examples", figures=("loss",)))
    _stop_if(result)
    seconds, loss = time.perf_counter() - begin, result.figures["loss_per_character"]
    typer.echo(f"      {result.step} steps in {seconds:.0f} s: {loss:.2f} nats a letter on held-out text")
    written = generate(out / "model", "The function ", n=2, max_tokens=40, temperature=0.7, seed=seed)[0]
    for text in written:
        typer.echo(f"      “{' '.join(text.split())} …”")
    return {"seconds": seconds, "steps": result.step, "loss_per_character": loss, "written": written}


def ask(out: Path, seed: int, steps: int) -> dict[str, Any]:
    """A reader learns to point at the exception that a text tells of, and is asked about sentences it has not seen."""
    from fastgan.cli.progress import Lines
    from fastgan.data.text import exceptions_told_of, python_reference, split_by_hash, unique_paragraphs
    from fastgan.training.answer import answer_from
    from fastgan.training.finetune import finetune
    from fastgan.training.qa import QA, QAConfig

    begin = time.perf_counter()
    out.mkdir(parents=True)
    texts = unique_paragraphs(python_reference().values())
    (out / "reference.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    told = exceptions_told_of()
    training, held = split_by_hash([sentence for _, sentence, _ in told], 0.25)
    for file, chosen in (("train", training), ("held-out", held)):
        paragraphs = []
        for number in chosen:
            name, sentence, blank = told[number]
            answers = [{"text": name, "answer_start": sentence.index(name)}]
            asked = [{"id": str(number), "question": _question(blank), "answers": answers}]
            paragraphs.append({"context": sentence, "qas": asked})
        document = {"version": "1.1", "data": [{"title": file, "paragraphs": paragraphs}]}
        (out / f"{file}.json").write_text(json.dumps(document), encoding="utf-8")
    config = QAConfig(
        train=str(out / "train.json"), validation=str(out / "held-out.json"), from_scratch="small", length=96,
        stride=24, batch_size=16, max_steps=steps, epochs=100, eval_every=steps, lr=1e-3, dropout=0.0, seed=seed,
    )  # fmt: skip
    result = finetune(QA, config, out / "model", reporter=Lines(seconds=20, unit="examples", figures=("loss",)))
    _stop_if(result)
    replies = answer_from(
        out / "model", [out / "reference.txt"], [_question(told[number][2]) for number in held],
        retrieval=_retrieval(), passages=1,
    )  # fmt: skip
    right = [bool(reply.answers) and reply.answers[0].text == told[number][0]
             for number, reply in zip(held, replies, strict=True)]  # fmt: skip
    seconds, share = time.perf_counter() - begin, sum(right) / len(right)
    names = [told[number][0] for number in held]
    commonest = max(map(names.count, names)) / len(names)
    typer.echo(
        f"      {result.step} steps in {seconds:.0f} s: {share:.0%} of {len(right)} questions right, looked for in "
        f"{len(texts)} paragraphs (always the commonest exception: {commonest:.0%})"
    )
    for reply in replies[:3]:
        typer.echo(f"      “{reply.question}”")
        for found in reply.answers:
            typer.echo(f"        {found.text}  ({Path(found.file).name}, line {found.line})")
    return {"seconds": seconds, "steps": result.step, "right": share, "chance": commonest, "questions": len(right)}


def _question(blank: str) -> str:
    return f"Which exception: {' '.join(blank.split()[:24])} ?"


def _retrieval() -> str:
    try:
        import bm25s  # noqa: F401
    except ImportError:
        return "dense"
    return "bm25"


def _stop_if(result: Any) -> None:
    if result.interrupted:
        raise typer.Exit(130)
