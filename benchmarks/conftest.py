"""The table at the end of a run comes from ``peers``; ``--all-sizes`` runs every size, not a sample."""

from benchmarks.peers import pytest_terminal_summary  # noqa: F401


def pytest_addoption(parser):
    parser.addoption("--all-sizes", action="store_true", help="every size of DCGAN training steps, not a sample")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all-sizes"):
        return
    left = [item for item in items if item.get_closest_marker("all_sizes")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]
