"""``fastgan answer``."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fastgan.cli.failures import in_one_line

if TYPE_CHECKING:
    from fastgan.training.answer import Reply


def answer(
    model: str = typer.Argument(help="The folder of a model fine-tuned on questions, or a name on the hub.",
                                metavar="DIR"),
    more: list[Path] = typer.Argument(None, metavar="[FILES]...", help="Further texts.", show_default=False),
    corpus: list[Path] = typer.Option(..., "--corpus", help="Text files, or folders of .txt, .md and .rst files."),
    question: list[str] = typer.Option(None, "--question", help="What is asked; may be given several times."),
    questions: Path = typer.Option(None, "--questions", help="Or a file of questions, one a line, plain or .gz."),
    retrieval: str = typer.Option("both", help="bm25 (shared words), dense (the encoder's embeddings) or both."),
    top: int = typer.Option(1, help="Answers to a question at most."),
    passages: int = typer.Option(5, help="The best so many passages are read for an answer."),
    encoder: str | None = typer.Option(None, help="Another encoder for the dense search. Default: the model's own."),
    threshold: float | None = typer.Option(
        None, help="Logits by which an answer must be better than none. Default: 0 if the model was trained on "
        "questions without one, else no threshold."
    ),
    passage_size: int = typer.Option(1000, help="Letters of a passage at most; longer texts are cut."),
    attention: str = typer.Option("fastgan", help="fastgan, or transformers' own: sdpa, eager."),
    as_json: bool = typer.Option(False, "--json", help="An object a line: question, answers, margin."),
) -> None:  # fmt: skip
    """Answer questions from many texts: passages are found, and the best span of them is the answer.

    Each answer comes with its passage, score, file and line. Texts are read as a stream,
    and may be larger than memory.

    For example: fastgan answer runs/qa --corpus books/ --question "Who wrote Frankenstein?" --top 3
    """
    if not question and questions is None:
        raise typer.BadParameter("--question, or else --questions, is needed")
    with in_one_line():
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise ImportError(f"answer needs transformers ({error}): pip install 'fastgan[text]'") from None
        from fastgan.data.labelled import read_text
        from fastgan.training.answer import answer_from

        asked = list(question or [])
        if questions is not None:
            asked += [line.strip() for line in read_text(questions).split("\n") if line.strip()]
        replies = answer_from(
            model, [*corpus, *(more or [])], asked, retrieval=retrieval, top=top, passages=passages, encoder=encoder,
            threshold=threshold, size=passage_size, attention=attention,
        )  # fmt: skip
        for reply in replies:
            typer.echo(_as_json(reply) if as_json else _as_text(reply))


def _as_json(reply: Reply) -> str:
    document = dataclasses.asdict(reply)
    if not math.isfinite(reply.margin):
        document["margin"] = None  # JSON has no infinity
    return json.dumps(document, ensure_ascii=False)


def _as_text(reply: Reply) -> str:
    lines = [reply.question]
    for each in reply.answers:
        lines.append(f"  {each.text}  (score {each.score:.2f}; {each.file}, line {each.line})")
        before, after = each.passage[: each.start], each.passage[each.end :]
        shown = [" ".join(part.split()) for part in (before[-100:], after[:100])]
        cut = ["… " * (len(before) > 100), " …" * (len(after) > 100)]
        lines.append(f"    {cut[0]}{shown[0]} [{each.text}] {shown[1]}{cut[1]}".rstrip())
    if not reply.answers:
        why = f"margin {reply.margin:.2f}" if math.isfinite(reply.margin) else "no passage shares a word with it"
        lines.append(f"  no answer in these texts ({why})")
    return "\n".join(lines)
