"""The article's configuration on CIFAR-10 for a given time, beside the plain PyTorch loop: same seeds, same time.

    python -m benchmarks.cifar10 --data cifar10.zip [--minutes 30] [--out runs/cifar10]
    python -m benchmarks.cifar10 --report [--out runs/cifar10]

``fastgan train dcgan`` (64 × 64, widths 64, batch 64, Adam 2e-4, BCE) and the loop that is the best of plain PyTorch
(``gan_steps.best_update``: channels_last, fused Adam, no wasted gradients) run side by side, each with one thread on a
core of its own, from the same first weights, on the same batches in the same order with the same noise, and both are
stopped when the time is over. Ours writes checkpoints and sample grids meanwhile; the plain loop only its losses.

Prints steps, seconds and core-seconds for a thousand pictures, and how far the losses of the first steps lie apart;
draws both grids (same noise, evaluation mode) and both curves as one picture, ``<out>/comparison.png``.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastgan.data import ImageBatches, load_images
from fastgan.training.checkpoint import write_file
from fastgan.training.gan import GANTrainer
from fastgan.training.pictures import grid_png
from fastgan.training.run import load_generator
from fastgan.training.streams import INIT, NOISE, mixed_seed

BATCH = 64
LATENT = 100


def plain(data: str, seed: int, seconds: float, out: Path) -> None:
    """The plain loop: ``metrics.jsonl`` and, at the end, ``grid.png`` in ``out``."""
    from benchmarks.gan_steps import best_update
    from fastgan.models import DCGAN

    torch.manual_seed(mixed_seed(seed, INIT, 0))
    gan = DCGAN(latent=LATENT)
    update = best_update(gan)
    batches = ImageBatches(load_images(data, 64, 3), BATCH, seed)
    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "metrics.jsonl", "w", encoding="utf-8") as log:
        for step, real in enumerate(batches.steps(0, 10**9)):
            draws = torch.Generator().manual_seed(mixed_seed(seed, NOISE, step))
            losses = update(real, torch.randn(len(real), LATENT, 1, 1, generator=draws))
            loss_d, loss_g = torch.stack(losses).tolist()
            elapsed = time.monotonic() - begin
            log.write(json.dumps({"step": step + 1, "loss_d": loss_d, "loss_g": loss_g, "seconds": elapsed}) + "\n")
            if elapsed > seconds:
                break
    (out / "grid.png").write_bytes(grid_png(GANTrainer.sample_from(gan.generator, (LATENT, 1, 1), 64, seed)))


def side_by_side(options: argparse.Namespace) -> None:
    """Both runs; ``ours`` is the command that a user types, stopped as Ctrl-C does."""
    seconds = 60 * options.minutes
    load_images(options.data, 64, 3)  # decoded once, kept, before the clock starts
    ours = [sys.executable, "-m", "fastgan", "train", "dcgan", "--data", options.data, "--seed", str(options.seed)]
    ours += ["--epochs", "100000", "--out", str(options.out / "ours")]
    theirs = [sys.executable, "-m", "benchmarks.cifar10", "--data", options.data, "--seed", str(options.seed)]
    theirs += ["--minutes", str(options.minutes), "--out", str(options.out), "--plain"]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("two cores are needed, one for each run")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    processes = {}
    for (name, command), core in zip({"plain": theirs, "ours": ours}.items(), cores, strict=False):
        (options.out / f"{name}.log").parent.mkdir(parents=True, exist_ok=True)
        with open(options.out / f"{name}.log", "wb") as log:
            processes[name] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        os.sched_setaffinity(processes[name].pid, {core})
    metrics = options.out / "ours" / "metrics.jsonl"

    def runs() -> bool:  # leaves the ended process to wait4, which tells what it has used
        return os.waitid(os.P_PID, processes["ours"].pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    while not metrics.exists() and runs():
        time.sleep(0.1)
    end = time.monotonic() + seconds
    while time.monotonic() < end and runs():
        time.sleep(0.1)
    processes["ours"].send_signal(signal.SIGTERM)  # as Ctrl-C, which a job in the background does not hear
    usage = {}
    for name in ("ours", "plain"):
        _, status, spent = os.wait4(processes[name].pid, 0)
        usage[name] = spent.ru_utime + spent.ru_stime
        print(f"{name}: ended with status {os.waitstatus_to_exitcode(status)}, {usage[name]:.0f} core-seconds")
    write_file(options.out / "cores.json", json.dumps(usage).encode())


def read(folder: Path) -> list[dict[str, Any]]:
    with open(folder / "metrics.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def report(out: Path) -> None:
    """The table on standard output, and ``comparison.png``."""
    rows = {"fastgan": read(out / "ours"), "plain PyTorch": read(out / "plain")}
    cores = json.loads((out / "cores.json").read_text())
    print("| | steps | pictures | seconds | core-seconds / 1,000 pictures |\n|---|---|---|---|---|")
    for name, key in (("fastgan", "ours"), ("plain PyTorch", "plain")):
        steps, seconds = len(rows[name]), rows[name][-1]["seconds"]
        pictures = steps * BATCH  # an epoch's last batch is smaller: a fraction of a percent
        print(f"| {name} | {steps:,} | {pictures:,} | {seconds:.0f} | {cores[key] / pictures * 1000:.2f} |")
    for count in (20, 100):
        pairs = zip(rows["fastgan"][:count], rows["plain PyTorch"][:count], strict=False)
        apart = [abs(a[loss] - b[loss]) / max(1.0, abs(b[loss])) for a, b in pairs for loss in ("loss_d", "loss_g")]
        print(f"largest difference of a loss in the first {count} steps: {max(apart):.1e}")
    write_file(out / "comparison.png", comparison_png(out, rows))
    print(out / "comparison.png")


def comparison_png(out: Path, rows: dict[str, list[dict[str, Any]]]) -> bytes:
    """Both grids side by side over both pairs of curves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    generator, config, _ = load_generator(out / "ours")
    ours = grid_png(GANTrainer.sample_from(generator, (LATENT, 1, 1), 64, config.seed))
    grids = {"fastgan": ours, "plain PyTorch": (out / "plain" / "grid.png").read_bytes()}
    figure = Figure(figsize=(12, 10), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 2, gridspec_kw={"height_ratios": [6, 2.4]})
    for axes, name in zip(upper, grids, strict=True):
        axes.imshow(Image.open(io.BytesIO(grids[name])).convert("RGB"), interpolation="nearest")
        axes.set_title(f"{name}: {len(rows[name]):,} steps in {rows[name][-1]['seconds'] / 60:.0f} minutes")
        axes.axis("off")
    for axes, name in zip(lower, rows, strict=True):
        minutes = [row["seconds"] / 60 for row in rows[name]]
        for loss, color in (("loss_d", "tab:blue"), ("loss_g", "tab:orange")):
            axes.plot(minutes, [row[loss] for row in rows[name]], color=color, linewidth=0.5, alpha=0.7, label=loss)
        axes.set_xlabel("minutes")
        axes.set_ylim(0, 10)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", help="CIFAR-10's pictures: a folder, a zip file, or cifar10 for the hub's")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--report", action="store_true", help="only the table and the picture of a run that ended")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.data is None and not options.report:
        parser.error("--data is missing")
    if options.plain:
        return plain(options.data, options.seed, 60 * options.minutes, options.out / "plain")
    if not options.report:
        side_by_side(options)
    report(options.out)


if __name__ == "__main__":
    main()
