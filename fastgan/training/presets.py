"""Configurations that were tried."""

from __future__ import annotations

from fastgan.training.run import DCGANConfig


def digits_demo(max_steps: int = 900, seed: int = 0) -> DCGANConfig:
    """The demo's: handwritten digits at 32×32, in grey."""
    return DCGANConfig(
        data="digits",
        image_size=32,
        channels=1,
        batch_size=64,
        ngf=32,
        ndf=32,
        epochs=1000,
        max_steps=max_steps,
        checkpoint_every=300,
        sample_every=100,
        seed=seed,
    )


def article(data: str = "cifar10", max_steps: int | None = None, seed: int = 0) -> DCGANConfig:
    """The DCGAN article's: 64×64 in colour, width 64, noise of 100."""
    return DCGANConfig(data=data, max_steps=max_steps, checkpoint_every=100, sample_every=50, seed=seed)
