"""The training steps that ``bench_train_step`` compares, each a call without arguments on networks of its own.

``python -m benchmarks.gan_steps NAME`` prints what one of them takes in memory, in megabytes (2²⁰ bytes): the peak of
three steps in a fresh process, above what was there before them. ``benchmarks.device`` times ``DEVICE_STEPS``.
"""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgan
from fastgan.models import DCGAN
from fastgan.training import GANTrainer
from fastgan.training.penalties import r1_penalty, wgan_gp_penalty

Step = Callable[[], object]


def tutorial(gan: Any, real: Tensor) -> Step:
    """The loop of PyTorch's DCGAN tutorial, less its printing."""
    generator, discriminator = gan.generator, gan.discriminator
    discriminator.main.append(nn.Sigmoid())
    criterion = nn.BCELoss()
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))

    def step() -> None:
        discriminator.zero_grad()
        label = torch.full((len(real),), 1.0, device=real.device)
        criterion(discriminator(real).view(-1), label).backward()
        fake = generator(torch.randn(len(real), 100, 1, 1, device=real.device))
        label.fill_(0.0)
        criterion(discriminator(fake.detach()).view(-1), label).backward()
        optimizer_d.step()
        generator.zero_grad()
        label.fill_(1.0)
        criterion(discriminator(fake).view(-1), label).backward()
        optimizer_g.step()

    return step


def best_update(
    gan: Any, penalty: str | None = None, lower: bool = False
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The best that plain PyTorch does: channels_last, logits instead of BCELoss, no gradients of the discriminator in
    the generator's step, fused Adam, no ``.item()``; ``lower``: under autocast to bfloat16.

    A function of real pictures and noise that makes a step and returns both losses.
    """
    generator = gan.generator.to(memory_format=torch.channels_last)
    discriminator = gan.discriminator.to(memory_format=torch.channels_last)
    device = next(generator.parameters()).device.type
    settings: dict[str, Any] = {"lr": 2e-4, "betas": (0.5, 0.999), "fused": True, "capturable": device == "cuda"}
    optimizer_d = torch.optim.Adam(discriminator.parameters(), **settings)
    optimizer_g = torch.optim.Adam(generator.parameters(), **settings)
    autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=lower)

    def loss(pictures: Tensor, target: float) -> Tensor:
        with autocast():
            logits = discriminator(pictures)
        if penalty == "wgan-gp":
            return -logits.mean() if target else logits.mean()
        logits = logits.float()
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))

    def update(real: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        real = real.to(memory_format=torch.channels_last)
        optimizer_d.zero_grad(set_to_none=True)
        loss_real = loss(real, 1.0)
        loss_real.backward()
        with autocast():
            fake = generator(noise)
        loss_fake = loss(fake.detach(), 0.0)
        loss_fake.backward()
        if penalty == "r1":
            r1_penalty(discriminator, real).backward()
        elif penalty == "wgan-gp":
            wgan_gp_penalty(discriminator, real, fake.detach()).backward()
        optimizer_d.step()
        optimizer_g.zero_grad(set_to_none=True)
        discriminator.requires_grad_(False)
        loss_g = loss(fake, 1.0)
        loss_g.backward()
        discriminator.requires_grad_(True)
        optimizer_g.step()
        return loss_real.detach() + loss_fake.detach(), loss_g.detach()

    return update


def best(gan: Any, real: Tensor, penalty: str | None = None, lower: bool = False) -> Step:
    update = best_update(gan, penalty, lower)
    real = real.to(memory_format=torch.channels_last)
    return lambda: update(real, torch.randn(len(real), 100, 1, 1, device=real.device))


def trainer(gan: Any, real: Tensor, penalty: str | None = None, **settings: Any) -> Step:
    loss = "wasserstein" if penalty == "wgan-gp" else "bce"
    ours = GANTrainer(gan.generator, gan.discriminator, loss=loss, penalty=penalty, **settings)
    return lambda: ours.train_step(real)


def replaced(step: Callable[..., Step]) -> Callable[..., Step]:
    """The same loop with one line more."""

    def build(gan: Any, real: Tensor) -> Step:
        fastgan.replace_modules(gan)
        return step(gan, real)

    return build


def compiled(gan: Any, real: Tensor) -> Step:
    gan.generator, gan.discriminator = torch.compile(gan.generator), torch.compile(gan.discriminator)
    return best(gan, real, lower=True)


def graphed(gan: Any, real: Tensor) -> Step:
    """The best that plain PyTorch does on a GPU, all of it one CUDA graph."""
    step = best(gan, real, lower=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


# On a GPU. Ours copies its batch, and reads a step's four results while the next one runs.
DEVICE_STEPS: dict[str, Callable[..., Step]] = {
    "eager": tutorial,
    "channels_last, bfloat16": functools.partial(best, lower=True),
    "compiled": compiled,
    "CUDA graph": graphed,
    "fastgan, no graph": functools.partial(trainer, precision="bfloat16", cuda_graph=False),
    "fastgan": functools.partial(trainer, precision="bfloat16"),
}

STEPS: dict[str, Callable[..., Step]] = {
    "fastgan": trainer,
    "tutorial": tutorial,
    "best PyTorch": best,
    "tutorial + replace_modules": replaced(tutorial),
    "best PyTorch + replace_modules": replaced(best),
}


def networks(image_size: int = 64, channels: int = 3, width: int = 64, batch: int = 64) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    gan = DCGAN(image_size, channels, ngf=width, ndf=width)
    return gan, torch.rand(batch, channels, image_size, image_size) * 2 - 1


def make(names: dict[str, Callable[..., Step]], size: tuple[int, int, int, int]) -> dict[str, Step]:
    """Steps on copies of the same networks."""
    gan, real = networks(*size)
    return {name: build(copy.deepcopy(gan), real) for name, build in names.items()}


def peak_memory(name: str) -> float:
    """Megabytes that the step ``name`` takes at 64 × 64, width 64, batch 64."""
    command = [sys.executable, "-m", "benchmarks.gan_steps", name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _kilobytes(name: str) -> int:
    with open("/proc/self/status") as lines:
        return int(next(line for line in lines if line.startswith(name)).split()[1])


def main(name: str) -> None:
    gan, real = networks()
    small_gan, small_real = networks(32, 3, 16, 4)
    STEPS[name](small_gan, small_real)()  # threads, allocator, lazily loaded code
    step = STEPS[name](gan, real)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts here
    before = _kilobytes("VmRSS")
    for _ in range(3):
        step()
    print((_kilobytes("VmHWM") - before) / 1024)


if __name__ == "__main__":
    main(sys.argv[1])
