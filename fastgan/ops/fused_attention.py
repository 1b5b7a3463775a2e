"""PyTorch's fused attention on a GPU, made differentiable a second time.

    output, logsumexp = torch.ops.fastgan.fused_attention(query, key, value, is_causal, scale)

(B, H, L, E), (B, H, S, E) twice -> (B, H, L, E) and (B, H, L), float64, as ``torch.ops.fastgan.attention`` has them.
Plain attention of half precision is what cuDNN and FlashAttention are best at: on an H200 cuDNN takes half of the time
of our kernels. They refuse to be differentiated twice. But they leave the same two tensors as ours do, output and
log-sum-exp, and each kernel goes on from those, whoever made them: so the first derivative is PyTorch's, and the second
is ``attention_double_backward``.

Which kernel it is, cuDNN's, FlashAttention's or ours, PyTorch's own choice for the call decides. Before one of theirs
is used for a dtype and a width, its results are compared with ours on a small input; if they differ or it raises, one
warning says so, and ours stay. Theirs may add up gradients by atomics: ``torch.use_deterministic_algorithms(True)``
leaves them out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from fastgan import _impl
from fastgan.ops._autograd import LIBRARY, define
from fastgan.ops.attention import _empty_like, _in_layout_of, attention_backward_reference, attention_reference

_aten = torch.ops.aten
_ours = torch.ops.fastgan

Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Kernel:
    """One of PyTorch's: attention without mask and dropout. ``logsumexp`` is (B, H, L), float32."""

    name: str
    #: query, key, value, is_causal, scale -> output, logsumexp
    forward: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
    #: grad_output, query, key, value, output, logsumexp, is_causal, scale -> the three gradients
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], Triple]


def _flash_forward(query, key, value, is_causal, scale):
    return _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, scale=scale)[:2]


def _flash_backward(grad, query, key, value, output, logsumexp, is_causal, scale):
    state = query.new_empty(2, dtype=torch.uint64), query.new_empty((), dtype=torch.uint64)  # of dropout
    return _aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, output, logsumexp, None, None, query.shape[2], key.shape[2], 0.0, is_causal, *state,
        scale=scale,
    )  # fmt: skip


def _cudnn_forward(query, key, value, is_causal, scale):
    output, logsumexp, *_ = _aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, is_causal, False, scale=scale
    )
    return output, logsumexp.view(query.shape[:3])


def _cudnn_backward(grad, query, key, value, output, logsumexp, is_causal, scale):
    state = query.new_empty((), dtype=torch.int64)  # of dropout
    return _aten._scaled_dot_product_cudnn_attention_backward(
        grad, query, key, value, output, logsumexp.unsqueeze(-1), state, state, None, None, None, query.shape[2],
        key.shape[2], 0.0, is_causal, scale=scale,
    )  # fmt: skip


#: by the type of device and PyTorch's number of the backend
KERNELS: dict[tuple[str, int], Kernel] = {
    ("cuda", SDPBackend.FLASH_ATTENTION.value): Kernel("FlashAttention", _flash_forward, _flash_backward),
    ("cuda", SDPBackend.CUDNN_ATTENTION.value): Kernel("cuDNN", _cudnn_forward, _cudnn_backward),
}
#: whether a kernel may be used, for a device, a dtype, a width and is_causal that it was tried with
_trusted: dict[tuple[object, ...], bool] = {}


def _kernel_for(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> Kernel | None:
    """PyTorch's own choice, if that is one of ``KERNELS`` and can be trusted."""
    with torch.enable_grad():  # in the backward too: a choice that has one
        choice = int(torch._fused_sdp_choice(query, key, value, None, 0.0, is_causal, scale=scale))
    kernel = KERNELS.get((query.device.type, choice))
    if kernel is None:
        return None
    case = kernel.name, query.device, query.dtype, query.shape[3], is_causal
    if case not in _trusted:
        if query.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # comparing would read numbers
        _trusted[case] = _agrees(kernel, query, is_causal)
    return kernel if _trusted[case] else None


def _agrees(kernel: Kernel, like: Tensor, is_causal: bool) -> bool:
    """Whether its results, for a small input, are ours to half precision; says so where not."""
    width, rows = like.shape[3], 72
    generator = torch.Generator(like.device).manual_seed(0)
    query, key, value, grad = (
        torch.randn(1, rows, 2, width, device=like.device, dtype=torch.float32, generator=generator)
        .to(like.dtype)
        .transpose(1, 2)
        for _ in range(4)
    )
    settings = is_causal, width**-0.5
    own = _ours.attention(query, key, value, None, None, None, 0.0, *settings)
    own_gradients = _ours.attention_backward(
        grad, query, key, value, None, None, None, *own, 0.0, *settings, False
    )[:3]  # fmt: skip
    try:
        output, logsumexp = kernel.forward(query, key, value, *settings)
        gradients = kernel.backward(grad, query, key, value, output, logsumexp, *settings)
        pairs = zip((output, logsumexp, *gradients), (*own, *own_gradients), strict=True)
        # 8 bits of bfloat16; a row's log-sum-exp in another base, or with another scale, would be off by a third
        off = max(((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs)
        reason = None if off < 2e-2 else f"its results are off by {off:.2g}"
    except (RuntimeError, TypeError) as error:
        reason = str(error).split("\n", 1)[0][:200]
    if reason is not None:
        warnings.warn(f"attention does not use {kernel.name}, which is faster: {reason}", RuntimeWarning, stacklevel=2)
    return reason is None


def _forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    kernel = _kernel_for(query, key, value, is_causal, scale)
    if kernel is None:
        return _ours.attention(query, key, value, None, None, None, 0.0, is_causal, scale)
    output, logsumexp = kernel.forward(query, key, value, is_causal, scale)
    return _in_layout_of(output, query), logsumexp.contiguous().double()


def _backward_kernel(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    scale: float,
) -> Triple:
    kernel = _kernel_for(query, key, value, is_causal, scale)
    if kernel is None:
        return _ours.attention_backward(
            grad_output, query, key, value, None, None, None, output, logsumexp, 0.0, is_causal, scale, False
        )[:3]  # fmt: skip
    logsumexp = logsumexp.to(torch.promote_types(query.dtype, torch.float32))
    gradients = kernel.backward(grad_output, query, key, value, output, logsumexp, is_causal, scale)
    query_, key_, value_ = (
        _in_layout_of(gradient, like) for gradient, like in zip(gradients, (query, key, value), strict=True)
    )
    return query_, key_, value_


# ---- the operators ----


def _reference(query, key, value, is_causal, scale):
    return attention_reference(query, key, value, None, None, None, 0.0, is_causal, scale)


def _backward_reference(grad_output, query, key, value, output, logsumexp, is_causal, scale):
    return attention_backward_reference(
        grad_output, query, key, value, None, None, None, output, logsumexp, 0.0, is_causal, scale, False
    )[:3]  # fmt: skip


def _fake(query, key, value, is_causal, scale):
    return _empty_like(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=torch.float64)


def _fake_backward(grad_output, query, key, value, *_):
    return tuple(_empty_like(each, each.shape[3]) for each in (query, key, value))


def _backward(args, saved, grads, needs):
    query, key, value, is_causal, scale = args
    output, logsumexp = (t.detach() for t in saved)  # constants, as in ops/attention.py
    if grads[0] is None:
        return (None,) * len(args)
    gradients = _ours.fused_attention_backward(
        grads[0], query, key, value, output, logsumexp, is_causal, scale
    )  # fmt: skip
    return *(g if need else None for g, need in zip(gradients, needs[:3], strict=True)), None, None


def _double_backward(args, saved, grads, needs):
    grad_output, query, key, value, output, logsumexp, is_causal, scale = args
    if all(t is None for t in grads):
        return (None,) * len(args)
    moved, *gradients, _ = _ours.attention_double_backward(
        grad_output, query, key, value, None, None, None, output, logsumexp, *grads, None, 0.0, is_causal, scale, False
    )
    return *(g if need else None for g, need in zip((moved, *gradients), needs[:4], strict=True)), *(None,) * 4


define(
    "fused_attention(Tensor query, Tensor key, Tensor value, bool is_causal, float scale)"
    " -> (Tensor output, Tensor logsumexp)",
    reference=_reference,
    fake=_fake,
    backward=_backward,
    save_outputs=(0, 1),
    nondifferentiable_outputs=(1,),
    autocast="lower",
)
define(
    "fused_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output,"
    " Tensor logsumexp, bool is_causal, float scale) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    reference=_backward_reference,
    fake=_fake_backward,
    backward=_double_backward,
)
for _device in ("CPU", "CUDA") if _impl.extension_error is None else ():
    LIBRARY.impl("fused_attention", _forward, _device)
    LIBRARY.impl("fused_attention_backward", _backward_kernel, _device)
