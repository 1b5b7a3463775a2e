"""WGAN-GP whose critic attends: the penalty needs gradients of gradients, which torch's fused attention refuses.

The data are noisy sine waves of random phase, 16 samples each.

    python examples/penalty.py [steps]
"""

import math
import sys

import torch
from torch import nn

from fastgan.nn import MultiheadAttention

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
torch.manual_seed(0)
LENGTH, WIDTH, BATCH = 16, 32, 64


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1)
        self.attention = MultiheadAttention(WIDTH, 4, batch_first=True)
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))

    def forward(self, waves):  # (N, LENGTH) -> (N,)
        x = self.embed(waves.unsqueeze(-1)) + self.position
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x).mean(1).squeeze(-1)


def draw_real():
    phase, time = torch.rand(BATCH, 1) * 2 * math.pi, torch.linspace(0, 2 * math.pi, LENGTH)
    return torch.sin(phase + time) + 0.02 * torch.randn(BATCH, LENGTH)


critic = Critic()
generator = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, LENGTH))
optimizer_c, optimizer_g = (torch.optim.Adam(m.parameters(), lr=1e-3, betas=(0.0, 0.9)) for m in (critic, generator))
for step in range(steps):
    real, fake = draw_real(), generator(torch.randn(BATCH, 8)).detach()
    between = torch.lerp(fake, real, torch.rand(BATCH, 1)).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    penalty = 10 * (slope.norm(dim=1) - 1).square().mean()
    distance = critic(real).mean() - critic(fake).mean()
    optimizer_c.zero_grad()
    (penalty - distance).backward()
    optimizer_c.step()
    if step % 3 == 2:
        optimizer_g.zero_grad()
        (-critic(generator(torch.randn(BATCH, 8))).mean()).backward()
        optimizer_g.step()
    if step % 50 == 0 or step == steps - 1:
        print(f"step {step + 1}/{steps}  distance {distance.item():.4f}  penalty {penalty.item():.4f}")
