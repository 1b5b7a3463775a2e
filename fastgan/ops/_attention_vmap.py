"""vmap over the attention operators: the mapped dimension becomes part of the batch.

Argument positions are those of the schemas in attention.py, counted from query.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK, _BIAS, _PHILOX, _TANGENT_BIAS = 3, 4, 5, 11


def _fold(info, tensor: Tensor, dim: int | None, batch: int) -> Tensor:
    """(N, B, ...) -> (N·B, ...); what is not mapped, or has one batch for all, is expanded first."""
    if dim is None:
        tensor = tensor.unsqueeze(0).expand(info.batch_size, *tensor.shape)
    else:
        tensor = tensor.movedim(dim, 0)
    return tensor.expand(tensor.shape[0], batch, *tensor.shape[2:]).reshape(-1, *tensor.shape[2:])


def _fold_mask(info, mask: Tensor | None, dim: int | None, batch: int) -> Tensor | None:
    if mask is None or (dim is None and mask.shape[0] == 1):
        return mask
    return _fold(info, mask, dim, batch)


def _batch_of(tensor: Tensor, dim: int | None) -> int:
    return tensor.shape[0] if dim is None else tensor.movedim(dim, 0).shape[1]


def _sample_by_sample(operator, info, in_dims, args):
    """With dropout: the counter holds the index within a sample's own batch, so that nothing may be folded."""

    def of(i):
        return [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]

    results = [operator(*of(i)) for i in range(info.batch_size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _folded(info, in_dims, args, query: int, whole_bias: bool):
    """All arguments with the mapped dimension in the batch; the bias, too, if there is one for each sample.

    With ``whole_bias`` it is one for each sample even if all share it: each has its own gradient or tangent of it.
    """
    batch = _batch_of(args[query], in_dims[query])
    out = list(args)
    for i, (arg, dim) in enumerate(zip(args, in_dims, strict=True)):
        if not isinstance(arg, Tensor):
            continue
        shared = i - query == _MASK or (i - query == _BIAS and not whole_bias)
        out[i] = _fold_mask(info, arg, dim, batch) if shared else _fold(info, arg, dim, batch)
    return out, batch


def forward(info, in_dims, *args):
    if args[_PHILOX] is not None:
        return _sample_by_sample(torch.ops.fastgan.attention, info, in_dims, args)
    folded, batch = _folded(info, in_dims, args, 0, whole_bias=False)
    results = torch.ops.fastgan.attention(*folded)
    return tuple(t.unflatten(0, (info.batch_size, batch)) for t in results), (0, 0)


def jvp(info, in_dims, *args):
    if args[_PHILOX] is not None:
        return _sample_by_sample(torch.ops.fastgan.attention_jvp, info, in_dims, args)
    folded, batch = _folded(info, in_dims, args, 0, whole_bias=args[_TANGENT_BIAS] is not None)
    return torch.ops.fastgan.attention_jvp(*folded).unflatten(0, (info.batch_size, batch)), 0


def _with_bias_gradient(operator, info, in_dims, args, whole_bias: bool):
    """The two operators whose arguments begin with grad_output and whose results end with the bias's gradient."""
    if args[1 + _PHILOX] is not None:
        return _sample_by_sample(operator, info, in_dims, args)
    bias = args[1 + _BIAS]
    wanted = bias is not None and args[-1]
    folded, batch = _folded(info, in_dims, args, 1, whole_bias=wanted or whole_bias)
    *results, grad_bias = operator(*folded)
    out = [t.unflatten(0, (info.batch_size, batch)) for t in results]
    if not wanted:
        return (*out, grad_bias), (*(0 for _ in out), None)
    grad_bias = grad_bias.unflatten(0, (info.batch_size, batch))
    if _batch_of(bias, in_dims[1 + _BIAS]) == 1:
        grad_bias = grad_bias.sum(1, keepdim=True)
    return (*out, grad_bias), (0,) * (len(out) + 1)


def backward(info, in_dims, *args):
    return _with_bias_gradient(torch.ops.fastgan.attention_backward, info, in_dims, args, whole_bias=False)


def double_backward(info, in_dims, *args):
    whole_bias = args[1 + _TANGENT_BIAS] is not None
    return _with_bias_gradient(torch.ops.fastgan.attention_double_backward, info, in_dims, args, whole_bias)


# ---- varied lengths (attention_varlen.py): the samples' sequences are packed one sample after the other ----

_OFFSETS, _VARLEN_PHILOX, _VARLEN_LOGSUMEXP = (3, 4), 5, 7


def _pack_offsets(info, offsets: Tensor, dim: int | None, rows: int) -> Tensor:
    """Between the last sequence of a sample and the first of the next one of no length: the kernel checks all ends."""
    offsets = offsets.expand(info.batch_size, -1) if dim is None else offsets.movedim(dim, 0)
    return (offsets + rows * torch.arange(info.batch_size, device=offsets.device).unsqueeze(1)).flatten()


def _pack(info, tensor: Tensor, dim: int | None, at: int) -> Tensor:
    """The mapped dimension in front of dimension ``at``, both as one."""
    tensor = tensor.unsqueeze(0).expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.movedim(0, at).flatten(at, at + 1)


def varlen_rule(name: str, query: int, results: str):
    """The rule of an operator whose query is its argument ``query``. A result has rows of queries ("q") or of keys
    ("k"), or is the log-sum-exp ("l")."""

    def rule(info, in_dims, *args):
        operator = getattr(torch.ops.fastgan, name)
        if args[query + _VARLEN_PHILOX] is not None:
            return _sample_by_sample(operator, info, in_dims, args)
        packed = list(args)
        for i, (arg, dim) in enumerate(zip(args, in_dims, strict=True)):
            if not isinstance(arg, Tensor):
                continue
            if i - query in _OFFSETS:
                of = i - _OFFSETS[0]  # of query or of key
                rows = args[of].shape[0] if in_dims[of] is None else args[of].movedim(in_dims[of], 0).shape[1]
                packed[i] = _pack_offsets(info, arg, dim, rows)
            else:
                packed[i] = _pack(info, arg, dim, 1 if i - query == _VARLEN_LOGSUMEXP else 0)
        out = operator(*packed)
        single = isinstance(out, Tensor)
        dims = tuple(1 if of == "l" else 0 for of in results)
        unpacked = tuple(
            t.unflatten(d, (info.batch_size, t.shape[d] // info.batch_size))
            for t, d in zip((out,) if single else out, dims, strict=True)
        )
        return (unpacked[0], 0) if single else (unpacked, dims)

    return rule
