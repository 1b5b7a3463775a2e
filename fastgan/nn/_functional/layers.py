"""Embedding, linear, dropout, GELU."""

from __future__ import annotations

import torch
import torch.nn.functional as _F
from torch import Tensor

from fastgan import _impl
from fastgan.nn._functional._kernels import pays_on_cpu
from fastgan.nn._inputs import check_tensors
from fastgan.ops import dropout as _dropout
from fastgan.ops import embedding as _embedding
from fastgan.ops import gelu as _gelu
from fastgan.ops import linear as _linear
from fastgan.ops._autograd import is_plain
from fastgan.ops.attention import draw_philox

# ---- embedding ----


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """As ``torch.nn.functional.embedding``; on the CPU the gradient of a table of 1 MB and more lies in kept memory.

    Fresh memory for a gradient that is mostly zeros costs more than all that is added up in it. Where no gradient is
    wanted, for small tables, on other devices, and with ``max_norm``, ``scale_grad_by_freq`` or ``sparse``, it is
    torch's own.

    Args:
        input: numbers of rows, int64 or int32, any shape and strides.
        weight: (V, D), any floating-point dtype.
        padding_idx: this row gets no gradient; may be negative, from the end.
        max_norm, norm_type, scale_grad_by_freq, sparse: as torch's.

    Returns:
        input's shape and D, in weight's dtype.

    Raises:
        TypeError: input or weight is no tensor. Otherwise torch's own errors: IndexError for a number outside [0, V),
        RuntimeError for numbers of another dtype or a weight that is not (V, D), AssertionError for padding_idx.
    """
    check_tensors(input=input, weight=weight)
    rows = weight.shape[0] if weight.dim() == 2 else 0
    ours = (
        weight.dim() == 2
        and weight.device.type in ("cpu", "meta")
        and weight.device == input.device
        and input.dtype in (torch.int64, torch.int32)
        and weight.is_floating_point()
        and (padding_idx is None or -rows <= padding_idx < rows)
        and not _embedding.why_torch(weight, max_norm, scale_grad_by_freq, sparse)
        and not _impl.reference_selected()
        and not is_plain((weight,))
    )
    if not ours:
        return _F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    padding = _embedding.NO_PADDING if padding_idx is None else padding_idx % rows
    return _embedding.embedding(weight, input, padding)


# ---- linear ----


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``torch.nn.functional.linear``; up to 32 rows without a gradient are as fast as the weight can be read.

    That is a language model's step of generation on the CPU, a row for each sequence, where torch's product takes up to
    four times as long. In float32; for weights of 256 KB or more whose rows are contiguous; everything else, training
    and ``torch.compile`` included, is torch's own.

    Args:
        input: (..., K).
        weight: (N, K) or (K,).
        bias: (N,) or None.

    Returns:
        (..., N). A row's result is the same bits whatever the other rows are.

    Raises:
        torch's own errors, for shapes, dtypes and devices that do not fit.
    """
    output = _linear.few_rows(input, weight, bias, by_depth=False) if isinstance(input, Tensor) else None
    return _F.linear(input, weight, bias) if output is None else output


# ---- dropout ----


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """As ``torch.nn.functional.dropout``; on the CPU numbers are drawn in parallel, and no mask is kept.

    torch draws one number after the other, which takes longer than most of what stands around it in a Transformer.
    Twice differentiable. Where it pays: contiguous inputs of 8,192 elements and more on the CPU, eager, outside
    ``torch.func``; everything else, ``inplace=True`` included, is torch's own.

    Args:
        input: float32, float64, bfloat16 or float16, any shape.
        p: the share that is dropped, in [0, 1].
        training: False: the input as it is.
        inplace: torch's own.

    Returns:
        input's shape and dtype: 0 where dropped (also where the input is not finite), else divided by 1 − p. The
        random numbers come from torch's generator, through one draw of two of them.

    Raises:
        torch's own errors; ValueError for p outside [0, 1].
    """
    ours = (
        training
        and not inplace
        and isinstance(p, float)
        and 0.0 < p < 1.0
        and pays_on_cpu((input,), _dropout.SMALLEST)
        and input.is_contiguous()
    )
    if not ours:
        return _F.dropout(input, p, training, inplace)
    return _dropout.dropout(input, draw_philox(input.device), p)


# ---- gelu ----


def gelu(input: Tensor, approximate: str = "none", *, bias: Tensor | None = None) -> Tensor:
    """As ``torch.nn.functional.gelu``, of ``input + bias`` where there is one; one pass each way on the CPU.

    torch takes longer over the derivative than over much of what stands around it. Twice differentiable. Where it
    pays: eager, outside ``torch.func`` and autocast, 16,384 elements and more; everything else is torch's own.

    Args:
        input: float32, float64, bfloat16 or float16, any shape; (..., features) with a bias.
        approximate: "none", x · Φ(x), or "tanh".
        bias: (features), of input's dtype; its gradient is summed in the same pass.

    Returns:
        input's shape and dtype. Error in float32, relative, above −2: 5e-7. Below, where 1 + erf is a difference of
        ones and torch loses all digits by −5.5: 1e-6 + x² · 2e-7.

    Raises:
        torch's own errors; RuntimeError for a bias that does not fit.

    Source: Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415.
    """
    given = [each for each in (input, bias) if each is not None]
    ours = (
        approximate in ("none", "tanh")
        and pays_on_cpu(given, _gelu.SMALLEST)
        and (bias is None or bias.shape == input.shape[-1:])
        and not torch.is_autocast_enabled("cpu")
    )
    if not ours:
        return _F.gelu(input if bias is None else input + bias, approximate=approximate)
    return _gelu.bias_gelu(input, bias, approximate == "tanh")
