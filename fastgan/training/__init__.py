"""Training: GANTrainer, penalties, and runs that are saved whole and resumed bit for bit."""

from fastgan.training.gan import GANTrainer
from fastgan.training.penalties import r1_penalty, wgan_gp_penalty

__all__ = ["GANTrainer", "r1_penalty", "wgan_gp_penalty"]
