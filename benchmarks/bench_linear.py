"""The linear layers of a step of generation, a row a sequence, beside torch's own products (GPT-2's sizes).

A call goes through sixteen different weights, or through the head's 154 MB: none is in the caches, as in a model.
"""

import pytest
import torch

from benchmarks.peers import compare
from fastgan.ops.linear import few_rows

SIZES = {"head 768 → 50,257": (768, 50257, False), "768 → 3,072": (768, 3072, True), "3,072 → 768": (3072, 768, True),
         "768 → 3,072 (nn.Linear)": (768, 3072, False)}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 4, 8, 32])
@pytest.mark.parametrize("size", SIZES)
def test_linear(benchmark, size, rows):
    depth, outputs, by_depth = SIZES[size]
    torch.manual_seed(0)
    shape = (depth, outputs) if by_depth else (outputs, depth)
    weights = [torch.randn(shape) for _ in range(1 if outputs > 10**4 else 16)]
    x, bias = torch.randn(rows, depth), torch.randn(outputs)

    def ours():
        return [few_rows(x, weight, bias, by_depth) for weight in weights]

    def torchs():
        if by_depth:
            return [torch.addmm(bias, x, weight) for weight in weights]
        return [torch.nn.functional.linear(x, weight, bias) for weight in weights]

    peers = {"fastgan": ours, "torch": torchs}
    compare(benchmark, peers, case=f"{size}, {len(weights)} weights, {rows} rows", rounds=30, seconds=1.5)
