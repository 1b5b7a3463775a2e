"""The arithmetic of ``benchmarks.cuda_roofline``, and the emulator that writes launches down for it."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cuda_roofline as roofline
from benchmarks.cuda_roofline import Case, Compiled, Launch, Work
from tests.cuda_emulation.build import needs_compiler


def launch(grid=1, threads=128, shared=0):
    return Launch("forward_kernelIfLi64EEEv", grid, threads, shared)


@pytest.mark.parametrize(
    ("threads", "registers", "static", "dynamic", "blocks", "by"),
    [
        (128, 254, 0, 0, 2, "registers: 4 warps of 254 → 256 × 32"),
        (128, 128, 0, 0, 4, "registers"),
        (128, 127, 0, 0, 4, "registers, rounded up"),
        (128, 32, 0, 0, 16, "threads"),
        (256, 32, 0, 0, 8, "threads"),
        (32, 32, 0, 0, 32, "blocks"),
        (128, 64, 0, 99 * 1024, 2, "shared memory: 100 KiB of 228 each"),
        (128, 64, 1, 56 * 1024 - 1, 4, "shared memory: 57 KiB each"),
        (128, 64, 1, 56 * 1024, 3, "shared memory: 128 bytes more"),
        (1024, 64, 0, 0, 1, "registers"),
    ],
)
def test_blocks_of_a_processor(threads, registers, static, dynamic, blocks, by):
    assert roofline.blocks_per_processor(Compiled(registers, static), launch(1, threads, dynamic)) == blocks, by


def test_rounds_work_and_how_close_the_design_comes():
    assert [roofline.rounds(grid, 2) for grid in (1, 264, 265)] == [1, 1, 2]
    assert [roofline.balance(grid) for grid in (66, 132, 264, 265)] == pytest.approx([0.5, 1, 1, 265 / 132 / 3])
    reads, multiplies = Work(3.35e9), Work(3.35e6, 989e9)
    assert (reads.seconds(989e12), reads.limit(989e12)) == (pytest.approx(1e-3), "memory")
    assert (multiplies.seconds(989e12), multiplies.limit(989e12)) == (pytest.approx(1e-3), "products")
    case = Case("attention", "forward", torch.bfloat16, lambda: None, multiplies, lambda *_: multiplies)
    compiled = {launch().kernel: Compiled(254, 0)}
    (row,) = roofline.rows_of(case, [launch(264)], compiled)
    assert (row["blocks"], row["rounds"], row["balance"], row["occupancy"]) == (2, 1, 1.0, 0.125)
    assert roofline.best(case, [row]) == pytest.approx(1.0)
    rows = roofline.rows_of(case, [launch(66), launch(264)], compiled)  # of the first half are idle: 2 ms and 1 ms
    assert roofline.best(case, rows) == pytest.approx(1 / 3)
    plain = Case("norm_act", "forward", torch.bfloat16, lambda: None, reads, lambda *_: reads)
    assert plain.peak == 67e12  # no tensor cores there
    assert len(list(roofline.table([(case, rows)]))) == 4


def test_work_is_told_by_a_launchs_place_among_its_kernels():
    seen = []
    case = Case("norm_act", "", torch.float32, lambda: None, Work(1), lambda _, i, n: seen.append((i, n)) or Work(1))
    other = Launch("loss_kernelIfE", 1, 32, 0)
    compiled = {launch().kernel: Compiled(32, 0), other.kernel: Compiled(32, 0)}
    roofline.rows_of(case, [launch(), other, launch()], compiled)
    assert seen == [(0, 2), (0, 1), (1, 2)]


REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7fastgan45_GLOBAL__N__de03420a_12_attention_cu_805fe29514forward_kernelIdLi64EEEvNS_13AttentionArgsENS0_4PlanE' for 'sm_90a'
ptxas info    : Function properties for _ZN7fastgan45_GLOBAL__N__de03420a_12_attention_cu_805fe29514forward_kernelIdLi64EEEvNS_13AttentionArgsENS0_4PlanE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 174 registers, used 1 barriers, 16 bytes smem, 1368 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN7fastgan45_GLOBAL__N__de03420a_12_attention_cu_805fe29510map_kernelIfEEvNS_13AttentionArgsENS0_7TileMapEl' for 'sm_90a'
ptxas info    : Used 40 registers, used 0 barriers
"""  # noqa: E501


def test_a_report_is_read_and_both_compilers_names_are_one():
    forward, of_map = (
        "forward_kernelIdLi64EEEvNS_13AttentionArgsENS0_4PlanE",
        "map_kernelIfEEvNS_13AttentionArgsENS0_7TileMapEl",
    )
    assert roofline.parse_report(REPORT) == {forward: Compiled(174, 16), of_map: Compiled(40, 0)}
    assert roofline.kernel_of("_ZN7fastgan12_GLOBAL__N_114" + forward) == forward
    assert roofline.kernel_of("_ZN7fastgan12_GLOBAL__N_1L14" + forward) == forward
    assert roofline.kernel_of("_ZN7fastgan12_GLOBAL__N_16launchEv") is None
    assert Launch(of_map, 1, 32, 0).name == "map_kernel"


@needs_compiler
@pytest.mark.kernel
@pytest.mark.timeout(600)
def test_launches_are_written_down_and_not_made(emulated, emulated_library):
    record = roofline.Recorder(emulated_library)
    logits, loss = torch.randn(5, 70), torch.full((5,), 7.0)
    before = logits.clone()
    arguments = (logits, torch.zeros(5, dtype=torch.int64), None, None, torch.ones(5), loss, 0.0, 0.0)
    (made,) = record(lambda: emulated.linear_cross_entropy_rows(*arguments))
    assert (made.name, made.grid, made.threads) == ("rows_kernel", 5, 512)
    assert logits.equal(before)
    assert loss.eq(7.0).all()
    emulated.linear_cross_entropy_rows(*arguments)  # and made again afterwards
    assert not logits.equal(before)

    query = torch.empty(2, 3, 300, 64, dtype=torch.bfloat16)
    (made,) = record(lambda: emulated.attention(query, query, query, None, None, None, 0.0, False, 1.0))
    assert (made.name, made.grid, made.threads) == ("forward_kernel", 2 * 3 * 3, 128)
    assert "bfloat16ELi64E" in made.kernel


@needs_compiler
@pytest.mark.kernel
@pytest.mark.timeout(600)
def test_every_kernel_of_the_cases_has_its_work(emulated, emulated_library):
    record = roofline.Recorder(emulated_library)
    stems = set()
    for case in roofline.cases():
        launches = record(case.call)
        assert launches
        compiled = {each.kernel: Compiled(64, 0) for each in launches}
        rows = roofline.rows_of(case, launches, compiled)
        assert sum(row["bytes"] for row in rows) >= case.needed.bytes
        assert sum(row["operations"] for row in rows) >= case.needed.operations
        assert 0 < roofline.best(case, rows) <= 1
        stems.add(case.stem)
    assert stems == {"attention", "norm_act", "gan_loss", "linear_cross_entropy"}
