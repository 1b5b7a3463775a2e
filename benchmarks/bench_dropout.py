"""Dropout, forward and backward, beside torch's own."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.peers import compare
from fastgan.nn import functional

CASES = {"BERT, 8×128 tokens × 768": (8, 128, 768), "MiniLM, 16×25 tokens × 384": (16, 25, 384), "64 × 128": (64, 128)}


@pytest.mark.parametrize("case", CASES)
def test_dropout(benchmark, case):
    torch.manual_seed(0)
    x = torch.randn(CASES[case], requires_grad=True)
    grad = torch.randn(CASES[case])

    def step(function):
        return lambda: torch.autograd.grad(function(x, 0.1), x, grad)

    compare(benchmark, {"fastgan": step(functional.dropout), "torch": step(F.dropout)}, case=case, rounds=50)
