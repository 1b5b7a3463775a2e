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
        train=out / "train.txt", validation=out / "held-out.txt", from_scratch="small", layers=2, width=128, heads=4,
        vocab_size=1000, length=64, batch_size=16, max_steps=steps, epochs=50, eval_every=max(1, steps // 2), lr=4e-3,
        dropout=0.0, seed=seed,
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
    """A reader learns to name the method that a sentence describes, and finds methods it was not trained on."""
    from fastgan.cli.progress import Lines
    from fastgan.data.text import described_methods, split_by_hash
    from fastgan.training.answer import answer_from
    from fastgan.training.finetune import finetune
    from fastgan.training.qa import QA, QAConfig

    begin = time.perf_counter()
    out.mkdir(parents=True)
    methods = described_methods()
    (out / "methods.txt").write_text("\n\n".join(entry for _, entry, _ in methods) + "\n", encoding="utf-8")
    training, held = split_by_hash([name for name, _, _ in methods], 0.25)
    for file, chosen in (("train", training), ("held-out", held)):
        paragraphs = []
        for number in chosen:
            name, entry, told = methods[number]
            # Names are exchanged in training: a reader that learns them by heart has learnt nothing about others.
            shift = range(0, len(training), max(1, len(training) // 4)) if file == "train" else [0]
            for step in shift:
                other = methods[training[(training.index(number) + step) % len(training)]][0] if step else name
                asked = [{"id": f"{number}-{step}-{at}", "question": _question(sentence),
                          "answers": [{"text": other, "answer_start": 0}]}
                         for at, sentence in enumerate(told)]  # fmt: skip
                paragraphs.append({"context": other + entry.removeprefix(name), "qas": asked})
        document = {"version": "1.1", "data": [{"title": file, "paragraphs": paragraphs}]}
        (out / f"{file}.json").write_text(json.dumps(document), encoding="utf-8")
    config = QAConfig(
        train=out / "train.json", validation=out / "held-out.json", from_scratch="small", length=96, stride=24,
        batch_size=16, max_steps=steps, epochs=100, eval_every=steps, lr=1e-3, dropout=0.0, seed=seed,
    )  # fmt: skip
    result = finetune(QA, config, out / "model", reporter=Lines(seconds=20, unit="examples", figures=("loss",)))
    _stop_if(result)
    asked = [(methods[number][0], _question(methods[number][2][0])) for number in held]
    try:
        import bm25s  # noqa: F401

        retrieval = "bm25"
    except ImportError:
        retrieval = "dense"
    replies = answer_from(out / "model", [out / "methods.txt"], [question for _, question in asked],
                          retrieval=retrieval)  # fmt: skip
    right = [bool(each.answers) and each.answers[0].text == name for (name, _), each in
             zip(asked, replies, strict=True)]  # fmt: skip
    seconds, share = time.perf_counter() - begin, sum(right) / len(right)
    typer.echo(
        f"      {result.step} steps in {seconds:.0f} s: {share:.0%} of {len(right)} questions about methods it was not "
        f"trained on, looked for in {len(methods)} entries"
    )
    for reply in replies[:3]:
        found = reply.answers[0]
        typer.echo(f"      “{reply.question}”\n        {found.text}  ({Path(found.file).name}, line {found.line})")
    return {"seconds": seconds, "steps": result.step, "right": share, "questions": len(right), "retrieval": retrieval}


def _question(sentence: str) -> str:
    words = sentence.split()
    return f"Which method: {' '.join(words[:16])} ?"


def _stop_if(result: Any) -> None:
    if result.interrupted:
        raise typer.Exit(130)
