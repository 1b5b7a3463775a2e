"""Training: GANTrainer, penalties, and runs that are saved whole and resumed bit for bit."""

from fastgan.training.checkpoint import RunError
from fastgan.training.gan import GANTrainer
from fastgan.training.penalties import r1_penalty, wgan_gp_penalty
from fastgan.training.run import DCGANConfig, load_generator, resume_dcgan, run_dcgan

__all__ = [
    "DCGANConfig",
    "GANTrainer",
    "RunError",
    "load_generator",
    "r1_penalty",
    "resume_dcgan",
    "run_dcgan",
    "wgan_gp_penalty",
]
