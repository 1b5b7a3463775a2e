"""Attention sinks of transformers' models (GPT-OSS, MiMo, Granite with windows, ...), on the kernels that have none.

A sink is one more score in a row's softmax, whose value is zero: it takes a part of the weights and gives nothing.

    output = Σ exp(score) value / (Σ exp(score) + exp(sink))

Without derivatives that is attention's output times sigmoid(logsumexp - sink). With them, the sink is a key: queries
get one number more, sink / scale, keys a zero, and in front of the keys stands one that has a one there and zeros
elsewhere, beside a value of zeros. Its gradient is then the query's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan.nn._functional.attention import _attention_with_logsumexp
from fastgan.ops._autograd import is_plain

#: models that SDPA may not run for their sinks' sake alone, so that "eager" is all that transformers has for them
SINKS_ALONE = ("flint", "gpt_oss", "granite_swa", "granitemoe_swa", "hy_v4", "mimo_v2_flash", "openai_privacy_filter")

#: query, key, value, mask, bias, dropout, is_causal, scale -> (B, H, L, V)
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float, bool, float], Tensor]


def sink_of(query: Tensor, kwargs: dict) -> Tensor | None:
    """(B, H, L, 1), in query's dtype: ``s_aux`` is one number a head, ``sinks`` one a head and row."""
    sink = kwargs.get("s_aux")
    if sink is not None:
        sink = sink.reshape(1, -1, 1, 1)
    else:
        sink = kwargs.get("sinks")
    return None if sink is None else sink.to(query.dtype).expand(*query.shape[:3], 1)


def attention_with_sink(
    attention: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float,
    sink: Tensor,
) -> Tensor:
    """As ``attention``, in whose arguments the sink becomes a key. (B, H, L, E), (B, K, S, E) -> (B, H, L, V)."""
    if mask is not None and mask.dtype != torch.bool:  # added to scores
        bias = mask if bias is None else bias + mask
        mask = None
    if is_plain((query, key, value, bias, sink)):
        results = _attention_with_logsumexp(query, key, value, mask, bias, dropout, is_causal, scale)
        if results is not None:
            output, logsumexp = results
            return output * torch.sigmoid(logsumexp.unsqueeze(-1) - sink).to(output.dtype)
    # The first key, so that it is seen by every row; under is_causal a row of zeros before the first moves the corner.
    rows = int(is_causal)
    query = F.pad(torch.cat([query, sink / scale], -1), (0, 0, rows, 0))
    first = F.pad(key.new_ones(1), (key.shape[3], 0)).expand(*key.shape[:2], 1, -1)
    key = torch.cat([first, F.pad(key, (0, 1))], 2)
    value = F.pad(value, (0, 0, 1, 0))
    mask, bias = _beside_sink(mask, rows), _beside_sink(bias, rows)
    return attention(query, key, value, mask, bias, dropout, is_causal, scale)[:, :, rows:]


def _beside_sink(scores: Tensor | None, rows: int) -> Tensor | None:
    """A mask or bias with a column in front that lets the sink be, and ``rows`` before the first."""
    if scores is None:
        return None
    before = rows if scores.shape[2] > 1 else 0
    return F.pad(scores, (1, 0, before, 0), value=True if scores.dtype == torch.bool else 0.0)
