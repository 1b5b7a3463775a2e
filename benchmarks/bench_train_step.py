"""DCGAN training steps beside the tutorial's loop and beside the best that plain PyTorch does: time and peak memory.

    make bench PYTEST_ARGS="benchmarks/bench_train_step.py"                a sample of the sizes, three minutes
    make bench PYTEST_ARGS="benchmarks/bench_train_step.py --all-sizes"    every size

What is compared is in ``gan_steps``. Machines that have more than AVX2 compare like with like under

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 FASTGAN_CPU_CAPABILITY=avx2
"""

import functools
import itertools
import statistics

import pytest

from benchmarks import gan_steps
from benchmarks.peers import NOTES, compare

ARTICLE = (64, 3, 64, 64)  # pixels, channels, width, batch
SAMPLE = [(32, 1, 32, 64), (32, 3, 64, 16), (64, 3, 32, 128), (64, 3, 96, 16), (128, 3, 32, 16)]
SIZES = SAMPLE + [
    pytest.param(size, marks=pytest.mark.all_sizes)
    for size in ((p, 3, w, b) for p, w, b in itertools.product((32, 64, 128), (32, 64, 96), (16, 64, 128)))
    if size not in SAMPLE and size != ARTICLE
]


def _row(benchmark, names, size, must, goal, case=None, seconds=10.0):
    pixels, _, width, batch = size
    case = f"{case or 'step'} {pixels}x{pixels}, width {width}, batch {batch}"
    compare(benchmark, gan_steps.make(names, size), case=case, seconds=seconds, must=must, goal=goal)


def _named(ours, theirs):
    return {ours: gan_steps.STEPS[ours], theirs: gan_steps.STEPS[theirs]}


@pytest.mark.parametrize(
    ("ours", "theirs", "must", "goal"),
    [
        ("fastgan", "tutorial", 2.0, 3.0),
        ("fastgan", "best PyTorch", 1.7, 2.5),
        ("tutorial + replace_modules", "tutorial", 1.6, 2.2),
        ("best PyTorch + replace_modules", "best PyTorch", 1.3, 1.8),
    ],
)
def test_article(benchmark, ours, theirs, must, goal):
    case = "step" if ours == "fastgan" else f"{theirs}, one line changed,"
    _row(benchmark, _named(ours, theirs), ARTICLE, must, goal, case, seconds=16.0)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "-".join(map(str, size)))
def test_size(benchmark, size):
    _row(benchmark, _named("fastgan", "best PyTorch"), size, 1.5, 2.0)


@pytest.mark.parametrize("penalty", ["wgan-gp", "r1"])
def test_penalty(benchmark, penalty):
    steps = _named("fastgan", "best PyTorch")
    names = {name: functools.partial(build, penalty=penalty) for name, build in steps.items()}
    _row(benchmark, names, ARTICLE, 1.5, 2.0, f"{penalty} step", seconds=16.0)


def test_peak_memory():
    # Either side's varies by a tenth from process to process, with the moments at which its threads allocate.
    pairs = [(gan_steps.peak_memory("fastgan"), gan_steps.peak_memory("best PyTorch")) for _ in range(5)]
    ours, theirs = (statistics.median(each) for each in zip(*pairs, strict=True))
    met = "met" if ours <= theirs else "NOT met"
    NOTES.append(
        f"peak memory of a step: {ours:.0f} MB, best PyTorch {theirs:.0f} MB ({ours / theirs:.2f}), "
        f"must 1.00, goal 0.80: {met}"
    )
