"""Attention: its operator, its public function and the reports from the field."""

from __future__ import annotations

import pytest
import torch

from fastgan.nn import functional as F


def _inputs(*shape, dtype=torch.float64, requires_grad=True, length=None, width=None):
    torch.manual_seed(0)
    *lead, rows, columns = shape
    make = lambda *s: torch.randn(s, dtype=dtype, requires_grad=requires_grad)
    return make(*shape), make(*lead, length or rows, columns), make(*lead, length or rows, width or columns)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_of_gradients(is_causal):
    query, key, value = _inputs(1, 2, 3, 4, length=5, width=2)
    bias = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    function = lambda *args: F.scaled_dot_product_attention(*args, is_causal=is_causal)
    assert torch.autograd.gradcheck(
        function,
        (query, key, value, bias),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert torch.autograd.gradgradcheck(function, (query, key, value, bias), check_batched_grad=True)


def test_opcheck():
    query, key, value = _inputs(2, 4, 3, 8, dtype=torch.float32)
    key, value = key[:, :2], value[:, :2]
    mask = torch.rand(1, 1, 3, 3) > 0.3
    bias = torch.randn(2, 1, 3, 1, requires_grad=True)
    philox = torch.tensor([3, 4])
    torch.library.opcheck(torch.ops.fastgan.attention, (query, key, value, mask, bias, philox, 0.2, True, 0.5))
    torch.library.opcheck(torch.ops.fastgan.attention, (query, key, value, None, None, None, 0.0, False, 0.5))
    output, logsumexp = torch.ops.fastgan.attention(query, key, value, mask, bias, None, 0.0, True, 0.5)
    for wanted in (True, False):
        arguments = (query, key, value, mask, bias, None, output.detach(), logsumexp, 0.0, True, 0.5, wanted)
        torch.library.opcheck(torch.ops.fastgan.attention_backward, (torch.randn_like(output), *arguments))
