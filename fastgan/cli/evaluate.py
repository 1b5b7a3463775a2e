"""``fastgan evaluate``: a fine-tuned model on a file, or measures of text in files, one item a line."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fastgan.cli.failures import in_one_line

if TYPE_CHECKING:
    from fastgan.metrics import Evaluation

app = typer.Typer(no_args_is_help=True, help="Measure a model on a file, or text in files.")

HYPOTHESES = typer.Option(..., "--hypotheses", help="The system's output, a line each (UTF-8, plain or .gz).")
REFERENCES = typer.Option(..., "--references", help="One file of references or several, line by line.")
MORE = typer.Argument(None, metavar="[REFERENCES]...", help="Further files of references.", show_default=False)
OTHER = typer.Option(None, "--other", help="A second system's output: a paired bootstrap test between the two.")
LOWERCASE = typer.Option(False, "--lowercase", help="Case does not count.")
TOKENIZE = typer.Option(None, "--tokenize", help="sacrebleu's tokenizer.", show_default="13a")
SAMPLES = typer.Option(1000, "--samples", min=0, help="Bootstrap resamples; 0 for no interval.")
SEED = typer.Option(12345, "--seed", min=0, max=2**32 - 1, help="Of the resamples.")
JSON = typer.Option(False, "--json", help="Print JSON, unrounded.")
WIDTH = typer.Option(1, "--width", min=0, max=12, help="Digits after the point.")


def _read(hypotheses: Path, references: list[Path], other: Path | None) -> tuple[list, list, list | None]:
    from fastgan.metrics.lines import read_parallel

    lines = read_parallel([hypotheses, *references, *([other] if other else [])])
    return lines[0], lines[1 : 1 + len(references)], lines[-1] if other else None


def _print(evaluation: Evaluation, as_json: bool) -> None:
    typer.echo(json.dumps(evaluation.as_dict(), indent=1, ensure_ascii=False) if as_json else str(evaluation))


def _check_out(out: Path | None) -> None:
    """Before the work, not after it."""
    if out is not None and not out.absolute().parent.is_dir():
        raise typer.BadParameter(f"--out: there is no folder {out.parent}")


def _write(out: Path | None, text: str) -> None:
    from fastgan.training.checkpoint import replace_file

    if out is not None:
        replace_file(out, text.encode())


MODEL = typer.Option(..., "--model", help="The folder of a model that fastgan finetune or transformers wrote.")


@app.command()
def sentiment(
    model: Path = MODEL,
    data: Path = typer.Option(..., "--data", help="Texts with labels: .tsv, .csv or .jsonl, also with .gz."),
    text_column: str = typer.Option(None, "--text-column", help="Name of the column or key."),
    label_column: str = typer.Option(None, "--label-column"),
    samples: int = SAMPLES,
    seed: int = SEED,
    as_json: bool = JSON,
) -> None:
    """Accuracy, macro F1 and confusion of a classifier, with 95 % intervals over the texts.

    For example: fastgan evaluate sentiment --model runs/mine --data test.tsv
    """
    with in_one_line():
        from fastgan.metrics.classes import confusion_table
        from fastgan.training.sentiment import evaluate_sentiment

        evaluation = evaluate_sentiment(
            model, data, text_column=text_column, label_column=label_column, samples=samples, seed=seed
        )
        _print(evaluation, as_json)
        if not as_json:
            typer.echo(f"always the commonest label = {evaluation.results[0].details['majority']:.2f}")
            typer.echo(confusion_table(evaluation))


@app.command()
def translate(
    model: Path = MODEL,
    data: tuple[Path, Path] = typer.Option(..., "--data", help="Two parallel files, source and target; plain or .gz."),
    beams: int = typer.Option(5, "--beams", min=1, help="1 is greedy."),
    out: Path = typer.Option(None, "--out", help="Write the translations here, a line each."),
    samples: int = SAMPLES,
    as_json: bool = JSON,
) -> None:
    """BLEU and chrF2 of a translator, by sacrebleu, cased, with signatures and 95 % intervals.

    For example: fastgan evaluate translate --model runs/de-en --data test.de test.en --out test.out.en
    """
    with in_one_line():
        _check_out(out)
        from fastgan.training.translate import evaluate_translate

        evaluation, lines = evaluate_translate(model, *data, beams=beams, samples=samples)
        _write(out, "".join(" ".join(line.split()) + "\n" for line in lines))
        _print(evaluation, as_json)


@app.command()
def summarize(
    model: Path = MODEL,
    data: Path = typer.Option(..., "--data", help="JSONL, a document and its summary or summaries a line."),
    beams: int = typer.Option(5, "--beams", min=1, help="1 is greedy."),
    max_tokens: int = typer.Option(64, "--max-tokens", min=1, help="Of a summary."),
    stemmer: bool = typer.Option(True, help="Porter's, for English, as published figures mostly have it."),
    out: Path = typer.Option(None, "--out", help="Write the summaries here, a line each."),
    samples: int = SAMPLES,
    as_json: bool = JSON,
) -> None:
    """ROUGE of a model's summaries, by rouge-score, and of the documents' first sentences; 95 % intervals.

    For example: fastgan evaluate summarize --model runs/mine --data test.jsonl --out summaries.txt
    """
    with in_one_line():
        _check_out(out)
        logging.getLogger("absl").setLevel(logging.WARNING)
        from fastgan.training.summarize import evaluate_summarize

        evaluation, lines = evaluate_summarize(
            model, data, beams=beams, max_tokens=max_tokens, samples=samples, stemmer=stemmer
        )
        _write(out, "".join(" ".join(line.split()) + "\n" for line in lines))
        _print(evaluation, as_json)


@app.command()
def qa(
    model: Path = MODEL,
    data: Path = typer.Option(..., "--data", help="Questions in SQuAD's JSON, 1.1 or 2.0; plain or .gz."),
    out: Path = typer.Option(None, "--out", help="Write the answers here: SQuAD's prediction file, id to answer."),
    samples: int = SAMPLES,
    seed: int = SEED,
    as_json: bool = JSON,
) -> None:
    """Exact match and F1 of answers, as SQuAD's official script defines them, with 95 % intervals.

    For example: fastgan evaluate qa --model runs/mine --data test.json
    """
    with in_one_line():
        _check_out(out)
        from fastgan.training.qa import evaluate_qa

        evaluation, answers = evaluate_qa(model, data, samples=samples, seed=seed)
        _write(out, json.dumps(answers, indent=1, ensure_ascii=False) + "\n")
        _print(evaluation, as_json)


@app.command()
def retrieval(
    data: list[Path] = typer.Option(..., "--data", help="SQuAD's JSON, a file or several; its texts are the passages."),
    more: list[Path] = typer.Argument(None, metavar="[DATA]...", help="Further files.", show_default=False),
    model: str = typer.Option(None, "--model", help="The encoder, for dense and both: a folder, or a name on the hub."),
    kind: str = typer.Option("both", "--retrieval", help="bm25, dense or both."),
    samples: int = SAMPLES,
    seed: int = SEED,
    as_json: bool = JSON,
) -> None:
    """How often a question's own text is among the first, or the first five, that are found: R@1, R@5.

    For example: fastgan evaluate retrieval --data dev.json --retrieval bm25
    """
    with in_one_line():
        from fastgan.training.retrieval import evaluate_retrieval

        _print(evaluate_retrieval([*data, *(more or [])], model, retrieval=kind, samples=samples, seed=seed), as_json)


@app.command()
def generate(
    model: Path = MODEL,
    data: Path = typer.Option(..., "--data", help="Text, plain or .gz."),
    n: int = typer.Option(50, "--n", min=1, help="Texts that are drawn, and stretches of the file beside them."),
    length: int = typer.Option(64, "--length", min=2, help="Tokens of each."),
    temperature: float = typer.Option(1.0, "--temperature", min=0.0),
    seed: int = typer.Option(0, "--seed", min=0, max=2**63 - 1, help="Of what is drawn."),
    samples: int = SAMPLES,
    as_json: bool = JSON,
) -> None:
    """Loss and perplexity of a causal model on a file, and how varied what it writes is, beside the file itself.

    For example: fastgan evaluate generate --model runs/mine --data test.txt
    """
    with in_one_line():
        from fastgan.training.generate import evaluate_generate, repeats_itself

        evaluation = evaluate_generate(
            model, data, n=n, length=length, temperature=temperature, seed=seed, samples=samples
        )
        _print(evaluation, as_json)
        if said := repeats_itself(evaluation):
            typer.echo(said, err=True)


@app.command()
def bleu(
    hypotheses: Path = HYPOTHESES,
    references: list[Path] = REFERENCES,
    more: list[Path] = MORE,
    other: Path = OTHER,
    tokenize: str = TOKENIZE,
    lowercase: bool = LOWERCASE,
    samples: int = SAMPLES,
    width: int = WIDTH,
    as_json: bool = JSON,
) -> None:
    """Corpus BLEU, as sacrebleu's command computes it, with signature and 95 % interval.

    For example: fastgan evaluate bleu --hypotheses out.en --references test.en
    """
    with in_one_line():
        from fastgan import metrics

        lines, golds, second = _read(hypotheses, [*references, *(more or [])], other)
        _print(
            metrics.bleu(
                lines, golds, other=second, tokenize=tokenize, lowercase=lowercase, samples=samples, width=width
            ),
            as_json,
        )


@app.command()
def chrf(
    hypotheses: Path = HYPOTHESES,
    references: list[Path] = REFERENCES,
    more: list[Path] = MORE,
    other: Path = OTHER,
    word_order: int = typer.Option(0, "--word-order", min=0, help="Longest n-gram of words; 2 is chrF++."),
    lowercase: bool = LOWERCASE,
    samples: int = SAMPLES,
    width: int = WIDTH,
    as_json: bool = JSON,
) -> None:
    """chrF2 or chrF++, as sacrebleu's command computes it, with signature and 95 % interval."""
    with in_one_line():
        from fastgan import metrics

        lines, golds, second = _read(hypotheses, [*references, *(more or [])], other)
        _print(
            metrics.chrf(
                lines, golds, other=second, word_order=word_order, lowercase=lowercase, samples=samples, width=width
            ),
            as_json,
        )


@app.command()
def rouge(
    hypotheses: Path = HYPOTHESES,
    references: list[Path] = REFERENCES,
    more: list[Path] = MORE,
    other: Path = OTHER,
    types: str = typer.Option("rouge1,rouge2,rougeL", "--types", help="rouge1 to rouge9, rougeL, rougeLsum."),
    stemmer: bool = typer.Option(False, "--stemmer", help="Porter's stemmer."),
    samples: int = SAMPLES,
    seed: int = SEED,
    as_json: bool = JSON,
) -> None:
    """ROUGE: F1, precision and recall, as rouge-score's command computes them, with 95 % interval."""
    with in_one_line():
        from fastgan import metrics

        logging.getLogger("absl").setLevel(logging.WARNING)
        lines, golds, second = _read(hypotheses, [*references, *(more or [])], other)
        kinds = [each.strip() for each in types.split(",") if each.strip()]
        _print(
            metrics.rouge(lines, golds, other=second, types=kinds, stemmer=stemmer, samples=samples, seed=seed),
            as_json,
        )


@app.command()
def distinct(
    hypotheses: Path = HYPOTHESES,
    orders: str = typer.Option("1,2,3", "--orders", help="Lengths of the n-grams."),
    lowercase: bool = LOWERCASE,
    as_json: bool = JSON,
) -> None:
    """distinct-n: different n-grams over all n-grams. Falls with the amount of text: compare equal amounts."""
    with in_one_line():
        from fastgan import metrics
        from fastgan.metrics.lines import read_lines

        if not all(each.strip().isdecimal() for each in orders.split(",")):
            raise typer.BadParameter(f"--orders: numbers with commas between them, got {orders!r}")
        numbers = [int(each) for each in orders.split(",")]
        _print(metrics.distinct(read_lines(hypotheses), orders=numbers, lowercase=lowercase), as_json)


@app.command("self-bleu")
def self_bleu(
    hypotheses: Path = HYPOTHESES,
    order: int = typer.Option(4, "--order", min=1, help="The longest n-gram."),
    tokenize: str = TOKENIZE,
    lowercase: bool = LOWERCASE,
    samples: int = SAMPLES,
    seed: int = SEED,
    as_json: bool = JSON,
) -> None:
    """Self-BLEU: each line's BLEU against all others, averaged. 100 is one sentence repeated."""
    with in_one_line():
        from fastgan import metrics
        from fastgan.metrics.lines import read_lines

        lines = read_lines(hypotheses)
        _print(
            metrics.self_bleu(
                lines, order=order, tokenize=tokenize, lowercase=lowercase, samples=samples, seed=seed
            ),
            as_json,
        )  # fmt: skip


@app.command("em-f1")
def em_f1(
    hypotheses: Path = HYPOTHESES,
    references: list[Path] = REFERENCES,
    more: list[Path] = MORE,
    other: Path = OTHER,
    samples: int = SAMPLES,
    seed: int = SEED,
    as_json: bool = JSON,
) -> None:
    """Exact match and F1 of answers, as SQuAD's official script defines them.

    Lines: an answer a line, empty for "there is none"; several gold answers in several files, or in one with tabs
    between them. Or SQuAD's own files: --references dev-v1.1.json --hypotheses predictions.json.
    """
    with in_one_line():
        from fastgan import metrics
        from fastgan.metrics.lines import InputError, read_predictions, read_squad

        files = [*references, *(more or [])]
        if any(file.suffix == ".json" for file in files):
            if len(files) > 1:
                raise InputError(f"{files[0]}: SQuAD's JSON holds all gold answers; give one file")
            golds = read_squad(files[0])
            answers = read_predictions(hypotheses, golds)
            second = read_predictions(other, golds) if other else None
            evaluation = metrics.em_f1(answers, list(golds.values()), other=second, samples=samples, seed=seed)
        else:
            answers, columns, second = _read(hypotheses, files, other)
            several = [[gold for cell in row for gold in cell.split("\t")] for row in zip(*columns, strict=True)]
            evaluation = metrics.em_f1(answers, several, other=second, samples=samples, seed=seed)
        _print(evaluation, as_json)
