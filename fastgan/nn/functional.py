"""The public functions, with torch's own names and signatures.

What a caller can get wrong is refused here, by shapes and dtypes alone so that ``torch.compile`` traces through.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgan import _impl
from fastgan.ops.attention import attention_reference

_KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# ---- attention ----


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
    backward recomputes the tiles. Sparse, nested and complex tensors, and devices without a kernel, go to torch's own.
    """
    _check_attention_types(query, key, value, attn_mask, dropout_p)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        lower = torch.get_autocast_dtype(device)
        query, key, value, attn_mask = (_autocast(t, lower) for t in (query, key, value, attn_mask))
    _check_attention(query, key, value, attn_mask)
    if not _attention_has_kernel(query, key, value, attn_mask):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    lead, (q4, k4, v4, mask4) = _fold_attention(query, key, value, attn_mask, enable_gqa)
    if scale is None:
        width = query.shape[-1]
        scale = 1.0 / math.sqrt(width) if width > 0 else 1.0
    philox = None
    if dropout_p > 0.0:
        philox = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=query.device)
    mask, bias = (mask4, None) if mask4 is None or mask4.dtype == torch.bool else (None, mask4)
    arguments = (q4, k4, v4, mask, bias, philox, float(dropout_p), bool(is_causal), float(scale))
    if _impl.reference_selected():
        with torch.autocast(device, enabled=False):
            output, _ = attention_reference(*arguments)
    else:
        output, _ = torch.ops.fastgan.attention(*arguments)
    return output.reshape(*lead, query.shape[-2], value.shape[-1])


def _shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())


def _autocast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # as torch's autocast: float64 and what is not floating are left alone
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def _check_attention_types(query, key, value, attn_mask, dropout_p) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"scaled_dot_product_attention: {name} must be a Tensor, got {type(tensor).__name__}")
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        raise TypeError(
            f"scaled_dot_product_attention: attn_mask must be a Tensor or None, got {type(attn_mask).__name__}"
        )
    if isinstance(dropout_p, (str, bytes)) or dropout_p is None:
        raise TypeError(f"scaled_dot_product_attention: dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"scaled_dot_product_attention: dropout_p must be between 0 and 1, got {dropout_p}")


def _check_attention(query, key, value, attn_mask) -> None:
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise RuntimeError(
            "scaled_dot_product_attention: query, key and value must have at least 2 dimensions, got "
            + _shapes(query=query, key=key, value=value)
        )
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(
            "scaled_dot_product_attention: query, key and value must have one dtype, got "
            f"query {query.dtype}, key {key.dtype}, value {value.dtype}"
        )
    if not query.device == key.device == value.device or (attn_mask is not None and attn_mask.device != query.device):
        raise RuntimeError(
            "scaled_dot_product_attention: all tensors must be on one device, got "
            f"query {query.device}, key {key.device}, value {value.device}"
            + ("" if attn_mask is None else f", attn_mask {attn_mask.device}")
        )
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(
            f"scaled_dot_product_attention: attn_mask must be bool, float32 or query's {query.dtype}, "
            f"got {attn_mask.dtype}"
        )
    if not (query.is_floating_point() or query.is_complex()):
        raise RuntimeError(f"scaled_dot_product_attention: query must be of a floating dtype, got {query.dtype}")


def _attention_has_kernel(query, key, value, attn_mask) -> bool:
    for tensor in (query, key, value, attn_mask):
        if tensor is not None and (tensor.is_nested or tensor.layout != torch.strided):
            return False
    return query.device.type in ("cpu", "meta") and query.dtype in _KERNEL_DTYPES


def _fold_attention(query, key, value, attn_mask, enable_gqa):
    """Leading dimensions, and the four tensors as views of four dimensions where that is possible without a copy.

    (..., H, L, E) becomes (B, H, L, E). A broadcast batch is expanded, with stride 0; a key head that all query heads
    share is left as one, since the operator groups heads.
    """
    if query.shape[-1] != key.shape[-1]:
        raise RuntimeError(
            "scaled_dot_product_attention: the last dimensions of query and key must be equal, got "
            + _shapes(query=query, key=key)
        )
    if key.shape[-2] != value.shape[-2]:
        raise RuntimeError(
            "scaled_dot_product_attention: key and value must be of equal length (dimension -2), got "
            + _shapes(key=key, value=value)
        )
    if enable_gqa and min(query.dim(), key.dim(), value.dim()) < 3:
        raise IndexError(
            "scaled_dot_product_attention: enable_gqa needs a head dimension (-3), got "
            + _shapes(query=query, key=key, value=value)
        )
    ranked = max(query.dim(), key.dim(), value.dim()) >= 4 or enable_gqa
    leads = []
    for tensor in (query, key, value):
        lead = list(tensor.shape[:-2])
        # (N, L, E) is a batch of one head each: its result is contiguous, as torch's.
        leads.append(lead if ranked else [*lead, 1])
    heads = [lead[-1] if lead else 1 for lead in leads]
    try:
        batch = list(torch.broadcast_shapes(*[lead[:-1] for lead in leads]))
        head_count = heads[0] if enable_gqa else torch.broadcast_shapes(*[(h,) for h in heads])[0]
    except RuntimeError:
        raise RuntimeError(
            "scaled_dot_product_attention: the leading dimensions do not broadcast, got "
            + _shapes(query=query, key=key, value=value)
            + ("" if enable_gqa else "; enable_gqa=True lets the heads of key and value divide those of query")
        ) from None
    if enable_gqa and any((head_count % h if h else head_count) != 0 for h in heads[1:]):
        raise RuntimeError(
            "scaled_dot_product_attention: the number of heads (dimension -3) of key and value must divide "
            "that of query, got " + _shapes(query=query, key=key, value=value)
        )
    if heads[1] == heads[2] and heads[1] != 0:
        kv_heads = heads[1]
    else:
        kv_heads = head_count
    q4 = _fold_to_4d(query, leads[0], batch, head_count)
    k4 = _fold_to_4d(_repeat_heads(key, heads[1], kv_heads), leads[1], batch, kv_heads)
    v4 = _fold_to_4d(_repeat_heads(value, heads[2], kv_heads), leads[2], batch, kv_heads)
    full = [*batch, head_count] if ranked else batch
    mask4 = None
    if attn_mask is not None:
        mask4 = _fold_mask_to_4d(attn_mask, full, batch, head_count, ranked, query.shape[-2], key.shape[-2])
    return full, (q4, k4, v4, mask4)


def _repeat_heads(tensor: Tensor, heads: int, wanted: int) -> Tensor:
    if heads == wanted or heads <= 1:
        return tensor
    return tensor.repeat_interleave(wanted // heads, dim=-3)


def _fold_to_4d(tensor: Tensor, lead: list[int], batch: list[int], heads: int) -> Tensor:
    rows, width = tensor.shape[-2:]
    own = list(tensor.shape[:-2])
    if len(own) < len(lead):
        tensor = tensor.unsqueeze(-3)
    if tensor.dim() != 4 or list(tensor.shape[:-2]) != [*batch, heads]:
        tensor = tensor.expand(*batch, heads, rows, width)
    if len(batch) == 1:
        return tensor
    return tensor.unsqueeze(0) if not batch else tensor.flatten(0, len(batch) - 1)


def _fold_mask_to_4d(mask, full, batch, heads, ranked, rows, columns):
    wanted = [*full, rows, columns]
    shape = [1] * (len(wanted) - mask.dim()) + list(mask.shape)
    if len(shape) != len(wanted) or any(m not in (1, w) for m, w in zip(shape, wanted, strict=True)):
        raise RuntimeError(
            f"scaled_dot_product_attention: attn_mask must broadcast to the scores {tuple(wanted)}, "
            f"got {tuple(mask.shape)}"
        )
    mask = mask.reshape(shape)  # in front of its own dimensions: a view
    if not ranked:
        mask = mask.unsqueeze(-3)
    lead = list(mask.shape[:-3])
    if len(lead) == 1:
        return mask
    if all(n == 1 for n in lead):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*batch, *mask.shape[-3:]).flatten(0, len(batch) - 1)
