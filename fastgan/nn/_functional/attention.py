"""Attention: dense, with its weights, and of packed sequences."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgan import _impl
from fastgan.nn import _attention_inputs, _autocast
from fastgan.nn._inputs import number
from fastgan.ops._autograd import in_functorch, is_plain
from fastgan.ops.attention import attention_reference, attention_weights_reference, draw_philox
from fastgan.ops.attention_varlen import check_offsets, varlen_attention_reference


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(query keyᵀ · scale + mask) value: torch's function, twice differentiable, in linear memory.

    Args:
        query: (..., H, L, E), float32, float64, bfloat16 or float16; any strides.
        key: (..., K, S, E). Leading dimensions broadcast against query's, as in torch.
        value: (..., K, S, V).
        attn_mask: whatever broadcasts to the scores (..., H, L, S). Boolean: True takes part. Floating (query's
            dtype or float32): added to the scores; it may require a gradient.
        dropout_p: in [0, 1]; applied whenever it is above zero. Drawn from torch's generator of query's device.
        is_causal: row i sees columns 0..i, counted from the upper left corner; a mask applies as well.
        scale: 1 / sqrt(E) by default.
        enable_gqa: allow K to be a divisor of H; query head h reads key head h // (H / K).

    Returns:
        (..., H, L, V) in query's dtype. A row with nothing to attend to is zero, and so are its gradients.

    Raises:
        RuntimeError: ranks, sizes, dtypes or devices that do not fit, dropout_p outside [0, 1].
        TypeError: an argument that is not a tensor.

    Source: tiles with a running softmax as in Dao et al., FlashAttention (2022); the log-sum-exp is kept and the
    backward recomputes the tiles. Sparse, nested and complex tensors, and devices without a kernel, go to torch's own;
    so does half precision without gradients and dropout on a GPU, and fewer than eight rows of bfloat16 without them on
    a CPU with AMX. More rows of bfloat16 are multiplied by AMX's tiles: scores and sums are float32, weights and score
    gradients are rounded to bfloat16 before they are multiplied, as torch's kernel does. With gradients, but without
    mask and dropout, half precision on a GPU goes to torch's kernel as well, and its second derivative to ours
    (``fastgan/ops/fused_attention.py``).
    """
    found = _attention_arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if found is None or _attention_inputs.torch_takes(*found[1][:6]):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    lead, arguments = found
    if not _impl.reference_selected() and _attention_inputs.fused_takes(*arguments[:6]):
        query4, key4, value4, *_, causal, factor = arguments
        output, _ = torch.ops.fastgan.fused_attention(query4, key4, value4, causal, factor)
    else:
        output, _ = _attention(arguments)
    return output if len(lead) == 2 else output.reshape(*lead, query.shape[-2], value.shape[-1])


def _attention_arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    """The leading dimensions and what the operator takes; None: no kernel takes these inputs. Raises what is public."""
    _attention_inputs.check_types(query, key, value, attn_mask, dropout_p)
    device = query.device.type
    if _autocast.is_on(device):
        lower = torch.get_autocast_dtype(device)
        query, key, value = (_attention_inputs.autocast(t, lower) for t in (query, key, value))
        attn_mask = None if attn_mask is None else _attention_inputs.autocast(attn_mask, lower)
    _attention_inputs.check(query, key, value, attn_mask)
    if not _attention_inputs.has_kernel(query, key, value, attn_mask):
        return None
    lead, (q4, k4, v4, mask4) = _attention_inputs.fold(query, key, value, attn_mask, enable_gqa)
    if scale is None:
        width = query.shape[-1]
        scale = 1.0 / math.sqrt(width) if width > 0 else 1.0
    scale = number(scale, "scaled_dot_product_attention: scale")
    philox = draw_philox(query.device) if dropout_p > 0.0 else None
    mask, bias = (mask4, None) if mask4 is None or mask4.dtype == torch.bool else (None, mask4)
    if bias is not None and query.dtype == torch.float64:
        bias = bias.double()
    return lead, (q4, k4, v4, mask, bias, philox, float(dropout_p), bool(is_causal), scale)


def _attention(arguments) -> tuple[Tensor, Tensor]:
    if _impl.reference_selected():
        with _autocast.off(arguments[0].device.type):
            return attention_reference(*arguments)
    operator = torch.ops.fastgan.attention.default  # the overload itself: a packet chooses, for microseconds
    if is_plain(arguments[:5]):  # generation: what the operator would find out in Python a second time
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)
    return operator(*arguments)


def _attention_with_logsumexp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor] | None:
    """For (B, H, L, E), a boolean mask and a bias beside each other: the output and the rows' log-sum-exp (B, H, L).

    None where no kernel takes these inputs.
    """
    fits = bias is None or bias.dtype in (query.dtype, torch.float32)
    if _impl.reference_selected() or not fits or not _attention_inputs.has_kernel(query, key, value, mask):
        return None
    philox = draw_philox(query.device) if dropout_p > 0.0 else None
    return _attention((query, key, value, mask, bias, philox, dropout_p, is_causal, scale))


def _attention_and_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    average: bool,
) -> tuple[Tensor, Tensor] | None:
    """For (B, H, L, E): the output, and the weights before dropout, (B, H, L, S) or averaged over the heads.

    The weights come tile by tile from the rows' log-sum-exp, so that averaged ones never need those of all heads. None
    where no kernel takes these inputs.
    """
    found = _attention_arguments(query, key, value, attn_mask, dropout_p, is_causal, None, False)
    if found is None:
        return None
    arguments = found[1]
    output, logsumexp = _attention(arguments)
    q4, k4, _, mask, bias, *_, causal, scale = arguments
    rest = (q4, k4, mask, bias, logsumexp, causal, scale, average)
    if _impl.reference_selected():
        with _autocast.off(query.device.type):
            return output, attention_weights_reference(*rest)
    return output, torch.ops.fastgan.attention_weights(*rest)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention within each of the sequences that are packed one after the other: varied lengths without padding.

    The arguments are those of ``torch.nn.attention.varlen.varlen_attn``, and it runs on the CPU, in float32 and
    float64 too, with dropout, value's width other than query's, and derivatives of any order and kind.

    Args:
        query: (ΣL, H, E), float32, float64, bfloat16 or float16; any strides.
        key: (ΣS, K, E). value: (ΣS, K, V).
        cu_seq_q: (N + 1,) int32 or int64, where each sequence begins: 0, ..., ΣL. Sequences may be empty.
        cu_seq_k: (N + 1,), likewise of key and value: 0, ..., ΣS.
        max_q, max_k: the length of the longest sequence, or more.
        scale: 1 / sqrt(E) by default.
        window_size: (-1, -1), or (-1, 0), which is ``is_causal``.
        enable_gqa: allow K to be a divisor of H; query head h reads key head h // (H / K).
        is_causal: of each sequence, from its lower right corner, as torch's: the last row sees all keys, row i the
            columns 0..i + S − L. (``scaled_dot_product_attention`` counts from the upper left one, as torch's.)
        dropout_p: in [0, 1]; applied whenever it is above zero. Drawn from torch's generator of query's device; the
            n-th sequence gets the bits of the n-th in a padded batch.

    Returns:
        (ΣL, H, V) in query's dtype, contiguous. A row with nothing to attend to is zero, and so are its gradients.

    Raises:
        RuntimeError: ranks, sizes, dtypes or devices that do not fit, dropout_p outside [0, 1]; on the CPU offsets
            that do not begin with 0, decrease or do not end with the number of rows, or a sequence longer than max_q or
            max_k. (On CUDA the numbers are not looked at, which would wait for the device.)
        ValueError: H other than K without ``enable_gqa``.
        NotImplementedError: another window_size.
        TypeError: an argument of another type.

    Source: as ``scaled_dot_product_attention``. On CUDA a head of more than 256 numbers (float64: 128), and everything
    where there is no kernel, goes to the reference, which pads the batch and stores the (N, H, max_q, max_k) matrix.
    """
    _attention_inputs.check_varlen_types(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size, dropout_p)
    if _autocast.is_on(query.device.type):
        lower = torch.get_autocast_dtype(query.device.type)
        query, key, value = (_attention_inputs.autocast(t, lower) for t in (query, key, value))
    _attention_inputs.check_varlen(query, key, value, cu_seq_q, cu_seq_k, enable_gqa)
    if cu_seq_q.dtype != cu_seq_k.dtype:
        cu_seq_q, cu_seq_k = cu_seq_q.long(), cu_seq_k.long()
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1]) if query.shape[-1] > 0 else 1.0
    scale = number(scale, "varlen_attention: scale")
    philox = draw_philox(query.device) if dropout_p > 0.0 else None
    causal = bool(is_causal) or tuple(window_size) == (-1, 0)
    arguments = (query, key, value, cu_seq_q, cu_seq_k, philox, max_q, max_k, float(dropout_p), causal, scale)
    if not _attention_inputs.has_varlen_kernel(query, value) or _impl.reference_selected():
        if query.device.type == "cpu" and not torch.compiler.is_compiling() and not in_functorch():
            check_offsets("cu_seq_q", cu_seq_q, query.shape[0], "max_q", max_q)
            check_offsets("cu_seq_k", cu_seq_k, key.shape[0], "max_k", max_k)
        with _autocast.off(query.device.type):
            return varlen_attention_reference(*arguments)[0]
    return torch.ops.fastgan.varlen_attention(*arguments)[0]
