"""Peers side by side in one run.

A machine's speed drifts by more than most kernels differ, so a figure of its own says little: ``compare`` calls every
peer once a round, round after round, and quotes medians and the ratio round by round. All of them run in one process
under one allocator, on the same inputs.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import pytest
import torch

ROWS: list[dict] = []
NOTES: list[str] = []  # printed under the table


def compare(
    benchmark,
    peers: dict[str, Callable[[], object]],
    *,
    case: str,
    gflop: float | None = None,
    rounds: int = 15,
    seconds: float = 2.5,
    must: float | None = None,
    goal: float | None = None,
    yardstick: tuple[str, float, float] | None = None,
) -> dict[str, float]:
    """Times ``peers`` interleaved; the first is ours, the rest are what it is measured against.

    Args:
        benchmark: pytest-benchmark's fixture: our times enter its report (and ``--benchmark-json``), the peers' medians
            and the ratios its ``extra_info``.
        peers: name → a call without arguments. Named first: fastgan.
        case: the row's name in the table.
        gflop: the work that has to be done, in 10⁹ operations; the table then tells GFLOP/s.
        rounds: at most so many rounds; at least five, however long they take.
        seconds: stop after this time.
        must, goal: what the ratio to the first peer has to reach, and what it should.
        yardstick: (peer, its 10⁹ operations, share): that peer is a rate to compare ours with, no competitor; the
            row is met as well where our share of its rate is at least that.
    Returns:
        Peer → median of its time over ours, taken round by round (above 1: we are faster).
    """
    ours, *others = peers
    for call in peers.values():  # allocator, caches, threads
        call()
    round_seconds = sum(_timed(call) for call in peers.values())
    rounds = max(5, min(rounds, int(seconds / max(round_seconds, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in others}

    def peers_once() -> None:
        for name in others:
            times[name].append(_timed(peers[name]))

    gc.collect()
    gc.disable()
    try:
        # pytest-benchmark calls `setup` before each of its rounds: that is what interleaves the peers with ours.
        benchmark.pedantic(peers[ours], setup=peers_once, rounds=rounds, iterations=1, warmup_rounds=0)
    finally:
        gc.enable()
    if benchmark.stats is None:  # --benchmark-disable
        return {}
    mine = benchmark.stats.stats.data
    ratios = {
        name: statistics.median(theirs / own for theirs, own in zip(times[name], mine, strict=True)) for name in others
    }
    medians = {ours: statistics.median(mine)} | {name: statistics.median(values) for name, values in times.items()}
    benchmark.extra_info.update(case=case, medians_ms={n: m * 1e3 for n, m in medians.items()}, ratios=ratios)
    share = None
    if yardstick and gflop:
        name, work, _ = yardstick
        share = ratios.pop(name) * gflop / work
        del medians[name]
    met = must is not None and (ratios[others[0]] >= must or (share is not None and share >= yardstick[2]))
    ROWS.append(
        {
            "case": case,
            "medians": medians,
            "ratios": ratios,
            "gflop": gflop,
            "share": share,
            "bound": "" if must is None else f"must {must:.2f}, goal {goal:.2f}: {'met' if met else 'NOT met'}",
        }
    )
    return ratios


def fastest(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """Of several ways to do the same, the one that a few calls of each, in turn, find fastest."""
    times = [[_timed(call) for call in calls] for _ in range(4)][1:]
    return min(zip(calls, map(min, zip(*times, strict=True)), strict=True), key=lambda pair: pair[1])[0]


def sgemm_gflops(size: int = 1024) -> float:
    """The machine's rate at float32 matrix products, which the tables name beside their figures."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    torch.mm(a, b)
    best = min(_timed(lambda: torch.mm(a, b)) for _ in range(7))
    return 2 * size**3 / best / 1e9


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def table() -> str:
    """All rows of this run as text."""
    width = max((len(row["case"]) for row in ROWS), default=4)
    lines = [f"{'case':<{width}}  {'fastgan':>10}  peers (time over ours: above 1, fastgan is faster)"]
    for row in ROWS:
        ours, *others = row["medians"]
        rate = f"  {row['gflop'] / row['medians'][ours]:.0f} GFLOP/s" if row["gflop"] else ""
        cells = "   ".join(f"{n} {row['medians'][n] * 1e3:.2f} ms ({row['ratios'][n]:.2f}x)" for n in others)
        share = f", share {row['share']:.0%}" if row["share"] else ""
        bound = f"   {row['bound']}" if row["bound"] else ""
        lines.append(f"{row['case']:<{width}}  {row['medians'][ours] * 1e3:>7.2f} ms  {cells}{rate}{share}{bound}")
    return "\n".join([*lines, *NOTES])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not (ROWS or NOTES):
        return
    import fastgan

    info = fastgan.info()
    terminalreporter.section("fastgan beside its peers")
    terminalreporter.write_line(
        f"{info['cpu']}, {torch.get_num_threads()} threads, capability {info['capability']}, "
        f"torch {torch.__version__}, sgemm {sgemm_gflops():.0f} GFLOP/s"
    )
    terminalreporter.write_line(table())
