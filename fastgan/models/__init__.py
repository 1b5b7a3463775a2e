"""Models: the DCGAN of the PyTorch tutorial, at any size."""

from fastgan.models.dcgan import DCGAN, Discriminator, Generator, init_weights

__all__ = ["DCGAN", "Discriminator", "Generator", "init_weights"]
