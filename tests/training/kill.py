"""Kills training runs with SIGKILL at random moments, resumes them, and compares the end with an undisturbed run's.

    python tests/training/kill.py FOLDER KILLS [SEED]

Each run is a process of its own, forked from this one so that it starts at once. A checkpoint and a picture are written
every step or two, so that many kills fall into the writing.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from fastgan.data import load_images
from fastgan.training import DCGANConfig, resume_dcgan, run_dcgan
from fastgan.training.run import Silent
from fastgan.training.run_folder import RunFolder

STEPS = 24


class Started(Silent):
    """Tells through a pipe that the first step is about to be made."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def start(self, step, total, batch_size):
        os.write(self.pipe, b"s")


def attempt(config, folder, data, after: float | None, training: bool = True) -> bool:
    """Starts or resumes the run and kills it; True if it was killed before it ended.

    ``after`` is in seconds from the first step, or where ``training`` is False from the start of the process.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if (folder / "config.json").exists():
                resume_dcgan(folder, data=data, reporter=Started(writing))
            else:
                run_dcgan(config, folder, data=data, reporter=Started(writing))
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    os.close(writing)
    if after is not None:
        if training:
            os.read(reading, 1)  # nothing, if the process ended before it
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reading)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, f"the run in {folder} failed"
    return False


def end(folder: Path) -> dict[str, bytes]:
    names = ("generator", "discriminator", "optimizers")
    return {name: (folder / "last" / f"{name}.safetensors").read_bytes() for name in names}


def main(place: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    RunFolder.write_events = lambda self: None  # importing TensorBoard in every process takes most of the time
    data = load_images("digits", 16, 1, cache_dir=place / "cache", progress=False)
    config = DCGANConfig(
        image_size=16, channels=1, batch_size=8, latent=4, ngf=2, ndf=2, max_steps=STEPS, seed=seed,
        checkpoint_every=1, sample_every=2,
    )  # fmt: skip
    begin = time.monotonic()
    attempt(config, place / "whole", data, None)
    length, expected = time.monotonic() - begin, end(place / "whole")
    rng, killed, runs = random.Random(seed), 0, 0
    while killed < kills:
        folder = place / f"run-{runs}"
        runs += 1
        # Mostly while it trains and saves, at times while it starts, and again and again within one run.
        while attempt(config, folder, data, rng.uniform(0, length * rng.choice([0.1, 0.5])), rng.random() < 0.85):
            killed += 1
            if killed >= kills:
                break
        attempt(config, folder, data, None)
        assert end(folder) == expected, f"the run in {folder} ended with other weights"
        assert len((folder / "metrics.jsonl").read_bytes().splitlines()) == STEPS
        left = [path for path in (folder / "checkpoints").iterdir() if path.name != f"step-{STEPS:09d}"]
        assert not left, left
    print(f"{killed} kills in {runs} runs of {length:.1f} s, all ended with the same bits")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
