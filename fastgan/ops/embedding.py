"""Rows of a table by their numbers, and the table's gradient in memory that is kept from step to step.

    output[i] = weight[indices[i]]
    grad_weight[v] = Σ grad[i] over the i with indices[i] = v, and 0 for v = padding_idx

The gradient is as large as the table, and nearly all of it is zeros. What it costs is not these but fresh memory to
write them into, page by page: 94 MB for BERT's 30,522 words × 768, of which a step hits a few hundred rows. Here that
memory comes from the pool (csrc/common/pool.h) and goes back to it when the gradient is set to None. There is no C++
beside this file, since the sums themselves, a row added for each token, take a millisecond or two.

Rows are added in the order of the tokens, whatever the number of threads: the same bits in every run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan import _impl
from fastgan.ops._autograd import LIBRARY, define
from fastgan.ops._output import LARGE, new_output

NO_PADDING = -1


def why_torch(weight: Tensor, max_norm: float | None, scale_grad_by_freq: bool, sparse: bool) -> str:
    """Why torch's own serves a table as well; empty where ours pays."""
    if sparse:
        return "sparse=True: its gradient is not as large as the table"
    if max_norm is not None or scale_grad_by_freq:
        return "max_norm and scale_grad_by_freq are torch's own"
    # from which on the pool serves its gradient
    return "its table is smaller than 1 MB" if weight.numel() * weight.element_size() < LARGE else ""


def embedding_reference(weight: Tensor, indices: Tensor, padding_idx: int) -> Tensor:
    return F.embedding(indices, weight, None if padding_idx == NO_PADDING else padding_idx)


def embedding_backward_reference(grad: Tensor, indices: Tensor, rows: int, padding_idx: int) -> Tensor:
    width, flat = grad.shape[-1], indices.reshape(-1)
    added = torch.where((flat != padding_idx).unsqueeze(1), grad.reshape(flat.numel(), width), 0)
    return grad.new_zeros(rows, width).index_add(0, flat, added)


def _fake(weight: Tensor, indices: Tensor, padding_idx: int) -> Tensor:
    return weight.new_empty((*indices.shape, weight.shape[1]))


def _fake_backward(grad: Tensor, indices: Tensor, rows: int, padding_idx: int) -> Tensor:
    return grad.new_empty((rows, grad.shape[-1]))


def _backward(args, saved, grads, needs):
    weight, indices, padding_idx = args
    if not needs[0]:
        return None, None, None
    return embedding_backward(grads[0], indices, weight.shape[0], padding_idx), None, None


def _kernel(weight: Tensor, indices: Tensor, padding_idx: int) -> Tensor:
    return torch.embedding(weight, indices)


def _backward_kernel(grad: Tensor, indices: Tensor, rows: int, padding_idx: int) -> Tensor:
    width, flat = grad.shape[-1], indices.reshape(-1)
    out = new_output(grad, (rows, width)).zero_()
    out.index_add_(0, flat, grad.reshape(flat.numel(), width))
    if 0 <= padding_idx < rows:
        out[padding_idx].zero_()
    return out


embedding = define(
    "embedding(Tensor weight, Tensor indices, int padding_idx) -> Tensor",
    reference=embedding_reference,
    fake=_fake,
    backward=_backward,
)
embedding_backward = define(
    "embedding_backward(Tensor grad, Tensor indices, int rows, int padding_idx) -> Tensor",
    reference=embedding_backward_reference,
    fake=_fake_backward,
)
if _impl.extension_error is None:
    LIBRARY.impl("embedding", _kernel, "CPU")
    LIBRARY.impl("embedding_backward", _backward_kernel, "CPU")
