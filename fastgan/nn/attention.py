"""Multi-head attention on the fused kernel, in the place of ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.nn import functional
from fastgan.nn._functional import attention


class MultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762) whose scores are never stored.

    Takes the arguments of ``torch.nn.MultiheadAttention``, has its parameters and state dict, and computes what that
    computes, in training and in evaluation by the same path. Where torch's own paths disagree, one rule holds:

    - ``need_weights`` never changes the output. It costs a second, shorter pass: averaged weights are summed over the
      heads tile by tile, those of all heads are never stored unless ``average_attn_weights=False`` asks for them. They
      are the softmax's, before dropout. Only a loss that uses them stores all heads' weights, in its backward.
    - A query with nothing to attend to has a zero attention output (so the layer returns the output projection's bias),
      zero weights and zero gradients.
    - ``is_causal=True`` is causal in every combination: alone, with a padding mask, with weights. An ``attn_mask``
      given beside it is applied as well. The diagonal starts at the upper left corner; what ``add_bias_kv`` and
      ``add_zero_attn`` append is seen by every query.
    - Boolean and float masks may be mixed.

    The whole-layer inference path of ``nn.TransformerEncoderLayer``, which would pass this module by, is not taken.
    Nested tensors go to torch's own implementation.

    Shapes: query ``(L, N, E)``, key ``(S, N, kdim)``, value ``(S, N, vdim)``; the batch first with
    ``batch_first=True``; or without a batch, ``(L, E)``, ``(S, kdim)``, ``(S, vdim)``. Output as query, weights
    ``(N, L, S)`` or, with ``average_attn_weights=False``, ``(N, num_heads, L, S)``. ``key_padding_mask`` is ``(N, S)``,
    ``attn_mask`` ``(L, S)`` or ``(N * num_heads, L, S)``; True forbids, a float is added to the scores.

    Raises, as torch does, AssertionError for wrong ranks, mask dtypes and embedding sizes, RuntimeError for a mask
    or a batch of another size.
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # nn.TransformerEncoderLayer and nn.TransformerEncoder ask this before they take their inference path, which
        # reads the weights and never calls this module: other numbers, and no hooks. So the answer is no, except to
        # torch's constructor, which makes out_proj after it has asked. Nothing else in this class asks.
        return "out_proj" not in self._modules and self.__dict__["_qkv_same_embed_dim"]

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = value  # where torch's own class, which has no property, finds it

    def _plain(self) -> nn.MultiheadAttention:
        """This module's state seen through torch's class."""
        plain = nn.MultiheadAttention.__new__(nn.MultiheadAttention)
        plain.__dict__ = self.__dict__
        return plain

    def _reset_parameters(self) -> None:
        nn.MultiheadAttention._reset_parameters(self._plain())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """``(output, weights or None)``; see the class."""
        if query.is_nested or key.is_nested or value.is_nested:
            forward = self._plain().forward
            return forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = self._check(query, key, value, key_padding_mask, attn_mask)

        # (batch and length in the caller's order, heads, head_dim) -> (N, heads, length, head_dim), without a copy
        q, k, v = (self._split_heads(x, batched) for x in self._project(query, key, value))
        batch, heads, length, _ = q.shape
        mask = _join_masks(attn_mask, key_padding_mask, (batch, heads, length, k.shape[2]), q.dtype)
        k, v, mask, is_causal = self._append(k, v, mask, is_causal, length)

        dropout = self.dropout if self.training else 0.0
        found = None
        if need_weights:
            found = attention._attention_and_weights(q, k, v, mask, dropout, is_causal, average_attn_weights)
        out, weights = found or (functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal), None)

        out = out.transpose(1, 2)  # (N, L, heads, head_dim)
        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        out = F.linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        if not need_weights:
            return out, None

        if weights is None:  # where no kernel is
            weights = _attention_weights(q, k, mask, is_causal)
            if average_attn_weights:
                weights = weights.mean(1)
        return out, weights if batched else weights.squeeze(0)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
            return q, k, v
        if query is key and key is value:
            q, k, v = F.linear(query, weight, bias).chunk(3, -1)
            return q, k, v
        rows = [self.embed_dim, 2 * self.embed_dim]
        if key is value:
            (w_q, w_kv), (b_q, b_kv) = weight.split(rows), (None, None) if bias is None else bias.split(rows)
            k, v = F.linear(key, w_kv, b_kv).chunk(2, -1)
            return F.linear(query, w_q, b_q), k, v
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True))
        return q, k, v

    def _split_heads(self, x: Tensor, batched: bool) -> Tensor:
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.transpose(1, 2)

    def _append(
        self, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, length: int
    ) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """The learned key and value of ``add_bias_kv``, then the zeros of ``add_zero_attn``, open to every query."""
        batch, heads, size, _ = k.shape
        if self.bias_k is not None and self.bias_v is not None:
            bias_k, bias_v = (
                b.to(k.dtype).view(1, heads, 1, self.head_dim).expand(batch, -1, -1, -1)
                for b in (self.bias_k, self.bias_v)
            )
            k, v = torch.cat([k, bias_k], 2), torch.cat([v, bias_v], 2)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        extra = k.shape[2] - size
        if extra and is_causal:
            # The kernel's own diagonal would hide the appended columns from the first rows.
            future = torch.ones(length, size, dtype=torch.bool, device=k.device).triu(1)
            if mask is None or mask.dtype == torch.bool:
                mask = ~future if mask is None else mask & ~future
            else:
                mask = mask.masked_fill(future, float("-inf"))
            is_causal = False
        if extra and mask is not None:
            mask = F.pad(mask, (0, extra), value=mask.dtype == torch.bool)
        return k, v, mask, is_causal

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> bool:
        """True if the inputs have a batch dimension; raises what torch raises where they do not fit together."""
        rank = query.dim()
        if rank not in (2, 3):
            raise AssertionError(f"query must be 3-D, or 2-D without a batch; got shape {tuple(query.shape)}")
        for name, x, size in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x.dim() != rank:
                raise AssertionError(f"{name} must be {rank}-D as query is; got shape {tuple(x.shape)}")
            if x.shape[-1] != size:
                raise AssertionError(f"{name}'s last dimension must be {size}; got shape {tuple(x.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(
                f"key and value must have the same length and batch; got shapes {tuple(key.shape)} and "
                f"{tuple(value.shape)}"
            )
        at = 0 if self.batch_first else 1
        batch = query.shape[at] if rank == 3 else 1
        if rank == 3 and key.shape[at] != batch:
            raise RuntimeError(
                f"key's batch must be query's; got shapes {tuple(key.shape)} and {tuple(query.shape)} "
                f"(batch_first={self.batch_first})"
            )
        length, size = (x.shape[1 - at] if rank == 3 else x.shape[0] for x in (query, key))
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None and not isinstance(mask, Tensor):
                raise TypeError(f"{name} must be a Tensor or None, got {type(mask).__name__}")
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise AssertionError(f"{name} must be boolean or floating point; got {mask.dtype}")
        if key_padding_mask is not None:
            expected: tuple[int, ...] = (batch, size) if rank == 3 else (size,)
            if key_padding_mask.shape != expected:
                raise AssertionError(
                    f"key_padding_mask must have shape {expected}; got {tuple(key_padding_mask.shape)}"
                )
        if attn_mask is not None:
            if attn_mask.dim() not in (2, 3):
                raise AssertionError(f"attn_mask must be 2-D or 3-D; got shape {tuple(attn_mask.shape)}")
            expected = (length, size) if attn_mask.dim() == 2 else (batch * self.num_heads, length, size)
            if attn_mask.shape != expected:
                raise RuntimeError(f"attn_mask must have shape {expected}; got {tuple(attn_mask.shape)}")
        return rank == 3


def _join_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> Tensor | None:
    """One mask that broadcasts to ``shape`` (N, heads, L, S): boolean (True attends) if both are, else additive."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.reshape(shape))
    if key_padding_mask is not None:
        masks.append(key_padding_mask.reshape(shape[0], 1, 1, shape[3]))
    allowed: Tensor | None = None
    bias: Tensor | None = None
    for mask in masks:
        if mask.dtype == torch.bool:
            allowed = ~mask if allowed is None else allowed & ~mask
        else:
            bias = mask.to(dtype) if bias is None else bias + mask.to(dtype)
    if bias is None or allowed is None:
        return allowed if bias is None else bias
    return torch.where(allowed, bias, float("-inf"))


def _attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """softmax(q kᵀ / sqrt(head_dim) + mask), (N, heads, L, S), zero in a row with nothing to attend to."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (N, H, L, D) @ (N, H, D, S) -> (N, H, L, S)
    if mask is not None:
        scores = scores + mask if mask.dtype != torch.bool else scores.masked_fill(~mask, float("-inf"))
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    # −inf in all of a row, not "no maximum found": a NaN must stay one
    dead = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
