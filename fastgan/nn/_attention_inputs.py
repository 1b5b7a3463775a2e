"""What scaled_dot_product_attention accepts, and how its tensors become the operator's four-dimensional ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastgan.ops import attention_precision
from fastgan.ops._autograd import in_functorch

_KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: the widest head that the CUDA kernels take, by its dtype
_WIDEST_ON_CUDA = {torch.float64: 128}
_HAS_AMX = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
#: from this many query rows on, attention of bfloat16 goes through AMX's tiles (csrc/attention/attention_amx.cpp)
_FEWEST_ROWS_OF_TILES = 8


def _shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())


def autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # as torch's autocast: float64 and what is not floating are left alone
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def check_types(query, key, value, attn_mask, dropout_p) -> None:
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


def check(query, key, value, attn_mask) -> None:
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


def has_kernel(query, key, value, attn_mask) -> bool:
    for tensor in (query, key, value, attn_mask):
        if tensor is not None and (tensor.is_nested or tensor.layout != torch.strided):
            return False
    if query.dtype not in _KERNEL_DTYPES:
        return False
    if query.device.type == "cuda":
        return _has_cuda_kernel("attention", query, value)
    return query.device.type in ("cpu", "meta")


def _has_cuda_kernel(operator, query, value) -> bool:
    widest = _WIDEST_ON_CUDA.get(query.dtype, 256)
    return max(query.shape[-1], value.shape[-1]) <= widest and attention_precision.has_kernel(operator, query)


def torch_takes(query, key, value, mask, bias, philox) -> bool:
    """Whether torch's fused kernel can do all that is asked of this call, on hardware that it uses best.

    That is a few rows of bfloat16 where the CPU has AMX, and half precision on a GPU (FlashAttention, cuDNN). Where
    gradients are wanted it is not: torch's refuses the second (``fused_takes``).
    """
    if query.device.type == "cpu":
        if query.dtype != torch.bfloat16 or not _HAS_AMX or query.shape[-2] >= _FEWEST_ROWS_OF_TILES:
            return False
    elif query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if philox is not None:
        return False
    if _gradients_wanted(query, key, value, bias) or query.shape[-1] != value.shape[-1]:
        return False
    return not _transformed()


def fused_takes(query, key, value, mask, bias, philox) -> bool:
    """Whether the operator is ``fused_attention``, torch's kernel with a second derivative of ours."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if mask is not None or bias is not None or philox is not None or not _gradients_wanted(query, key, value):
        return False
    width = query.shape[3]
    return (
        query.shape[:2] == key.shape[:2]
        and value.shape[3] == width
        and width % 8 == 0
        and width > 0
        and min(*query.shape[:3], key.shape[2]) > 0
        and not torch.are_deterministic_algorithms_enabled()
        and not _transformed()
    )


def _gradients_wanted(*tensors) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _transformed() -> bool:
    """Whether this call is one of torch.func's or of forward mode."""
    return not torch.compiler.is_compiling() and (in_functorch() or forward_ad._current_level >= 0)


def fold(query, key, value, attn_mask, enable_gqa):
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
    lead, k_shape, v_shape = list(query.shape[:-2]), key.shape, value.shape
    if len(lead) == 2 and len(k_shape) == len(v_shape) == 4 and lead == list(k_shape[:2]) == list(v_shape[:2]):
        # What models pass: nothing to fold or to broadcast, and a short call's time is spent here.
        if attn_mask is not None:
            attn_mask = _fold_mask_to_4d(attn_mask, lead, lead[:1], lead[1], True, query.shape[-2], k_shape[-2])
        return lead, (query, key, value, attn_mask)
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


# ---- varlen_attention ----


def check_varlen_types(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size, dropout_p) -> None:
    tensors = {"query": query, "key": key, "value": value, "cu_seq_q": cu_seq_q, "cu_seq_k": cu_seq_k}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"varlen_attention: {name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.is_nested or tensor.layout != torch.strided:
            raise RuntimeError(f"varlen_attention: {name} must be a dense tensor, got layout {tensor.layout}")
    for name, length in (("max_q", max_q), ("max_k", max_k)):
        if not isinstance(length, (int, torch.SymInt)) or isinstance(length, bool):
            raise TypeError(f"varlen_attention: {name} must be an int, got {type(length).__name__}")
        if length < 0:
            raise RuntimeError(f"varlen_attention: {name} must not be negative, got {length}")
    if tuple(window_size) not in ((-1, -1), (-1, 0)):
        raise NotImplementedError(
            f"varlen_attention: window_size must be (-1, -1) or (-1, 0), which is causal, got {tuple(window_size)}"
        )
    if isinstance(dropout_p, (str, bytes)) or dropout_p is None:
        raise TypeError(f"varlen_attention: dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"varlen_attention: dropout_p must be between 0 and 1, got {dropout_p}")


def has_varlen_kernel(query, value) -> bool:
    if query.dtype not in _KERNEL_DTYPES or query.layout != torch.strided:
        return False
    if query.device.type == "cuda":
        return _has_cuda_kernel("varlen_attention", query, value)
    return query.device.type in ("cpu", "meta")


def check_varlen(query, key, value, cu_seq_q, cu_seq_k, enable_gqa) -> None:
    """Shapes, dtypes and devices; the numbers in the offsets are the kernel's to check."""
    given = {"query": query, "key": key, "value": value}
    if any(tensor.dim() != 3 for tensor in given.values()):
        raise RuntimeError(f"varlen_attention: query, key and value must have 3 dimensions, got {_shapes(**given)}")
    if not query.dtype == key.dtype == value.dtype or query.dtype not in _KERNEL_DTYPES:
        raise RuntimeError(
            "varlen_attention: query, key and value must have one dtype of float32, float64, bfloat16 and float16, got "
            f"query {query.dtype}, key {key.dtype}, value {value.dtype}"
        )
    if query.shape[2] != key.shape[2]:
        raise RuntimeError(
            f"varlen_attention: the last dimensions of query and key must be equal, got {_shapes(query=query, key=key)}"
        )
    if key.shape[:2] != value.shape[:2]:
        raise RuntimeError(
            f"varlen_attention: key and value must have equal rows and heads, got {_shapes(key=key, value=value)}"
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads != kv_heads and (not enable_gqa or kv_heads == 0 or heads % kv_heads != 0):
        wanted = "divide those of query" if enable_gqa else "be those of query (enable_gqa=True lets them divide those)"
        raise ValueError(
            f"varlen_attention: the heads of key and value must {wanted}, got {_shapes(query=query, key=key)}"
        )
    for name, offsets in (("cu_seq_q", cu_seq_q), ("cu_seq_k", cu_seq_k)):
        if offsets.dtype not in (torch.int32, torch.int64) or offsets.dim() != 1 or offsets.shape[0] == 0:
            raise RuntimeError(
                f"varlen_attention: {name} must be int32 or int64, of shape (sequences + 1,), "
                f"got {offsets.dtype} {tuple(offsets.shape)}"
            )
    if cu_seq_q.shape != cu_seq_k.shape:
        raise RuntimeError(
            "varlen_attention: cu_seq_q and cu_seq_k must be of equal length, got "
            + _shapes(cu_seq_q=cu_seq_q, cu_seq_k=cu_seq_k)
        )
    devices = {"query": query, "key": key, "value": value, "cu_seq_q": cu_seq_q, "cu_seq_k": cu_seq_k}
    if any(tensor.device != query.device for tensor in devices.values()):
        found = ", ".join(f"{name} {tensor.device}" for name, tensor in devices.items())
        raise RuntimeError(f"varlen_attention: all tensors must be on one device, got {found}")
