"""The version, from the installed package's metadata."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fastgan")
except PackageNotFoundError:  # used from a folder that was never installed
    __version__ = "0+unknown"
