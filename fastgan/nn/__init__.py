"""Modules that take the place of torch's own, with the same parameters and state dicts."""

from fastgan.nn import functional
from fastgan.nn.gan_loss import DiscriminatorHeadLoss

__all__ = ["DiscriminatorHeadLoss", "functional"]
