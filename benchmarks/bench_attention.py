"""Attention beside torch's scaled_dot_product_attention, forward alone and with its backward."""

from __future__ import annotations

import pytest
import torch

from benchmarks.peers import compare
from fastgan.nn import functional as F

SDPA = torch.nn.functional.scaled_dot_product_attention

#: name -> (batch, heads, length, head width), is_causal, dropout_p
CASES = {
    "BERT 8x12x128x64": ((8, 12, 128, 64), False, 0.0),
    "BERT 1x12x512x64": ((1, 12, 512, 64), False, 0.0),
    "GPT 1x12x1024x64 causal": ((1, 12, 1024, 64), True, 0.0),
    "BERT 8x12x128x64 dropout 0.1": ((8, 12, 128, 64), False, 0.1),
    "BERT 1x12x512x64 dropout 0.1": ((1, 12, 512, 64), False, 0.1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_attention(benchmark, case, backward):
    (batch, heads, length, width), is_causal, dropout_p = CASES[case]
    # heads inside rows in memory, as a projection split into heads leaves them
    make = lambda: torch.randn(batch, length, heads, width).transpose(1, 2)
    inputs, grad = [make().requires_grad_(backward) for _ in range(3)], make()

    def call(function):
        def run():
            output = function(*inputs, dropout_p=dropout_p, is_causal=is_causal)
            return torch.autograd.grad(output, inputs, grad) if backward else output

        return run

    products = 7 if backward else 2  # each 2 B H L L E operations; half of that under the causal mask
    gflop = products * 2 * batch * heads * length * length * width * (0.5 if is_causal else 1.0) / 1e9
    name = f"{case}, {'forward+backward' if backward else 'forward'}"
    compare(benchmark, {"fastgan": call(F.scaled_dot_product_attention), "torch": call(SDPA)}, case=name, gflop=gflop)
