"""The emulator sees a planted fault of every kind, and none in right kernels."""

import pytest

from tests.cuda_emulation.build import HERE, build, needs_compiler, run

pytestmark = [needs_compiler, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    built = {}

    def program(sanitizer):
        if sanitizer not in built:
            built[sanitizer] = build(folder, "faults", [HERE / "faults.cpp"], sanitizer=sanitizer)
        return built[sanitizer]

    return program


@pytest.mark.parametrize("sanitizer", ["none", "address", "thread"])
def test_right_kernels_are_right_and_nothing_is_reported(programs, sanitizer):
    done = run([programs(sanitizer), "right"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("sanitizer", ["none", "address", "thread"])
def test_blocks_of_a_cluster_read_each_other(programs, sanitizer):
    done = run([programs(sanitizer), "clusters"])
    assert done.stdout == "no error; 256 256\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("cluster not waited for", "has arrived at its cluster's barrier and not waited"),
        ("divergent cluster", "divergence: not all threads reach a barrier or shuffle"),
        ("cluster ends early", "shared memory of a block that has ended"),
        ("beyond a cluster's array", "nothing of that place was taken"),
        ("part of a cluster", "clusters must be of up to 8 blocks"),
        ("divergent barrier", "divergence: not all threads"),
        ("other barrier", "divergence: two threads of a block wait at different barriers"),
        ("early end", "thread 40 has ended"),
        (
            "divergent shuffle",
            "divergence: not all threads reach a barrier or shuffle; thread 0 to 15 waits for its warp",
        ),
        ("beyond launch", "more is taken than was launched with"),
    ],
)
def test_divergence_and_too_much_shared_memory_end_the_launch(programs, fault, said):
    done = run([programs("none"), fault])
    assert done.returncode == 1
    assert said in done.stdout


@pytest.mark.parametrize("fault", ["unwritten", "copy not waited for"])
def test_what_was_not_written_is_nan(programs, fault):
    done = run([programs("none"), fault])
    assert done.returncode == 0
    assert "nan" in done.stdout


def test_out_of_bounds_shared_memory_is_seen_by_the_address_sanitizer(programs):
    done = run([programs("address"), "beyond array"])
    assert "use-after-poison" in done.stderr


@pytest.mark.parametrize("fault", ["race", "race of blocks", "race in a warp", "cluster read too early"])
def test_races_are_seen_by_the_thread_sanitizer(programs, fault):
    done = run([programs("thread"), fault])
    assert "ThreadSanitizer: data race" in done.stderr, done.stdout + done.stderr
