"""A DCGAN training step: fastgan's beside the tutorial's loop, and beside the best that plain PyTorch does.

The best plain PyTorch: channels_last, logits instead of BCELoss, no gradients of the discriminator in the generator's
step, fused Adam, no ``.item()``.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers import compare
from fastgan.models import DCGAN
from fastgan.training import GANTrainer

BATCH = 64


def tutorial(gan, real):
    generator, discriminator = gan.generator, gan.discriminator
    discriminator.main.append(nn.Sigmoid())
    criterion = nn.BCELoss()
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))

    def step():
        discriminator.zero_grad()
        label = torch.full((len(real),), 1.0)
        criterion(discriminator(real).view(-1), label).backward()
        fake = generator(torch.randn(len(real), 100, 1, 1))
        label.fill_(0.0)
        criterion(discriminator(fake.detach()).view(-1), label).backward()
        optimizer_d.step()
        generator.zero_grad()
        label.fill_(1.0)
        criterion(discriminator(fake).view(-1), label).backward()
        optimizer_g.step()

    return step


def best(gan, real):
    generator = gan.generator.to(memory_format=torch.channels_last)
    discriminator = gan.discriminator.to(memory_format=torch.channels_last)
    real = real.to(memory_format=torch.channels_last)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True)
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True)
    one, zero = torch.ones(len(real), 1, 1, 1), torch.zeros(len(real), 1, 1, 1)

    def step():
        optimizer_d.zero_grad(set_to_none=True)
        F.binary_cross_entropy_with_logits(discriminator(real), one).backward()
        fake = generator(torch.randn(len(real), 100, 1, 1))
        F.binary_cross_entropy_with_logits(discriminator(fake.detach()), zero).backward()
        optimizer_d.step()
        optimizer_g.zero_grad(set_to_none=True)
        discriminator.requires_grad_(False)
        F.binary_cross_entropy_with_logits(discriminator(fake), one).backward()
        discriminator.requires_grad_(True)
        optimizer_g.step()

    return step


@pytest.mark.parametrize(("image_size", "channels", "width"), [(32, 1, 32), (64, 3, 32), (64, 3, 64)])
def test_train_step(benchmark, image_size, channels, width):
    torch.manual_seed(0)
    gan = DCGAN(image_size, channels, ngf=width, ndf=width)
    real = torch.rand(BATCH, channels, image_size, image_size) * 2 - 1
    ours = copy.deepcopy(gan)
    trainer = GANTrainer(ours.generator, ours.discriminator)
    compare(
        benchmark,
        {
            "fastgan": lambda: trainer.train_step(real),
            "tutorial": tutorial(copy.deepcopy(gan), real),
            "best PyTorch": best(copy.deepcopy(gan), real),
        },
        case=f"step {image_size}x{image_size}, width {width}, batch {BATCH}",
        seconds=12.0,
    )
