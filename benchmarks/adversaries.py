"""Adversaries on few labels, judged fairly: equal passes, paired draws of the labels, intervals of the differences.

    python -m benchmarks.adversaries --model MINILM --train sst2/train.tsv --dev sst2/dev.tsv [--draws 10] [--arms ...]
    python -m benchmarks.adversaries --model MINILM --train sst2/train.tsv --speed

Every arm has the same number of forward and backward passes over a batch, the same drawn labels, initial weights and
learning rate, no early choice of weights (one evaluation, at the end), and no setting tuned. Draw by draw a line is
added to ``--results``; what is there already is not run again. A difference is claimed only where the BCa bootstrap
interval of the paired differences leaves out 0 and the sign-flip test, corrected by Holm over the arms, has p < 0.05.

``--speed``: one FreeLB step (K = 2, three passes and AdamW) on fastgan's kernels, and the same loop on transformers
with SDPA, interleaved: on the same batches of like lengths, and on batches in random order, as transformers makes them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ARMS = {"plain": 1, "r-drop": 2, "noise": 3, "freelb": 3, "gan-bert": 2}  # and the passes of a step


def draw(path: Path, labels: int, seed: int, folder: Path) -> tuple[Path, Path]:
    """``labels`` lines of the file, and the texts of all others without their labels."""
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    order = np.random.default_rng(seed).permutation(len(lines))
    chosen, rest = folder / f"labels-{seed}.tsv", folder / f"rest-{seed}.txt"
    chosen.write_text("\n".join(lines[i] for i in order[:labels]) + "\n", encoding="utf-8")
    rest.write_text("\n".join(lines[i].split("\t")[0] for i in order[labels:]) + "\n", encoding="utf-8")
    return chosen, rest


def accuracy(arm: str, seed: int, options: argparse.Namespace, folder: Path) -> float:
    from fastgan.training.finetune import finetune
    from fastgan.training.sentiment import SENTIMENT, SentimentConfig

    chosen, rest = draw(options.train, options.labels, seed, folder)
    own = {"plain": {}, "gan-bert": {"adversary": arm, "unlabelled": str(rest)}}.get(arm, {"adversary": arm})
    if arm in ("noise", "freelb"):
        own["adversary_radius"] = options.radius
    config = SentimentConfig(
        train=str(chosen), validation=str(options.dev), model=str(options.model), epochs=10**6, length=64,
        max_steps=options.passes // ARMS[arm], eval_every=10**6, batch_size=options.batch_size, lr=options.lr,
        seed=seed, **own,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=folder) as run:
        result = finetune(SENTIMENT, config, Path(run) / "run")
    if result.interrupted:
        raise SystemExit("stopped")
    return 100 * result.figures["accuracy"]


def compare(rows: list[dict], arms: list[str]) -> None:
    """Mean and standard deviation of each arm, and what each differs from plain training in the same draws."""
    from scipy.stats import bootstrap

    found = {arm: {row["draw"]: row["accuracy"] for row in rows if row["arm"] == arm} for arm in arms}
    draws = sorted(set.intersection(*(set(each) for each in found.values()))) if found else []
    if len(draws) < 2:
        print(f"{len(draws)} draws of all arms: nothing to compare yet")
        return
    tests = {}
    for arm in arms:
        values = np.array([found[arm][number] for number in draws])
        text = f"{arm:<9} {values.mean():6.2f} ± {values.std(ddof=1):.2f}   runs {' '.join(f'{v:.1f}' for v in values)}"
        if arm != "plain" and "plain" in found:
            differences = values - np.array([found["plain"][number] for number in draws])
            mean, low, high = differences.mean(), np.nan, np.nan
            if len(set(differences)) > 1:
                low, high = bootstrap((differences,), np.mean, method="BCa", rng=0).confidence_interval
            signs = np.array(list(itertools.product((1, -1), repeat=len(draws))))
            flips = np.abs((signs * differences).mean(1))
            tests[arm] = float((flips >= abs(mean) - 1e-12).mean()), low, high
            text += f"\n          against plain {mean:+.2f} (95 %: {low:+.2f} to {high:+.2f}), p {tests[arm][0]:.3f}"
        print(text)
    worst = 0.0
    for rank, (arm, (p, low, high)) in enumerate(sorted(tests.items(), key=lambda item: item[1][0])):
        worst = max(worst, min(1.0, p * (len(tests) - rank)))
        shown = worst < 0.05 and not low <= 0 <= high
        print(f"{arm}: p {worst:.3f} after Holm, {'a difference' if shown else 'no difference shown'}")
    print(f"{len(draws)} paired draws")


def study(options: argparse.Namespace) -> None:
    rows = []
    if options.results.exists():
        rows = [json.loads(line) for line in options.results.read_text().splitlines()]
    settings = {name: getattr(options, name) for name in ("passes", "batch_size", "labels", "lr", "radius")}
    rows = [row for row in rows if all(row.get(name) == value for name, value in settings.items())]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for number, arm in itertools.product(range(options.first, options.first + options.draws), options.arms):
            if any((row["draw"], row["arm"]) == (number, arm) for row in rows):
                continue
            if options.minutes and time.monotonic() - begin > 60 * options.minutes:
                break
            started = time.monotonic()
            row = {"draw": number, "arm": arm, **settings, "accuracy": accuracy(arm, number, options, Path(folder)),
                   "seconds": round(time.monotonic() - started, 1)}  # fmt: skip
            rows.append(row)
            with open(options.results, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    compare(rows, options.arms)


def speed(options: argparse.Namespace) -> None:
    from transformers import AutoModelForSequenceClassification

    from fastgan.adversarial import Attack, preset
    from fastgan.data.grouped import GroupedByLength
    from fastgan.data.labelled import read_labelled
    from fastgan.training.hub import encode, load_model, load_tokenizer

    tokenizer, read = load_tokenizer(str(options.model)), read_labelled(options.train)
    ids = encode(tokenizer, read.texts, 64)[0]
    rows = [{"input_ids": each, "labels": int(label)} for each, label in zip(ids, read.labels, strict=True)]
    count = 16 * (options.rounds + 1)
    grouped: Any = GroupedByLength(rows, [len(each) for each in ids], 16, 0, options.rounds + 1)
    mixed = [rows[i] for i in np.resize(np.random.default_rng(0).permutation(len(rows)), count)]
    batches = [[tokenizer.pad([source[n + i] for i in range(16)], return_tensors="pt") for n in range(0, count, 16)]
               for source in (grouped, mixed)]  # fmt: skip
    steps = {}
    for name, attention in (("fastgan", "fastgan"), ("transformers, SDPA", "sdpa")):
        model = load_model(AutoModelForSequenceClassification, str(options.model), tokenizer, attention, "classes",
                           dropout=0.1, ignore_mismatched_sizes=True).train()  # fmt: skip
        attack = Attack(model, preset("freelb"), tokenizer.all_special_ids)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def step(batch, seed, model=model, attack=attack, optimizer=optimizer):
            for share in attack.passes(batch, lambda: model(**batch).loss, seed):
                (share * model(**batch).loss).backward()
            optimizer.step()
            optimizer.zero_grad()

        steps[name] = step, batches[0]
    steps["the same, random order"] = steps["transformers, SDPA"][0], batches[1]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds + 1):
        for name, (step, own) in steps.items():
            begin = time.perf_counter()
            step(own[number], number)
            if number:  # the first warms up
                times[name].append(time.perf_counter() - begin)
    ours = sum(times["fastgan"])
    for name, each in times.items():
        print(f"{name:<24} {1e3 * sum(each) / len(each):6.0f} ms a step, {sum(each) / ours:.2f}×")
    print(f"means of {options.rounds} steps, {torch.get_num_threads()} threads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True, help="texts with labels, a tab between")
    parser.add_argument("--dev", type=Path, help="for the accuracy")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="seed of the first draw")
    parser.add_argument("--labels", type=int, default=138)
    parser.add_argument("--passes", type=int, default=300, help="of a run, whatever the arm")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--radius", type=float, default=0.01, help="of freelb and of noise")
    parser.add_argument("--results", type=Path, default=Path("adversaries.jsonl"))
    parser.add_argument("--minutes", type=float, default=0, help="begin no run after so many; 0: no bound")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--rounds", type=int, default=20, help="of --speed")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.speed:
        speed(options)
    elif options.dev is None:
        parser.error("--dev is needed for the accuracy")
    else:
        study(options)


if __name__ == "__main__":
    main()
