"""Dropout, residual and layer norm, forward and backward, beside torch's three operations and its compiler."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.peers import compare
from fastgan.nn import functional

CASES = {
    "BERT, 8×128 tokens × 768": ((8, 128, 768), 0.1),
    "the same without dropout": ((8, 128, 768), 0.0),
    "MiniLM, 16×25 tokens × 384": ((16, 25, 384), 0.1),
    "GPT-2, 4×512 tokens × 768": ((4, 512, 768), 0.1),
}


@pytest.mark.parametrize("case", CASES)
def test_dropout_add_layer_norm(benchmark, case):
    shape, p = CASES[case]
    torch.manual_seed(0)
    x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], requires_grad=True) for _ in range(2))
    leaves = (x, residual, weight, bias)
    grad = torch.randn(shape)

    def apart(x, residual, weight, bias):
        return F.layer_norm(F.dropout(x, p) + residual, x.shape[-1:], weight, bias)

    def step(function):
        return lambda: torch.autograd.grad(function(*leaves), leaves, grad)

    peers = {
        "fastgan": step(lambda *given: functional.dropout_add_layer_norm(*given, p=p)),
        "torch": step(apart),
        "torch.compile": step(torch.compile(apart)),
    }
    compare(benchmark, peers, case=case, rounds=60)
