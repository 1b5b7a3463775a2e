"""Attention: softmax(query keyᵀ · scale + bias) value, with masks, grouped heads and dropout, in one operator.

    output, logsumexp = torch.ops.fastgan.attention(query, key, value, mask, bias, philox, dropout_p, is_causal, scale)

    query (B, H, L, E)   key (B, K, S, E)   value (B, K, S, V)   ->   output (B, H, L, V)   logsumexp (B, H, L)

K divides H; query head h reads key head h // (H / K). ``mask`` (bool, True takes part) and ``bias`` (added to the
scores; of query's dtype or float32) are four-dimensional, each size 1 or the scores' own, and both may be given:
joining them would make the (L, S) tensor that the kernel avoids. ``is_causal`` is torch's: the upper left corner, and
a mask applies as well. A row with nothing to attend to, all its scores −inf, gives zero output and zero gradients.

Dropout is a pure function of ``philox`` = (seed, offset), int64: row r, column c of head h of batch b is kept if word
c % 4 of Philox4x32-10(counter = (offset, b·H + h, r, c // 4), key = seed) is at least p · 2³², so that the mask is
recomputed and never stored. (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011.)

The weights themselves, before dropout, of each head (B, H, L, S) or averaged (B, L, S), are

    weights = torch.ops.fastgan.attention_weights(query, key, mask, bias, logsumexp, is_causal, scale, average)

computed tile by tile from the forward's logsumexp; where a loss uses them their derivative is the reference's.

Second order has operators of its own, tiled as well (the mathematics is in csrc/attention/attention_second_cpu.cpp):

    tangent_output = attention_jvp(...)                       forward mode
    tangent_output, *gradients = attention_double_backward()  the four gradients' derivative along a direction

The second is the vjp of attention_backward and, a Hessian being symmetric, its jvp. A direction has a tangent for each
of query, key, value and bias, or None. Third derivatives are those of the references.

logsumexp is that of the scores before dropout, −inf in a dead row; always float64: at scores of 100 a
float32 step is 1e-5, the relative error of every probability of the row. It has no derivative of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.ops import _attention_vmap
from fastgan.ops._autograd import define

_WORD = 0xFFFFFFFF


def draw_philox(device: torch.device) -> Tensor:
    """(seed, offset) of one call, from torch's generator of the device."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)


def philox4x32(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words in int64 tensors for each counter; the same bits as csrc/common/philox.h."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # int64 products wrap modulo 2⁶⁴, which keeps all the bits that the two halves are taken from
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def dropout_threshold(dropout_p: float) -> int:
    """A word below this is dropped; 2³² drops all."""
    return int(dropout_p * 4294967296.0)


def dropout_mask(philox: Tensor, batch: int, heads: int, rows: int, columns: int, dropout_p: float) -> Tensor:
    """What is kept, bool (batch, heads, rows, columns)."""

    def index(n: int, *shape: int) -> Tensor:
        return torch.arange(n, device=philox.device, dtype=torch.int64).view(shape)

    fours = (columns + 3) // 4
    words = philox4x32(
        philox[0],
        philox[1] & _WORD,
        index(batch * heads, -1, 1, 1),
        index(rows, 1, -1, 1),
        index(fours, 1, 1, -1),
    )
    interleaved = torch.stack([w.expand(batch * heads, rows, fours) for w in words], dim=-1)
    kept = interleaved.reshape(batch, heads, rows, fours * 4)[..., :columns] >= dropout_threshold(dropout_p)
    return kept


def _kept_scale(dropout_p: float) -> float:
    return 0.0 if dropout_p >= 1.0 else 1.0 / (1.0 - dropout_p)


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _heads_inside(like: Tensor) -> bool:
    # (B, L, H, E) in memory, as a projection split into heads leaves it: the result goes back the same way, uncopied.
    return 0 < like.stride(1) < like.stride(2)


def _in_layout_of(tensor: Tensor, like: Tensor) -> Tensor:
    if _heads_inside(like):
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor.contiguous()


def _empty_like(like: Tensor, width: int) -> Tensor:
    batch, heads, rows, _ = like.shape
    if _heads_inside(like):
        return like.new_empty((batch, rows, heads, width)).transpose(1, 2)
    return like.new_empty((batch, heads, rows, width))


def _probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax of the scores in the accumulation dtype, (B, H, L, S), and their log-sum-exp, (B, H, L)."""
    heads, rows, kv_heads, columns = query.shape[1], query.shape[2], key.shape[1], key.shape[2]
    dtype = _accumulate_dtype(query.dtype)
    grouped = query.to(dtype).reshape(query.shape[0], kv_heads, heads // max(kv_heads, 1), rows, query.shape[3])
    scores = (grouped @ key.to(dtype).unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * scale
    if bias is not None:
        scores = scores + bias.to(dtype)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if is_causal:
        below = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~below, float("-inf"))
    if columns == 0:
        return scores, scores.new_full(scores.shape[:-1], float("-inf"), dtype=torch.float64)
    # softmax does not depend on what is subtracted, so that this is a constant in every derivative. Minus infinity
    # is not subtracted: −inf − (−inf) is NaN, and a row of it is dead, not undefined.
    maximum = scores.detach().amax(-1, keepdim=True)
    maximum = maximum.masked_fill(maximum == float("-inf"), 0.0)
    weights = torch.exp(scores - maximum)
    total = weights.sum(-1, keepdim=True)
    dead = total == 0
    live = total.masked_fill(dead, 1.0)
    logsumexp = (torch.log(live.double()) + maximum.double()).masked_fill(dead, float("-inf")).squeeze(-1)
    return weights / live, logsumexp


def _tangent_probabilities(weights, query, key, tangent_query, tangent_key, tangent_bias, scale: float) -> Tensor:
    """The derivative of ``weights``, softmax(query keyᵀ · scale + bias), along the tangents; each may be None."""
    dtype = weights.dtype
    tangent = torch.zeros_like(weights)
    for q, k in ((tangent_query, key), (query, tangent_key)):
        if q is not None and k is not None:
            tangent = tangent + _times_value(q.to(dtype), k.transpose(-1, -2)) * scale
    if tangent_bias is not None:
        tangent = tangent + tangent_bias.to(dtype)
    return weights * (tangent - (weights * tangent).sum(-1, keepdim=True))


def _times_value(weights: Tensor, value: Tensor) -> Tensor:
    kv_heads = value.shape[1]
    grouped = weights.unflatten(1, (kv_heads, weights.shape[1] // kv_heads)) if kv_heads else weights.unsqueeze(2)
    return (grouped @ value.to(weights.dtype).unsqueeze(2)).flatten(1, 2)


def _dropped(philox: Tensor | None, dropout_p: float, tensor: Tensor) -> Tensor:
    if philox is None:
        return tensor
    batch, heads, rows, columns = tensor.shape
    kept = dropout_mask(philox, batch, heads, rows, columns, dropout_p)
    return (tensor * _kept_scale(dropout_p)).masked_fill(~kept, 0.0)


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    philox: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The operator in plain PyTorch, the (B, H, L, S) matrix stored: slow, obvious, differentiable to any order."""
    weights, logsumexp = _probabilities(query, key, mask, bias, is_causal, scale)
    output = _times_value(_dropped(philox, dropout_p, weights), value).to(query.dtype)
    return _in_layout_of(output, query), logsumexp.detach()


def attention_backward_reference(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    philox: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias; the last summed over broadcast dimensions, or empty if not asked for.

    ``output`` and ``logsumexp`` are not looked at: they depend on the inputs, and a second derivative must see that.
    """
    weights, _ = _probabilities(query, key, mask, bias, is_causal, scale)
    heads, kv_heads = query.shape[1], key.shape[1]
    groups = heads // max(kv_heads, 1)
    dtype = weights.dtype
    grad = grad_output.to(dtype)

    def sum_groups(tensor: Tensor) -> Tensor:
        return tensor.reshape(tensor.shape[0], kv_heads, groups, *tensor.shape[2:]).sum(2)

    grad_weights = _dropped(philox, dropout_p, _times_value(grad, value.transpose(-1, -2)))
    grad_value = sum_groups(_dropped(philox, dropout_p, weights).transpose(-1, -2) @ grad)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    grad_query = _times_value(grad_scores, key) * scale
    grad_key = sum_groups(grad_scores.transpose(-1, -2) @ query.to(dtype)) * scale
    if bias is not None and bias_gradient:
        grad_bias = grad_scores.sum_to_size(bias.shape).to(bias.dtype).contiguous()
    else:
        grad_bias = query.new_empty((0,))
    return (
        _in_layout_of(grad_query.to(query.dtype), query),
        _in_layout_of(grad_key.to(key.dtype), key),
        _in_layout_of(grad_value.to(value.dtype), value),
        grad_bias,
    )


def attention_weights_reference(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    logsumexp: Tensor,
    is_causal: bool,
    scale: float,
    average: bool,
) -> Tensor:
    """The softmax's weights, (B, H, L, S), or their mean over the heads, (B, L, S). ``logsumexp`` is not looked at."""
    weights, _ = _probabilities(query, key, mask, bias, is_causal, scale)
    return (weights.mean(1) if average else weights).to(query.dtype).contiguous()


def attention_jvp_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    philox: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    tangent_query: Tensor | None,
    tangent_key: Tensor | None,
    tangent_value: Tensor | None,
    tangent_bias: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """The derivative of output along the tangents. ``output`` and ``logsumexp`` are not looked at."""
    weights, _ = _probabilities(query, key, mask, bias, is_causal, scale)
    moved = _tangent_probabilities(weights, query, key, tangent_query, tangent_key, tangent_bias, scale)
    tangent = _times_value(_dropped(philox, dropout_p, moved), value)
    if tangent_value is not None:
        tangent = tangent + _times_value(_dropped(philox, dropout_p, weights), tangent_value)
    return _in_layout_of(tangent.to(query.dtype), query)


def attention_double_backward_reference(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    philox: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    tangent_query: Tensor | None,
    tangent_key: Tensor | None,
    tangent_value: Tensor | None,
    tangent_bias: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The derivatives of output and of the four gradients (for a constant grad_output) along the tangents."""
    weights, _ = _probabilities(query, key, mask, bias, is_causal, scale)
    moved = _tangent_probabilities(weights, query, key, tangent_query, tangent_key, tangent_bias, scale)
    heads, kv_heads, dtype = query.shape[1], key.shape[1], weights.dtype
    groups = heads // max(kv_heads, 1)
    grad = grad_output.to(dtype)

    def sum_groups(tensor: Tensor) -> Tensor:
        return tensor.reshape(tensor.shape[0], kv_heads, groups, *tensor.shape[2:]).sum(2)

    used, used_moved = _dropped(philox, dropout_p, weights), _dropped(philox, dropout_p, moved)
    grads = _dropped(philox, dropout_p, _times_value(grad, value.transpose(-1, -2)))
    centred = grads - (weights * grads).sum(-1, keepdim=True)
    grad_scores = weights * centred
    tangent_output = _times_value(used_moved, value)
    grads_moved = torch.zeros_like(grads)
    if tangent_value is not None:
        tangent_output = tangent_output + _times_value(used, tangent_value)
        grads_moved = _dropped(philox, dropout_p, _times_value(grad, tangent_value.transpose(-1, -2)))
    mean_moved = (moved * grads + weights * grads_moved).sum(-1, keepdim=True)
    scores_moved = moved * centred + weights * (grads_moved - mean_moved)
    grad_query = _times_value(scores_moved, key)
    if tangent_key is not None:
        grad_query = grad_query + _times_value(grad_scores, tangent_key)
    grad_key = scores_moved.transpose(-1, -2) @ query.to(dtype)
    if tangent_query is not None:
        grad_key = grad_key + grad_scores.transpose(-1, -2) @ tangent_query.to(dtype)
    grad_value = sum_groups(used_moved.transpose(-1, -2) @ grad)
    if bias is not None and bias_gradient:
        grad_bias = scores_moved.sum_to_size(bias.shape).to(bias.dtype).contiguous()
    else:
        grad_bias = query.new_empty((0,))
    return (
        _in_layout_of(tangent_output.to(query.dtype), query),
        _in_layout_of((grad_query * scale).to(query.dtype), query),
        _in_layout_of((sum_groups(grad_key) * scale).to(key.dtype), key),
        _in_layout_of(grad_value.to(value.dtype), value),
        grad_bias,
    )


def _fake(query, key, value, mask, bias, philox, dropout_p, is_causal, scale):
    logsumexp = query.new_empty(query.shape[:3], dtype=torch.float64)
    return _empty_like(query, value.shape[3]), logsumexp


def _fake_backward(
    grad_output, query, key, value, mask, bias, philox, output, logsumexp, dropout_p, is_causal, scale, bias_gradient
):
    if bias is not None and bias_gradient:
        grad_bias = bias.new_empty(bias.shape)
    else:
        grad_bias = query.new_empty((0,))
    return (
        _empty_like(query, query.shape[3]),
        _empty_like(key, key.shape[3]),
        _empty_like(value, value.shape[3]),
        grad_bias,
    )


def _fake_weights(query, key, mask, bias, logsumexp, is_causal, scale, average):
    batch, heads, rows, _ = query.shape
    return query.new_empty((batch, rows, key.shape[2]) if average else (batch, heads, rows, key.shape[2]))


def _fake_jvp(query, key, value, *rest):
    return _empty_like(query, value.shape[3])


def _fake_double_backward(grad_output, query, key, value, mask, bias, philox, output, logsumexp, *rest):
    *_, bias_gradient = rest
    gradients = _fake_backward(
        grad_output, query, key, value, mask, bias, philox, output, logsumexp, *(None,) * 3, bias_gradient
    )
    return (_empty_like(query, value.shape[3]), *gradients)


def _backward(args, saved, grads, needs):
    query, key, value, mask, bias, philox, dropout_p, is_causal, scale = args
    output, logsumexp = saved
    if grads[0] is None:
        return (None,) * len(args)
    # Constants for the operator: its derivative by them is zero by construction, and not worth an attention backward.
    output, logsumexp = output.detach(), logsumexp.detach()
    grad_query, grad_key, grad_value, grad_bias = torch.ops.fastgan.attention_backward(
        grads[0], query, key, value, mask, bias, philox, output, logsumexp, dropout_p, is_causal, scale, needs[4]
    )
    return (
        grad_query if needs[0] else None,
        grad_key if needs[1] else None,
        grad_value if needs[2] else None,
        None,
        grad_bias if needs[4] else None,
        None,
        None,
        None,
        None,
    )


def _jvp(args, saved, tangents):
    query, key, value, mask, bias, philox, dropout_p, is_causal, scale = args
    output, logsumexp = (t.detach() for t in saved)
    tangent = torch.ops.fastgan.attention_jvp(
        query,
        key,
        value,
        mask,
        bias,
        philox,
        output,
        logsumexp,
        *tangents[:3],
        tangents[4],
        dropout_p,
        is_causal,
        scale,
    )
    return tangent, None


def _along(args, tangents, bias_gradient):
    """The derivatives of output and of the gradients, along the tangents of query, key, value and bias."""
    *tensors, dropout_p, is_causal, scale, _ = args
    return torch.ops.fastgan.attention_double_backward(*tensors, *tangents, dropout_p, is_causal, scale, bias_gradient)


def _double_backward(args, saved, grads, needs):
    bias = args[5]
    tangents = (*grads[:3], grads[3] if bias is not None and args[-1] else None)
    out = [None] * len(args)
    if all(t is None for t in tangents):
        return tuple(out)
    output, *gradients = _along(args, tangents, needs[5])
    for i, gradient in zip((0, 1, 2, 3, 5), (output, *gradients), strict=True):
        out[i] = gradient if needs[i] else None
    return tuple(out)


def _backward_jvp(args, saved, tangents):
    along = (*tangents[1:4], tangents[5])
    parts = []
    if tangents[0] is not None:
        parts.append(torch.ops.fastgan.attention_backward(tangents[0], *args[1:]))
    if any(t is not None for t in along):
        parts.append(_along(args, along, args[-1])[1:])
    return tuple(sum(each[1:], each[0]) for each in zip(*parts, strict=True))


define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? philox, float dropout_p,"
    " bool is_causal, float scale) -> (Tensor output, Tensor logsumexp)",
    reference=attention_reference,
    fake=_fake,
    backward=_backward,
    jvp=_jvp,
    save_outputs=(0, 1),
    nondifferentiable_outputs=(1,),
    vmap=_attention_vmap.forward,
    autocast="lower",
)
define(
    "attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias,"
    " Tensor? philox, Tensor output, Tensor logsumexp, float dropout_p, bool is_causal, float scale,"
    " bool bias_gradient) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)",
    reference=attention_backward_reference,
    fake=_fake_backward,
    backward=_double_backward,
    jvp=_backward_jvp,
    vmap=_attention_vmap.backward,
)
define(
    "attention_weights(Tensor query, Tensor key, Tensor? mask, Tensor? bias, Tensor logsumexp, bool is_causal,"
    " float scale, bool average) -> Tensor weights",
    reference=attention_weights_reference,
    fake=_fake_weights,
    autocast="lower",
)
_DIRECTION = "Tensor? tangent_query, Tensor? tangent_key, Tensor? tangent_value, Tensor? tangent_bias"
define(
    "attention_jvp(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? philox, Tensor output,"
    f" Tensor logsumexp, {_DIRECTION}, float dropout_p, bool is_causal, float scale) -> Tensor tangent_output",
    reference=attention_jvp_reference,
    fake=_fake_jvp,
    vmap=_attention_vmap.jvp,
)
define(
    "attention_double_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias,"
    f" Tensor? philox, Tensor output, Tensor logsumexp, {_DIRECTION}, float dropout_p, bool is_causal, float scale,"
    " bool bias_gradient) -> (Tensor tangent_output, Tensor grad_query, Tensor grad_key, Tensor grad_value,"
    " Tensor grad_bias)",
    reference=attention_double_backward_reference,
    fake=_fake_double_backward,
    vmap=_attention_vmap.double_backward,
)
