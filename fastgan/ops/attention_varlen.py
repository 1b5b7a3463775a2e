"""Attention over sequences of varied length, packed one after the other without padding.

    output, logsumexp = torch.ops.fastgan.varlen_attention(
        query, key, value, cu_seq_q, cu_seq_k, philox, max_q, max_k, dropout_p, is_causal, scale)

    query (ΣL, H, E)   key (ΣS, K, E)   value (ΣS, K, V)   ->   output (ΣL, H, V)   logsumexp (H, ΣL)

Sequence n has the query rows from cu_seq_q[n] up to cu_seq_q[n + 1], the keys and values likewise by cu_seq_k: int32 or
int64, of N + 1 numbers, from 0 to the number of rows. max_q and max_k are the lengths of the longest, or more.
``is_causal`` counts from the lower right corner of each sequence: its last row sees all its keys, row i the columns
0..i + S − L; where L = S that is the upper left corner as well. A row that sees nothing is dead, as in ``attention``.

All else is ``attention``'s (attention.py) of the padded batch: sequence n's dropout is that of batch n of it, and
the derivatives have the same four operators, of which the last two are

    tangent_output = varlen_attention_jvp(...)                       forward mode
    tangent_output, *gradients = varlen_attention_double_backward()  the gradients' derivative along a direction

The references are the padded batch: gathered, attended to, and gathered back.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from fastgan.ops import _attention_vmap
from fastgan.ops import attention as _attention
from fastgan.ops._autograd import define


class _Padded:
    """Packed tensors as a padded batch, and back."""

    def __init__(self, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, is_causal: bool):
        self.most = {"q": max_q, "k": max_k}
        self.offsets = {"q": cu_seq_q.long(), "k": cu_seq_k.long()}
        rows, columns = (self.offsets[of].diff() for of in "qk")
        self.there = {
            "q": torch.arange(max_q, device=rows.device) < rows.unsqueeze(1),
            "k": torch.arange(max_k, device=rows.device) < columns.unsqueeze(1),
        }
        self.mask = self.there["k"][:, None, None, :]
        if is_causal:
            row, column = (torch.arange(n, device=rows.device) for n in (max_q, max_k))
            last = row[:, None] + (columns - rows)[:, None, None]
            self.mask = self.mask & (column <= last).unsqueeze(1)

    def pad(self, tensor: Tensor, of: str) -> Tensor:
        """(rows, heads, width) -> (batch, heads, longest, width), zeros where there is nothing."""
        offsets, most = self.offsets[of], self.most[of]
        rows, batch = tensor.shape[0], offsets.shape[0] - 1
        index = offsets[:-1, None] + torch.arange(most, device=tensor.device)
        with_zeros = torch.nn.functional.pad(tensor, (0, 0, 0, 0, 0, 1))
        padded = with_zeros[torch.where(self.there[of], index, rows).flatten()]
        return padded.unflatten(0, (batch, most)).transpose(1, 2)

    def pad_all(self, query: Tensor | None, key: Tensor | None, value: Tensor | None) -> tuple[Any, Any, Any]:
        """Of the inputs, or of their tangents."""
        of_query, *of_keys = (
            None if t is None else self.pad(t, of) for t, of in zip((query, key, value), "qkk", strict=True)
        )
        return of_query, of_keys[0], of_keys[1]

    def unpad(self, tensor: Tensor, of: str, rows: int) -> Tensor:
        """(batch, heads, longest, ...) -> (rows, heads, ...)."""
        row = torch.arange(rows, device=tensor.device)
        batch = torch.bucketize(row, self.offsets[of][1:], right=True)
        return tensor.transpose(1, 2)[batch, row - self.offsets[of][batch]].contiguous()


def varlen_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    philox: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The operator in plain PyTorch, the padded batch's (N, H, max_q, max_k) matrix stored."""
    padded = _Padded(cu_seq_q, cu_seq_k, max_q, max_k, is_causal)
    output, logsumexp = _attention.attention_reference(
        *padded.pad_all(query, key, value),
        padded.mask,
        None,
        philox,
        dropout_p,
        False,
        scale,
    )
    rows = query.shape[0]
    return padded.unpad(output, "q", rows), padded.unpad(logsumexp, "q", rows).mT.contiguous()


def varlen_attention_backward_reference(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    philox: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value. ``output`` and ``logsumexp`` are not looked at."""
    padded = _Padded(cu_seq_q, cu_seq_k, max_q, max_k, is_causal)
    gradients = _attention.attention_backward_reference(
        padded.pad(grad_output, "q"),
        *padded.pad_all(query, key, value),
        padded.mask,
        None,
        philox,
        output,
        logsumexp,
        dropout_p,
        False,
        scale,
        False,
    )
    return tuple(
        padded.unpad(gradient, of, like.shape[0])
        for gradient, of, like in zip(gradients[:3], "qkk", (query, key, value), strict=True)
    )


def varlen_attention_jvp_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    philox: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    tangent_query: Tensor | None,
    tangent_key: Tensor | None,
    tangent_value: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """The derivative of output along the tangents. ``output`` and ``logsumexp`` are not looked at."""
    padded = _Padded(cu_seq_q, cu_seq_k, max_q, max_k, is_causal)
    tangent = _attention.attention_jvp_reference(
        *padded.pad_all(query, key, value),
        padded.mask,
        None,
        philox,
        output,
        logsumexp,
        *padded.pad_all(tangent_query, tangent_key, tangent_value),
        None,
        dropout_p,
        False,
        scale,
    )
    return padded.unpad(tangent, "q", query.shape[0])


def varlen_attention_double_backward_reference(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    philox: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    tangent_query: Tensor | None,
    tangent_key: Tensor | None,
    tangent_value: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """The derivatives of output and of the gradients along the tangents, as ``attention_double_backward``'s."""
    padded = _Padded(cu_seq_q, cu_seq_k, max_q, max_k, is_causal)
    results = _attention.attention_double_backward_reference(
        padded.pad(grad_output, "q"),
        *padded.pad_all(query, key, value),
        padded.mask,
        None,
        philox,
        output,
        logsumexp,
        *padded.pad_all(tangent_query, tangent_key, tangent_value),
        None,
        dropout_p,
        False,
        scale,
        False,
    )
    return tuple(
        padded.unpad(result, of, like.shape[0])
        for result, of, like in zip(results[:4], "qqkk", (query, query, key, value), strict=True)
    )


def check_offsets(name: str, offsets: Tensor, rows: int, most_name: str, most: int) -> None:
    """What the kernel refuses, for the reference. Reads the numbers."""
    numbers = offsets.tolist()
    lengths = [b - a for a, b in itertools.pairwise(numbers)]
    if numbers[0] != 0:
        raise RuntimeError(f"varlen_attention: {name} must begin with 0, got {numbers[0]}")
    if min(lengths, default=0) < 0:
        raise RuntimeError(f"varlen_attention: {name} must not decrease, got {numbers}")
    if numbers[-1] != rows:
        raise RuntimeError(f"varlen_attention: {name} must end with the number of rows, {rows}, got {numbers[-1]}")
    if max(lengths, default=0) > most:
        raise RuntimeError(
            f"varlen_attention: {most_name} must be the length of the longest sequence or more, "
            f"got {most} and a sequence of {max(lengths)} in {name}"
        )


def _fake(query, key, value, *rest):
    rows, heads, _ = query.shape
    output = query.new_empty((rows, heads, value.shape[2]))
    return output, query.new_empty((heads, rows), dtype=torch.float64)


def _fake_backward(grad_output, query, key, value, *rest):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


def _fake_jvp(query, key, value, *rest):
    return _fake(query, key, value)[0]


def _fake_double_backward(grad_output, query, key, value, *rest):
    return (_fake(query, key, value)[0], *_fake_backward(grad_output, query, key, value))


# Positions, counted from query: 3 and 4 offsets, 5 philox; then 6 and 7 output and logsumexp, 8 to 10 tangents.


def _backward(args, saved, grads, needs):
    if grads[0] is None:
        return (None,) * len(args)
    # Constants for the operator, as in attention.py.
    saved = [tensor.detach() for tensor in saved]
    gradients = torch.ops.fastgan.varlen_attention_backward(grads[0], *args[:6], *saved, *args[6:])
    wanted = [gradient if need else None for gradient, need in zip(gradients, needs, strict=False)]
    return (*wanted, *(None,) * (len(args) - 3))


def _jvp(args, saved, tangents):
    saved = [tensor.detach() for tensor in saved]
    return torch.ops.fastgan.varlen_attention_jvp(*args[:6], *saved, *tangents[:3], *args[6:]), None


def _along(args, tangents):
    return torch.ops.fastgan.varlen_attention_double_backward(*args[:9], *tangents, *args[9:])


def _double_backward(args, saved, grads, needs):
    if all(grad is None for grad in grads):
        return (None,) * len(args)
    results = _along(args, grads)
    wanted = [result if need else None for result, need in zip(results, needs, strict=False)]
    return (*wanted, *(None,) * (len(args) - 4))


def _backward_jvp(args, saved, tangents):
    parts = []
    if tangents[0] is not None:
        parts.append(torch.ops.fastgan.varlen_attention_backward(tangents[0], *args[1:]))
    if any(tangent is not None for tangent in tangents[1:4]):
        parts.append(_along(args, tangents[1:4])[1:])
    return tuple(sum(each[1:], each[0]) for each in zip(*parts, strict=True))


_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor cu_seq_k, Tensor? philox"
_SAVED = "Tensor output, Tensor logsumexp"
_DIRECTION = "Tensor? tangent_query, Tensor? tangent_key, Tensor? tangent_value"
_NUMBERS = "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, float scale"
define(
    f"varlen_attention({_INPUTS}, {_NUMBERS}) -> (Tensor output, Tensor logsumexp)",
    reference=varlen_attention_reference,
    fake=_fake,
    backward=_backward,
    jvp=_jvp,
    save_outputs=(0, 1),
    nondifferentiable_outputs=(1,),
    vmap=_attention_vmap.varlen_rule("varlen_attention", 0, "ql"),
    autocast="lower",
)
define(
    f"varlen_attention_backward(Tensor grad_output, {_INPUTS}, {_SAVED}, {_NUMBERS})"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    reference=varlen_attention_backward_reference,
    fake=_fake_backward,
    backward=_double_backward,
    jvp=_backward_jvp,
    vmap=_attention_vmap.varlen_rule("varlen_attention_backward", 1, "qkk"),
)
define(
    f"varlen_attention_jvp({_INPUTS}, {_SAVED}, {_DIRECTION}, {_NUMBERS}) -> Tensor tangent_output",
    reference=varlen_attention_jvp_reference,
    fake=_fake_jvp,
    vmap=_attention_vmap.varlen_rule("varlen_attention_jvp", 0, "q"),
)
define(
    f"varlen_attention_double_backward(Tensor grad_output, {_INPUTS}, {_SAVED}, {_DIRECTION}, {_NUMBERS})"
    " -> (Tensor tangent_output, Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    reference=varlen_attention_double_backward_reference,
    fake=_fake_double_backward,
    vmap=_attention_vmap.varlen_rule("varlen_attention_double_backward", 1, "qqkk"),
)
