"""The five tasks on real data, each a run as its command makes it, with what stands beside, its curve and its cost.

    python -m benchmarks.quality [TASK ...] --model MINILM [--data ../shared/data] [--out runs/quality] [--threads 2]

TASK: sentiment, translation, summaries, questions, generation; all without one. A run that is there is not made again,
one that was stopped goes on. Prints a Markdown table, also to ``<out>/quality.md``, and draws ``<out>/quality.png``:
the validation figure over the steps. Seconds are those that all cores together were busy with a run, evaluations
included; a run that waits for another program's threads is busy as well, so let nothing else run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import quality_baselines as baselines

SEEDS = 3


@dataclass
class Row:
    task: str
    measured: str
    beside: str
    runs: list[Path] = field(default_factory=list)


@dataclass
class Settings:
    model: Path
    data: Path
    out: Path
    threads: int

    def run(self, name: str, *command: Any) -> Path:
        """The folder of ``fastgan finetune COMMAND``, finished; its core-seconds are added to its ``cost.json``."""
        folder = self.out / name
        if (folder / "result.json").exists():
            return folder
        begun = (folder / "run.json").exists()
        order = [command[0], "--resume"] if begun else command
        print(f"# fastgan finetune {' '.join(map(str, order))} --out {folder}", flush=True)
        before = _busy()
        subprocess.run(
            [sys.executable, "-m", "fastgan", "finetune", *map(str, order), "--out", str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
            stdout=sys.stderr,
            check=True,
        )
        cost = json.loads((folder / "cost.json").read_text()) if (folder / "cost.json").exists() else 0.0
        (folder / "cost.json").write_text(json.dumps(cost + _busy() - before))
        return folder

    def encoder(self) -> Any:
        from fastgan.training.hub import evaluating

        return evaluating(str(self.model), "AutoModel", "fastgan", "embeddings", whole=False)


def _busy() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _result(folder: Path) -> dict[str, float]:
    return json.loads((folder / "result.json").read_text())["figures"]


def sentiment(settings: Settings) -> list[Row]:
    from fastgan.data.labelled import read_labelled

    train, dev = (settings.data / "sst2" / f"{name}.tsv" for name in ("train", "dev"))
    runs = [
        settings.run(f"sentiment-{seed}", "sentiment", "--model", settings.model, "--train", train, "--validation", dev,
                     "--seed", seed)
        for seed in range(SEEDS)
    ]  # fmt: skip
    found = [100 * _result(run)["accuracy"] for run in runs]
    read = read_labelled(train), read_labelled(dev)
    with settings.encoder() as encoder:
        frozen = baselines.linear_on_frozen(*read, encoder)
    shown = ", ".join(f"{each:.1f}" for each in found)
    beside = (
        f"commonest label {100 * _result(runs[0])['majority']:.1f}, logistic regression on tf-idf "
        f"{baselines.linear_on_words(*read):.1f}, on frozen MiniLM {frozen:.1f}"
    )
    return [Row("SST-2, MiniLM, accuracy on dev", f"{np.mean(found):.1f} (seeds: {shown})", beside, runs)]


def translation(settings: Settings) -> list[Row]:
    from fastgan.training.translate import evaluate_translate

    def sides(name: str) -> list[Path]:
        return [settings.data / "multi30k" / f"{name}.{language}.gz" for language in ("de", "en")]

    run = settings.run("translation", "translate", "--from-scratch", "small", "--train", *sides("train"),
                       "--validation", *sides("val"))  # fmt: skip
    evaluation, lines = evaluate_translate(run, *sides("test_2016_flickr"))
    (run / "test.en").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(evaluation)
    bleu, chrf = evaluation.results
    return [Row("Multi30k German to English, from scratch, BLEU on test 2016",
                f"{bleu.score:.1f} (95 %: {bleu.low:.1f} to {bleu.high:.1f}), chrF2 {chrf.score:.1f}",
                "published small models 30.6 to 33.5", [run])]  # fmt: skip


def summaries(settings: Settings) -> list[Row]:
    from fastgan.training.summarize import _figures, evaluate_summarize, read_documents

    train, dev = (settings.data / "scitldr" / f"{name}.jsonl" for name in ("train", "dev"))
    run = settings.run("summaries", "summarize", "--model", settings.model, "--train", train, "--validation", dev,
                       "--lr", "1e-4")  # fmt: skip
    evaluation, _ = evaluate_summarize(run, dev)
    documents, own = read_documents(dev)
    with settings.encoder() as encoder:
        mean = _figures(baselines.nearest_to_mean(documents, encoder), own)["rouge1"]
    best = _figures(baselines.best_single(documents, own), own)["rouge1"]
    found = evaluation.results[0]
    assert found.low is not None
    assert found.high is not None
    first = 100 * evaluation["first sentence rouge1"]
    return [Row("SciTLDR, a sentence by MiniLM, ROUGE-1 on dev",
                f"{100 * found.score:.1f} (95 %: {100 * found.low:.1f} to {100 * found.high:.1f})",
                f"first sentence {first:.1f}, nearest to the mean {mean:.1f}, best single sentence {best:.1f}",
                [run])]  # fmt: skip


def questions(settings: Settings) -> list[Row]:
    from fastgan.data.squad import read_questions
    from fastgan.metrics.answers import em_f1
    from fastgan.training.retrieval import evaluate_retrieval

    train, dev = (settings.data / "xquad" / f"{name}.en.json" for name in ("train", "dev"))
    curve = []
    articles = json.loads(train.read_text(encoding="utf-8"))
    for share in (0.25, 0.5, 1.0):
        part = settings.out / f"xquad-{share}.json"
        kept = articles["data"][: round(share * len(articles["data"]))]
        part.write_text(json.dumps({**articles, "data": kept}), encoding="utf-8")
        run = settings.run(f"questions-{share}", "qa", "--model", settings.model, "--train", part,
                           "--validation", dev, "--lr", "2e-4", "--epochs", "10")  # fmt: skip
        curve.append((len(read_questions(part)), _result(run)["f1"], run))
    asked = read_questions(dev)
    golds = [[text for text, _ in each.answers] for each in asked]
    rules = {name: em_f1(answers, golds, samples=0)["F1"]
             for name, answers in baselines.spans_without_network(asked).items()}  # fmt: skip
    found = evaluate_retrieval([train, dev], str(settings.model))
    return [
        Row("XQuAD English, MiniLM, F1 on dev", f"{curve[-1][1]:.1f}",
            ", ".join(f"{count} questions {score:.1f}" for count, score, _ in curve) + "; without a network "
            + ", ".join(f"{name} {score:.1f}" for name, score in rules.items()), [run for *_, run in curve]),
        Row("its 180 paragraphs, both searches, recall", f"R@1 {found['R@1']:.1f}, R@5 {found['R@5']:.1f}", ""),
    ]  # fmt: skip


def generation(settings: Settings) -> list[Row]:
    from fastgan.ops.product import tiles_are_used
    from fastgan.training.generate import generate

    text = (settings.data / "tinyshakespeare.txt").read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    train, held = settings.out / "shakespeare.txt", settings.out / "shakespeare-end.txt"
    train.write_text(text[:cut], encoding="utf-8")
    held.write_text(text[cut:], encoding="utf-8")
    beside = (
        f"5-gram Kneser-Ney {baselines.kneser_ney(text[:cut], text[cut:]):.3f}, published 1.47 with 10.7 M parameters"
    )
    precision = "bfloat16" if tiles_are_used() else "float32"  # on a CPU with AMX the former is twice as fast
    rows = []
    for name, options in GENERATION.items():
        run = settings.run(f"generation-{name}", "generate", "--from-scratch", "small", "--train", train,
                           "--validation", held, "--precision", precision, *options)  # fmt: skip
        figures = json.loads((run / "result.json").read_text())
        sample = generate(str(run), "ROMEO:", max_tokens=150, temperature=0.8)[0][0]
        print(f"\n{name}:\n{sample}\n")
        rows.append(Row(f"Shakespeare, {name}, {figures['parameters'] / 1e6:.1f} M parameters, nats a character",
                        f"{figures['figures']['loss_per_character']:.3f}", beside, [run]))  # fmt: skip
    return rows


_REGULAR = ["--lr", "1e-3", "--weight-decay", "0.1"]
GENERATION: dict[str, list[str]] = {
    "BPE": ["--vocab-size", "1000", "--batch-size", "32", "--epochs", "30", "--dropout", "0.2", *_REGULAR],
    # The bytes themselves. Six times through the text reached 1.664; sixteen do not overfit either.
    "characters": ["--vocab-size", "261", "--length", "256", "--epochs", "16", "--dropout", "0.1", *_REGULAR],
}
TASKS: dict[str, Callable[[Settings], list[Row]]] = {
    "sentiment": sentiment,
    "translation": translation,
    "summaries": summaries,
    "questions": questions,
    "generation": generation,
}
FIGURES = ("validation_accuracy", "validation_bleu", "validation_rouge1", "validation_f1", "validation_loss")


def table(rows: list[Row]) -> str:
    lines = ["| task | measured | beside | core-seconds |", "|---|---|---|---|"]
    for row in rows:
        costs = [json.loads((run / "cost.json").read_text()) for run in row.runs if (run / "cost.json").exists()]
        cost = ", ".join(f"{each:,.0f}" for each in costs) if len(costs) == len(row.runs) else "not recorded"
        lines.append(f"| {row.task} | {row.measured} | {row.beside} | {cost if row.runs else ''} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """The validation figure of each run over its steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row.runs]
    figure, axes = plt.subplots(1, len(shown), figsize=(4.2 * len(shown), 3.4), squeeze=False)
    for axis, row in zip(axes[0], shown, strict=True):
        for run in row.runs:
            points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            name = next(each for each in FIGURES if any(each in point for point in points))
            own = [(point["step"], point[name]) for point in points if name in point]
            axis.plot(*zip(*own, strict=True), marker="o", markersize=3, label=run.name)
            axis.set_ylabel(name.replace("_", " "))
        axis.set_title(row.task, fontsize=8, wrap=True)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[[], *TASKS], default=[], metavar="TASK")
    parser.add_argument("--model", type=Path, required=True, help="MiniLM's folder.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(given.model, given.data, given.out, given.threads)
    rows: list[Row] = []
    for task in given.tasks or TASKS:
        rows += TASKS[task](settings)
        print(table(rows), flush=True)
    (given.out / "quality.md").write_text(table(rows), encoding="utf-8")
    draw(rows, given.out / "quality.png")


if __name__ == "__main__":
    main()
