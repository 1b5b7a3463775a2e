"""The PyTorch tutorial's DCGAN loop on handwritten digits, with the one changed line.

python examples/one_line.py [steps]
"""

import sys

import torch
from torch import nn

import fastgan
from fastgan.data import load_images

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
torch.manual_seed(0)
images = load_images("digits", image_size=32, channels=1)  # uint8 pixels; batch() scales them to [-1, 1]


def block(conv, norm, activation):
    return [conv, nn.BatchNorm2d(norm), activation]


generator = nn.Sequential(
    *block(nn.ConvTranspose2d(100, 128, 4, 1, 0, bias=False), 128, nn.ReLU(True)),
    *block(nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False), 64, nn.ReLU(True)),
    *block(nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), 32, nn.ReLU(True)),
    *(nn.ConvTranspose2d(32, 1, 4, 2, 1, bias=False), nn.Tanh()),
)
discriminator = nn.Sequential(
    *(nn.Conv2d(1, 32, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)),
    *block(nn.Conv2d(32, 64, 4, 2, 1, bias=False), 64, nn.LeakyReLU(0.2, True)),
    *block(nn.Conv2d(64, 128, 4, 2, 1, bias=False), 128, nn.LeakyReLU(0.2, True)),
    *(nn.Conv2d(128, 1, 4, 1, 0, bias=False), nn.Sigmoid()),
)
generator, discriminator = map(fastgan.replace_modules, (generator, discriminator))  # the one changed line
print(fastgan.explain(discriminator))

criterion = nn.BCELoss()
optimizer_g, optimizer_d = (
    torch.optim.Adam(m.parameters(), lr=2e-4, betas=(0.5, 0.999)) for m in (generator, discriminator)
)
for step in range(steps):
    real = images.batch(torch.randint(len(images), (64,)))
    ones, zeros = torch.ones(64), torch.zeros(64)
    fake = generator(torch.randn(64, 100, 1, 1))

    optimizer_d.zero_grad()
    loss_d = criterion(discriminator(real).flatten(), ones) + criterion(discriminator(fake.detach()).flatten(), zeros)
    loss_d.backward()
    optimizer_d.step()

    optimizer_g.zero_grad()
    loss_g = criterion(discriminator(fake).flatten(), ones)
    loss_g.backward()
    optimizer_g.step()
    if step % 20 == 0 or step == steps - 1:
        print(f"step {step + 1}/{steps}  loss_d {loss_d.item():.3f}  loss_g {loss_g.item():.3f}")
