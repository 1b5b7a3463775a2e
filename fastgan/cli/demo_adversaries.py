"""The last part of ``fastgan demo``: adversaries of the language model that the demo has pretrained.

Few sentences have labels. Plain fine-tuning, FreeLB and GAN-BERT make equally many passes over the same draws of them,
and whatever comes out is the table. The picture shows GAN-BERT's game: what the classifier makes of sentences and of
the generator's vectors, before and after.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import typer

BATCH = 8
#: name, passes of a step, settings; "" for plain training with as many steps as FreeLB makes
ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}),
    "plain, FreeLB's steps": (3, {}),
    "FreeLB, K = 2": (3, {"adversary": "freelb"}),
    "GAN-BERT": (2, {"adversary": "gan-bert"}),
}
_FAKES = 200  # generated vectors in the picture
_SEED = 7  # of the noise that they are made from


def compete(
    model: Path, out: Path, seed: int, passes: int = 120, draws: int = 3, per_chapter: int = 8
) -> dict[str, Any]:
    """Every arm of ``ARMS`` on ``draws`` draws of ``per_chapter`` labels a chapter, ``passes`` passes each."""
    from fastgan.data.text import labelled_sentences, split_by_hash

    begin = time.perf_counter()
    out.mkdir(parents=True)
    sentences, labels, names = labelled_sentences(per_chapter=180)
    training, held = split_by_hash(sentences, 0.2)
    with tempfile.TemporaryDirectory() as temporary, _one_thread():
        folder = Path(temporary)
        _write(folder / "held-out.tsv", [f"{sentences[i]}\t{names[labels[i]]}" for i in held])
        accuracies: dict[str, list[float]] = {arm: [] for arm in ARMS}
        game = None
        for number in range(seed, seed + draws):
            order = [training[i] for i in np.random.default_rng(number).permutation(len(training))]
            chosen = {i for label in range(len(names)) for i in [j for j in order if labels[j] == label][:per_chapter]}
            _write(folder / "labels.tsv", [f"{sentences[i]}\t{names[labels[i]]}" for i in order if i in chosen])
            _write(folder / "texts.txt", [sentences[i] for i in order if i not in chosen])
            for arm, (of_a_step, settings) in ARMS.items():
                run, steps = folder / f"{arm}-{number}", passes // of_a_step
                result, config = _train(folder, run, model, steps, number, settings)
                accuracies[arm].append(result.figures["accuracy"])
                if arm == "GAN-BERT" and game is None:
                    game = _game(config, run, [sentences[i] for i in held])
    seen = [labels[i] for i in held]
    commonest = max(map(seen.count, seen)) / len(seen)
    seconds = time.perf_counter() - begin
    typer.echo(
        f"      {len(chosen)} sentences with a label and {len(training) - len(chosen)} without, {passes} passes over "
        f"{BATCH} each, {draws} draws of the labels, in {seconds:.0f} s (always the commonest chapter: {commonest:.0%})"
    )
    table = _table(accuracies, passes)
    (out / "adversaries.txt").write_text(table + "\n", encoding="utf-8")
    typer.echo("\n".join("      " + line for line in table.splitlines()))
    assert game is not None
    _draw(game, seen, names, out / "game.png")
    told = _tell(game, [sentences[i] for i in held])
    result = {"seconds": seconds, "passes": passes, "labels": len(chosen), "chance": commonest,
              "accuracies": accuracies, "diversity": game["diversity"], "nearest": told}  # fmt: skip
    (out / "adversaries.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Eight short sentences and a narrow model: two threads wait for each other longer than they compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _train(folder: Path, run: Path, model: Path, steps: int, seed: int, settings: dict[str, Any]) -> tuple[Any, Any]:
    from fastgan.training.finetune import finetune
    from fastgan.training.sentiment import SENTIMENT, SentimentConfig

    if settings.get("adversary") == "gan-bert":
        settings = {**settings, "unlabelled": str(folder / "texts.txt")}
    # One evaluation, in the end: no choice among weights.
    config = SentimentConfig(
        train=str(folder / "labels.tsv"), validation=str(folder / "held-out.tsv"), model=str(model), epochs=10**4,
        max_steps=steps, eval_every=10**6, batch_size=BATCH, lr=1e-3, dropout=0.1, length=32, seed=seed, **settings,
    )  # fmt: skip
    result = finetune(SENTIMENT, config, run)
    if result.interrupted:
        raise typer.Exit(130)
    return result, config


def _game(config: Any, run: Path, texts: list[str]) -> dict[str, Any]:
    """Features of texts and of generated vectors, and their chances of being fake, before training and after it; the
    players' losses between."""
    from safetensors.torch import load_file

    from fastgan.adversarial import attach
    from fastgan.adversarial.gan_bert import _FILE, diversity, made_from
    from fastgan.training.language import _own_generators, _quiet
    from fastgan.training.sentiment import SENTIMENT

    found: dict[str, Any] = {}
    with _own_generators(config.seed), _quiet():
        prepared = attach(SENTIMENT.prepare(config, lambda said: None), config, lambda said: None)  # at step 0
    trainer: Any = prepared.trainer
    model, head, players = prepared.model.eval(), trainer.head, trainer.players
    for when in ("before", "after"):
        if when == "after":
            model.load_state_dict(load_file(run / "model.safetensors"))
            (checkpoint,) = run.glob("checkpoints/checkpoint-*")
            players.load_state_dict(load_file(checkpoint / _FILE))
        with head.watched() as seen:
            chances = _chances(model, prepared.tokenizer, players, seen, texts, config.length)
        real = np.concatenate([each.numpy() for each in seen])
        fake, fake_chances = made_from(head, players, _FAKES, _SEED)
        found[when] = {"real": real, "fake": fake.numpy(), "chances": chances, "fake_chances": fake_chances.numpy()}
        found["diversity"] = diversity(*(_tensor(found[when][kind]) for kind in ("real", "fake")))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["losses"] = [row for row in rows if "generator_loss" in row]
    return found


def _tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array)


def _chances(model: Any, tokenizer: Any, players: Any, seen: list[Any], texts: list[str], length: int) -> np.ndarray:
    """Of being fake, of each text; ``seen`` then has their features."""
    import torch

    found = []
    with torch.no_grad():
        for start in range(0, len(texts), 64):
            batch = tokenizer(texts[start : start + 64], padding=True, truncation=True, max_length=length,
                              return_tensors="pt")  # fmt: skip
            logits = model(**batch).logits
            both = torch.cat([logits, players.fake_logits(seen[-1]).unsqueeze(1)], 1)
            found.append(both.softmax(1)[:, -1].numpy())
    return np.concatenate(found)


def _table(accuracies: dict[str, list[float]], passes: int) -> str:
    lines = [f"{'':<22}{'steps':>6}{'accuracy, %':>15}{'against plain':>16}   draws"]
    plain = 100 * np.array(accuracies["plain"])
    for arm, (of_a_step, _) in ARMS.items():
        values = 100 * np.array(accuracies[arm])
        against = "" if arm == "plain" else _spread(values - plain, "+")
        each = " ".join(f"{value:.1f}" for value in values)
        lines.append(f"{arm:<22}{passes // of_a_step:>6}{_spread(values):>15}{against:>16}   {each}")
    lines.append("means and standard deviations over the draws; no setting of any arm was searched for")
    return "\n".join(lines)


def _spread(values: np.ndarray, sign: str = "") -> str:
    deviation = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.1f}{deviation}"


def _tell(game: dict[str, Any], texts: list[str]) -> list[str]:
    """The sentences that most generated vectors are nearest to, by the classifier's features."""
    after = game["after"]
    distances = ((after["fake"][:, None] - after["real"][None]) ** 2).sum(-1)  # (fakes, texts)
    nearest = np.bincount(distances.argmin(1), minlength=len(texts))
    order = [int(i) for i in np.argsort(-nearest, kind="stable")[:3] if nearest[i]]
    generated, real = after["fake_chances"].mean(), after["chances"].mean()
    typer.echo(
        f"      GAN-BERT's generator: taken for fake with {generated:.0%} on average, sentences with {real:.0%}; its "
        f"vectors are spread over {game['diversity']:.2f} of what sentences are"
    )
    typer.echo(f"      its {_FAKES} vectors are nearest to {int((nearest > 0).sum())} different sentences, most to")
    told = []
    for i in order:
        shown = " ".join(texts[i].split())
        told.append(shown)
        typer.echo(f"        {nearest[i]:>3} × “{shown if len(shown) < 90 else shown[:87] + '…'}”")
    return told


def _draw(game: dict[str, Any], labels: list[int], names: list[str], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, 3)
    chapters = np.array(labels)
    for panel, when in zip(axes, ("before", "after"), strict=False):
        real, fake = game[when]["real"], game[when]["fake"]
        middle = real.mean(0)
        # The plane in which sentences lie widest.
        _, sizes, directions = np.linalg.svd(real - middle, full_matrices=False)
        seen, made = ((each - middle) @ directions[:2].T for each in (real, fake))
        for number, name in enumerate(names):
            panel.scatter(*seen[chapters == number].T, s=14, color=f"C{number}", label=name)
        panel.scatter(*made.T, s=22, marker="x", linewidths=0.8, color="black", label="generated")
        share = (sizes[:2] ** 2).sum() / (sizes**2).sum()
        panel.set_title(f"{when} training (the plane has {share:.0%} of the variance)", fontsize=10)
        panel.set_xticks([])
        panel.set_yticks([])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=len(names) + 1, fontsize=8)
    steps = [row["step"] for row in game["losses"]]
    for name in ("discriminator", "generator"):
        axes[2].plot(steps, [row[f"{name}_loss"] for row in game["losses"]], label=name)
    axes[2].axhline(2 * np.log(2), linestyle="--", linewidth=1, color="C0", label="a discriminator that guesses")
    axes[2].set(xlabel="step", title="losses of the game (nats)", ylim=(0, None))
    axes[2].title.set_fontsize(10)
    axes[2].grid(alpha=0.3)
    axes[2].legend(fontsize=8)
    figure.suptitle("Held-out sentences, by chapter, and GAN-BERT's generated vectors, as the classifier sees them")
    figure.savefig(path, format="png")
