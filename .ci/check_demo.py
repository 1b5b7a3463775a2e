"""Looks at what `make demo` drew: all there, not blank, samples neither noise nor one picture over and over.

python .ci/check_demo.py runs/demo
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def tiles(path: Path, size: int, padding: int = 2) -> np.ndarray:
    """A grid of pictures as an array of (picture, pixel) in [0, 1]."""
    grid = np.asarray(Image.open(path).convert("L"), dtype=np.float64) / 255
    step = size + padding
    out = []
    for y in range(padding, grid.shape[0] - size + 1, step):
        for x in range(padding, grid.shape[1] - size + 1, step):
            out.append(grid[y : y + size, x : x + size].ravel())
    return np.stack(out)


def main(folder: Path) -> None:
    pictures = sorted(folder.rglob("*.png"))
    assert len(pictures) >= 8, f"too few pictures in {folder}: {pictures}"
    for path in pictures:
        pixels = np.asarray(Image.open(path).convert("L"), dtype=np.float64)
        assert min(pixels.shape) >= 64, f"{path} is {pixels.shape}"
        assert pixels.std() > 2, f"{path} is blank"
    summary = json.loads((folder / "summary.json").read_text())
    size = summary["gan"]["image_size"]
    real, fake = tiles(folder / "gan" / "real.png", size), tiles(folder / "gan" / "samples.png", size)
    # Spread: how far pictures lie from their mean. A collapsed generator has almost none.
    spread = fake.std(axis=0).mean() / real.std(axis=0).mean()
    assert 0.5 < spread < 1.6, f"the samples' spread is {spread:.2f} of the data's"

    # Structure: neighbouring pixels of a picture are alike in real digits, and are not in noise.
    def rough(x):
        pictures = x.reshape(len(x), size, size)
        return np.abs(np.diff(pictures, axis=2)).mean() / x.std()

    assert rough(fake) < 2 * rough(real), f"the samples look like noise: {rough(fake):.3f} against {rough(real):.3f}"
    brightness = fake.mean() / real.mean()
    assert 0.6 < brightness < 1.6, f"the samples' brightness is {brightness:.2f} of the data's"
    language = summary["language"]
    assert language["loss_last"] < 0.8 * language["loss_first"], language
    assert summary["classification"]["accuracy"] > 2 * summary["classification"]["chance"], summary["classification"]
    assert summary["generation"]["loss_per_character"] < 2.0, summary["generation"]  # letters alone: 3.0
    assert all(len(text) > 40 for text in summary["generation"]["written"]), summary["generation"]
    assert summary["answers"]["right"] > 1.4 * summary["answers"]["chance"], summary["answers"]
    # Which arm wins is whatever comes out; that all of them ran, learnt, and were drawn, is not.
    adversaries = summary["adversaries"]
    assert len(adversaries["accuracies"]) == 4, adversaries
    for arm, found in adversaries["accuracies"].items():
        assert len(found) == 3, (arm, found)
        assert sum(found) / 3 > 1.2 * adversaries["chance"], (arm, found, adversaries["chance"])
    assert 0 < adversaries["diversity"] < 3, adversaries
    assert adversaries["seconds"] < 300, adversaries["seconds"]
    assert (folder / "adversaries" / "game.png").exists()
    print(
        f"{len(pictures)} pictures, spread {spread:.2f}, roughness {rough(fake) / rough(real):.2f} of the data's: well"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
