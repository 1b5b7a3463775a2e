"""The table at the end of a run comes from ``peers``."""

from benchmarks.peers import pytest_terminal_summary  # noqa: F401
