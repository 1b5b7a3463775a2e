"""Modules that take the place of torch's own, with the same parameters and state dicts."""

from fastgan.nn import functional

__all__ = ["functional"]
