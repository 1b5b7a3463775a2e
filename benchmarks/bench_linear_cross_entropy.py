"""The LM head and its loss, forward and backward, beside cross_entropy(linear(...)) and torch's own chunks."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.peers import compare
from fastgan.nn.functional import linear_cross_entropy

CASES = {
    "BERT head, 512 tokens": (512, 768, 30522, 1.0),
    "GPT-2 vocabulary, 1024 tokens": (1024, 256, 50257, 1.0),
    "BERT head, 15 % of 1024 tokens": (1024, 768, 30522, 0.15),
}


@pytest.mark.parametrize("case", CASES)
def test_linear_cross_entropy(benchmark, case):
    tokens, features, classes, kept = CASES[case]
    torch.manual_seed(0)
    input = torch.randn(tokens, features, requires_grad=True)
    weight = (torch.randn(classes, features) / features**0.5).requires_grad_()
    target = torch.randint(0, classes, (tokens,))
    target[torch.rand(tokens) >= kept] = -100

    def step(loss):
        def call():
            input.grad = weight.grad = None
            loss().backward()

        return call

    peers = {
        "fastgan": step(lambda: linear_cross_entropy(input, weight, target)),
        "cross_entropy(linear)": step(lambda: F.cross_entropy(F.linear(input, weight), target)),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        peers["torch's chunked"] = step(lambda: F.linear_cross_entropy(input, weight, target, options=options))
    count = int((target != -100).sum())
    compare(benchmark, peers, case=case, gflop=6e-9 * count * features * classes)
