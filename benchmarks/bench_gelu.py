"""GELU with and without a bias, forward and backward, beside torch's own and its compiler."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.peers import compare
from fastgan.nn import functional

CASES = {
    "BERT, 8×128 tokens × 3072, bias": ((8, 128, 3072), True, "none"),
    "the same without a bias": ((8, 128, 3072), False, "none"),
    "MiniLM, 16×25 tokens × 1536, bias": ((16, 25, 1536), True, "none"),
    "GPT-2, 4×512 tokens × 3072, by tanh": ((4, 512, 3072), False, "tanh"),
}


@pytest.mark.parametrize("case", CASES)
def test_gelu(benchmark, case):
    shape, biased, approximate = CASES[case]
    torch.manual_seed(0)
    leaves = [torch.randn(shape, requires_grad=True)]
    if biased:
        leaves.append(torch.randn(shape[-1], requires_grad=True))
    grad = torch.randn(shape)

    def apart(x, bias=None):
        return F.gelu(x if bias is None else x + bias, approximate=approximate)

    def step(function):
        return lambda: torch.autograd.grad(function(*leaves), leaves, grad)

    peers = {
        "fastgan": step(lambda x, bias=None: functional.gelu(x, approximate, bias=bias)),
        "torch": step(apart),
        "torch.compile": step(torch.compile(apart)),
    }
    compare(benchmark, peers, case=case, rounds=60)
