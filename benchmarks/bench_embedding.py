"""The gradient of a table of words, forward and backward, beside torch's own embedding."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.peers import compare
from fastgan.nn import functional

CASES = {
    "BERT, 8×128 tokens, 30,522 words × 768": (30522, 768, (8, 128)),
    "MiniLM, 16×25 tokens, 30,522 words × 384": (30522, 384, (16, 25)),
    "GPT-2, 4×512 tokens, 50,257 words × 768": (50257, 768, (4, 512)),
}


@pytest.mark.parametrize("case", CASES)
def test_embedding(benchmark, case):
    rows, width, shape = CASES[case]
    torch.manual_seed(0)
    weight, indices = torch.randn(rows, width, requires_grad=True), torch.randint(0, rows, shape)
    grad = torch.randn(*shape, width)

    def step(function):
        def call():
            weight.grad = None
            function(indices, weight, 0).backward(grad)

        return call

    compare(benchmark, {"fastgan": step(functional.embedding), "torch": step(F.embedding)}, case=case)
