"""The public functions, with torch's own names and signatures.

What a caller can get wrong is refused here, by shapes and dtypes alone so that ``torch.compile`` traces through.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as _F
from torch import Tensor

from fastgan import _cuda, _impl
from fastgan.nn import _attention_inputs, _autocast, _gan_loss_inputs, _linear_cross_entropy_inputs
from fastgan.nn._inputs import Pair as _Pair
from fastgan.nn._inputs import check_tensors, number
from fastgan.nn._inputs import pair as _pair
from fastgan.ops import conv as _conv
from fastgan.ops import dropout as _dropout
from fastgan.ops import embedding as _embedding
from fastgan.ops import gan_loss as _gan_loss
from fastgan.ops import gelu as _gelu
from fastgan.ops import layer_norm as _layer_norm
from fastgan.ops import linear as _linear
from fastgan.ops import linear_cross_entropy as _linear_cross_entropy
from fastgan.ops import norm_act as _norm_act
from fastgan.ops._autograd import in_functorch, is_plain
from fastgan.ops.attention import attention_reference, attention_weights_reference, draw_philox
from fastgan.ops.attention_varlen import check_offsets, varlen_attention_reference

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
    backward recomputes the tiles. Sparse, nested and complex tensors, and devices without a kernel, go to torch's own;
    so does half precision without gradients and dropout on a GPU, and bfloat16 on a CPU that multiplies it in tiles
    (AMX).
    """
    found = _attention_arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if found is None or _attention_inputs.torch_takes(*found[1][:6]):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    lead, arguments = found
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


# ---- conv ----


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Pair = 1,
    padding: _Pair | str = 0,
    dilation: _Pair = 1,
    groups: int = 1,
) -> Tensor:
    """As ``torch.nn.functional.conv2d``: kernel 4 with stride 2 and kernel 3 with stride 1 by kernels of ours.

    On the CPU in float32, where the sizes make it pay; everything else is torch's own. ``fastgan/ops/conv.py`` says
    how exact it is, and ``fastgan.set_conv_algorithm("exact")`` turns it off.

    Args:
        input: (N, C, H, W) or (C, H, W); weight: (K, C / groups, R, S); bias: (K,) or None.
        stride, padding, dilation: one integer or two; padding also "valid" or "same".
        groups: divides C and K.

    Returns:
        (N, K, H', W'), or (K, H', W') for an unbatched input.

    Raises:
        RuntimeError: ranks, sizes, dtypes or devices that do not fit, or no output left.
        TypeError: an argument of another type.
    """
    return _conv2d(input, weight, bias, stride, padding, dilation, groups)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: _Pair,
    padding: _Pair | str,
    dilation: _Pair,
    groups: int,
    slope: float = 1.0,
) -> Tensor:
    """What is negative in the result is multiplied by ``slope``, for the modules that ``fold_norms`` makes."""
    check_tensors("bias", input=input, weight=weight, bias=bias)
    if _is_plain_convolution(input, weight, bias):
        _check_convolution_arguments(input, weight, bias, stride, dilation, groups)
        strides, dilations = _pair(stride, "stride"), _pair(dilation, "dilation")
        if not isinstance(padding, str):
            pads = _pair(padding, "padding")
            if min(pads) < 0:
                raise RuntimeError(f"padding must not be negative, got {padding}")
            size = _conv.output_size(input.shape[-2:], weight.shape[2:], strides, pads, dilations)
            if min(size) < 1:
                raise RuntimeError(
                    f"input of shape {tuple(input.shape)} is smaller than the kernel: weight of shape "
                    f"{tuple(weight.shape)} with stride={stride}, padding={padding}, dilation={dilation} leaves an "
                    f"output of {size[0]} x {size[1]}"
                )
            padding = pads
        stride, dilation = strides, dilations
    return _conv.convolution(input, weight, bias, stride, padding, dilation, groups, slope)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Pair = 1,
    padding: _Pair = 0,
    output_padding: _Pair = 0,
    groups: int = 1,
    dilation: _Pair = 1,
) -> Tensor:
    """As ``torch.nn.functional.conv_transpose2d``, by our kernels where ``conv2d`` would take them.

    Args:
        input: (N, C, H, W) or (C, H, W); weight: (C, K / groups, R, S); bias: (K,) or None.
        stride, padding, dilation: one integer or two. groups: divides C and K.
        output_padding: added to one side of the output; smaller than stride or dilation in each direction.

    Returns:
        (N, K, H', W'), or (K, H', W') for an unbatched input.

    Raises:
        RuntimeError: ranks, sizes, dtypes or devices that do not fit, an impossible output_padding, or no output left.
        TypeError: an argument of another type.
    """
    return _conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)


def _conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: _Pair,
    padding: _Pair,
    output_padding: _Pair,
    groups: int,
    dilation: _Pair,
    slope: float = 1.0,
) -> Tensor:
    """``slope`` as ``_conv2d``'s."""
    check_tensors("bias", input=input, weight=weight, bias=bias)
    if _is_plain_convolution(input, weight, bias):
        _check_convolution_arguments(input, weight, bias, stride, dilation, groups, transposed=True)
        strides, pads, dilations = _pair(stride, "stride"), _pair(padding, "padding"), _pair(dilation, "dilation")
        extra = _pair(output_padding, "output_padding")
        if min(pads) < 0:
            raise RuntimeError(f"padding must not be negative, got {padding}")
        if min(extra) < 0 or any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
            raise RuntimeError(
                "output_padding must not be negative and must be smaller than stride or dilation, "
                f"got output_padding={output_padding} with stride={stride}, dilation={dilation}"
            )
        size = _conv.transposed_output_size(input.shape[-2:], weight.shape[2:], strides, pads, extra, dilations)
        if min(size) < 1:
            raise RuntimeError(
                f"padding={padding} leaves no output: input of shape {tuple(input.shape)}, weight of shape "
                f"{tuple(weight.shape)}, stride={stride} give {size[0]} x {size[1]}"
            )
        stride, padding, output_padding, dilation = strides, pads, extra, dilations
    return _conv.transposed_convolution(input, weight, bias, stride, padding, output_padding, groups, dilation, slope)


def _is_plain_convolution(*tensors: Tensor | None) -> bool:
    """Dense tensors: what is refused here by name. Others are torch's to judge."""
    return not any(t is not None and (t.is_quantized or t.layout != torch.strided) for t in tensors)


def _check_convolution_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: _Pair,
    dilation: _Pair,
    groups: int,
    transposed: bool = False,
) -> None:
    if input.dim() not in (3, 4) or weight.dim() != 4:
        raise RuntimeError(
            "input must have 4 dimensions (N, C, H, W) or 3 (C, H, W) and weight 4, "
            f"got input of shape {tuple(input.shape)} and weight of shape {tuple(weight.shape)}"
        )
    for name, value in (("stride", stride), ("dilation", dilation)):
        if min(_pair(value, name)) < 1:
            raise RuntimeError(f"{name} must be positive, got {value}")
    if groups < 1:
        raise RuntimeError(f"groups must be positive, got {groups}")
    channels = weight.shape[0] if transposed else weight.shape[1] * groups
    if input.shape[-3] != channels:
        raise RuntimeError(
            f"input must have {channels} channels for weight of shape {tuple(weight.shape)} and groups={groups}, "
            f"got {input.shape[-3]} in input of shape {tuple(input.shape)}"
        )
    if weight.shape[0] % groups != 0:
        raise RuntimeError(
            f"groups must divide weight's first dimension, got groups={groups}, weight {tuple(weight.shape)}"
        )
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != outputs):
        raise RuntimeError(f"bias must have shape ({outputs},), got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != input.device:
            raise RuntimeError(f"{name} must be on input's device {input.device}, got {tensor.device}")
        autocast = _autocast.is_on(input.device.type)
        if tensor.dtype != input.dtype and not autocast:
            raise RuntimeError(f"{name} must have input's dtype {input.dtype}, got {tensor.dtype}")


# ---- norm_act ----


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "none",
    negative_slope: float = 0.01,
    groups: int = 1,
) -> Tensor:
    """Batch norm and activation in one pass: ``act(torch.nn.functional.batch_norm(input, ...))``.

    Args:
        input: (N, C, ...), any rank >= 2 and any strides; float32, float64, bfloat16 or float16.
        running_mean, running_var: (C,), both or neither; training moves them in place (the unbiased variance), and
            evaluation normalises by them.
        weight, bias: (C,) or None. These four have input's dtype, or are all float32 beside a half-precision input.
        training: normalise by the batch's own statistics.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance; positive, or zero in evaluation.
        act: "none", "relu" or "leaky_relu", with ``negative_slope`` for the last.
        groups: in training, cuts the batch into so many equal parts with statistics of their own: a batch of real and
            fake (``groups=2``) equals two calls, the running statistics moving for the first half, then for the second.

    Returns:
        Of input's shape and dtype; channels_last if input is, contiguous otherwise.

    Raises:
        ValueError: one value a channel in training, eps out of range, an unknown act, groups that do not divide the
            batch, or one of the running statistics without the other.
        RuntimeError: sizes, dtypes or devices that do not fit.
        TypeError: an argument of another type.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    optional = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    check_tensors(*optional, input=input, **optional)
    momentum, eps = number(momentum, "momentum"), number(eps, "eps")
    negative_slope = number(negative_slope, "negative_slope")
    if input.dim() != 1 or input.shape[0] > 0:  # torch lets an empty vector through
        _check_batch_norm(input, running_mean, running_var, weight, bias, training, eps, act, groups)
    groups = groups if training else 1
    if not _runs(input, "norm_act") or input.dtype not in _NORM_DTYPES or input.dim() < 2:
        return _composed_batch_norm_act(
            input, running_mean, running_var, weight, bias, training, momentum, eps, act, negative_slope, groups
        )
    reference = _impl.reference_selected()
    if not training:
        evaluate = _norm_act.norm_act_eval_reference if reference else _norm_act.norm_act_eval
        assert running_mean is not None
        assert running_var is not None
        return evaluate(input, running_mean.detach(), running_var.detach(), weight, bias, eps, act, negative_slope)
    train = _norm_act.norm_act_reference if reference else _norm_act.norm_act
    output, mean, var = train(input, weight, bias, eps, act, negative_slope, groups)
    if running_mean is not None and running_var is not None and input.numel() > 0:
        count = input.numel() // (input.shape[1] * groups)
        move = _norm_act.move_reference if reference else _norm_act.move_running_statistics
        move(running_mean, running_var, mean, var, momentum, count / (count - 1))
    return output


def _runs(input: Tensor, operator: str) -> bool:
    """True where ``operator`` has a kernel (or only shapes are asked for)."""
    device = input.device.type
    return device in ("cpu", "meta") or (device == "cuda" and _cuda.has_kernel(operator))


_NORM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _composed_batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    act: str,
    negative_slope: float,
    groups: int,
) -> Tensor:
    """torch's own functions, for what the operators do not take."""
    parts = [
        _F.batch_norm(part, running_mean, running_var, weight, bias, training, momentum, eps)
        for part in input.chunk(groups)
    ]
    output = parts[0] if groups == 1 else torch.cat(parts)
    if act == "relu":
        return _F.relu(output)
    return _F.leaky_relu(output, negative_slope) if act == "leaky_relu" else output


def _check_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    act: str,
    groups: int,
) -> None:
    if act not in _norm_act.ACTIVATIONS:
        raise ValueError(f"act must be one of {_norm_act.ACTIVATIONS}, got {act!r}")
    if input.dim() < 2:
        raise RuntimeError(f"input must have at least 2 dimensions (N, C, ...), got shape {tuple(input.shape)}")
    if not input.is_floating_point():
        raise NotImplementedError(f"input must be float32, float64, bfloat16 or float16, got {input.dtype}")
    if not isinstance(groups, int):
        raise TypeError(f"groups must be an integer, got {groups!r}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be both given or both None, got one of them")
    channels = input.shape[1]
    if training:
        if groups < 1 or input.shape[0] % groups != 0:
            raise ValueError(
                f"groups must be positive and divide the batch, got groups={groups} and a batch of {input.shape[0]} "
                f"(input of shape {tuple(input.shape)})"
            )
        if eps <= 0:
            raise ValueError(f"eps must be positive in training, got {eps}")
        if input.numel() > 0 and input.numel() == channels * groups:
            of = "" if groups == 1 else f" in {groups} groups"
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}{of}")
    elif eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    elif running_mean is None:
        raise RuntimeError("running_mean and running_var must be given in evaluation (training=False), got None")
    given = [
        (name, tensor)
        for name, tensor in (
            ("running_mean", running_mean),
            ("running_var", running_var),
            ("weight", weight),
            ("bias", bias),
        )
        if tensor is not None
    ]
    half = input.dtype in (torch.bfloat16, torch.float16)
    mixed = half and len(given) > 0 and given[0][1].dtype == torch.float32
    expected = torch.float32 if mixed else input.dtype
    for name, tensor in given:
        if tensor.dim() != 1 or tensor.shape[0] != channels:
            raise RuntimeError(
                f"{name} must have shape ({channels},) for input of shape {tuple(input.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.dtype != expected:
            also = ", or all of running_mean, running_var, weight and bias float32" if half else ""
            raise RuntimeError(f"{name} must have input's dtype {input.dtype}{also}, got {tensor.dtype}")
        if tensor.device != input.device:
            raise RuntimeError(f"{name} must be on input's device {input.device}, got {tensor.device}")


# ---- gan_loss ----


def conv_bce_with_logits(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | float,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    sample_weight: Tensor | None = None,
    pos_weight: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """A discriminator's last convolution, sigmoid and binary cross-entropy as one kernel: ``(loss, logits)``.

    Equals ``logits = conv2d(input, weight, bias, stride, padding)`` and
    ``binary_cross_entropy_with_logits(logits, target, sample_weight, pos_weight=pos_weight, reduction=reduction)``; see
    ``conv_gan_loss`` for arguments, shapes and errors. Loss and gradient are exact for confident discriminators too:
    nothing is clamped and nothing cancels.
    """
    return conv_gan_loss(
        input,
        weight,
        bias,
        target,
        loss="bce",
        stride=stride,
        padding=padding,
        sample_weight=sample_weight,
        pos_weight=pos_weight,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def conv_gan_loss(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | float,
    *,
    loss: str = "bce",
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    sample_weight: Tensor | None = None,
    pos_weight: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """A discriminator's last convolution and its GAN loss as one kernel: ``(loss, logits)``, both differentiable.

    Args:
        input: features (N, C, H, W), any strides; float32, float64, bfloat16 or float16.
        weight: (K, C, kh, kw), of input's dtype.
        bias: (K,) or None.
        target: 1 is real, 0 is fake. One number (or a tensor of no dimension) for every logit; a label an image, shape
            (N,), for each of its image's logits; or a target of the logits' shape (N, K, H', W'). "bce", "hinge" and
            "wasserstein" want it in [0, 1], "lsgan" takes any finite number.
        loss: with x a logit and t its target, "bce": t softplus(-x) + (1-t) softplus(x); "hinge" (the
            discriminator's): t relu(1-x) + (1-t) relu(1+x); "wasserstein": (1-2t) x, so -x for real and x for fake
            (with target 1 it is also the generator's part of the hinge loss); "lsgan": (x-t)^2, as Mao et al. (2017)
            without their factor 1/2.
        stride, padding: as ``torch.nn.functional.conv2d``'s.
        sample_weight: multiplies each logit's loss; shape (N,), an image each, or broadcastable to the logits. As in
            torch, the mean divides by the number of logits, not by the sum of the weights.
        pos_weight: multiplies the real term, broadcastable to the logits or a number; not for "lsgan".
        label_smoothing: s in [0, 1] turns each target t into t (1-s) + s/2.
        reduction: "mean" over all logits, also where there are several an image; "sum"; or "none".

    Returns:
        The loss, a scalar or for "none" of the logits' shape, in the logits' dtype (computed in float32 for the 16-bit
        types; under autocast it is float32, as torch's losses are), and the logits (N, K, H', W').

    Raises:
        RuntimeError: shapes or dtypes that do not fit; a tensor target with values outside [0, 1].
        ValueError: a number outside its range, or an unknown loss or reduction.
        TypeError: an argument of another type.
    """
    check_tensors("bias", input=input, weight=weight, bias=bias)
    stride, padding = _pair(stride, "stride"), _gan_loss_inputs.padding_pair(padding, weight, stride)
    _gan_loss_inputs.check_convolution(input, weight, bias, stride, padding)
    loss_index, reduction_index = _gan_loss_inputs.check_loss(loss, reduction, label_smoothing, pos_weight)
    autocast = _autocast.is_on(input.device.type)
    if autocast:
        # As torch: the convolution in the lower type, the loss in float32.
        lower = torch.get_autocast_dtype(input.device.type)
        input, weight = _gan_loss_inputs.lowered(input, lower), _gan_loss_inputs.lowered(weight, lower)
        bias = None if bias is None else _gan_loss_inputs.lowered(bias, lower)
    shape = _gan_loss.output_shape(input, weight, stride, padding)
    accumulate = _gan_loss.accumulate_dtype(input.dtype)
    tensors = _gan_loss_inputs.targets_and_weights(
        target, sample_weight, pos_weight, loss, shape, accumulate, input.device
    )
    parts = (*tensors, loss_index)
    settings = (float(label_smoothing), reduction_index, autocast)
    if _impl.reference_selected() or input.is_meta or not _runs(input, "conv_gan_loss"):
        _gan_loss_inputs.check_target_values(tensors[0], loss)
        return _gan_loss.reference(input, weight, bias, *parts, stride, padding, *settings)
    return _gan_loss.conv_gan_loss(input, weight, bias, *parts, stride, padding, *settings)


def gan_loss_with_logits(
    logits: Tensor,
    target: Tensor | float,
    *,
    loss: str = "bce",
    sample_weight: Tensor | None = None,
    pos_weight: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The loss of ``conv_gan_loss`` for logits (N, ...) that come from another layer; the same arguments and errors."""
    check_tensors(logits=logits)
    if logits.dim() == 0 or not logits.is_floating_point():
        raise RuntimeError(f"logits must be floating-point of shape (N, ...), got {_gan_loss_inputs.describe(logits)}")
    loss_index, reduction_index = _gan_loss_inputs.check_loss(loss, reduction, label_smoothing, pos_weight)
    shape, accumulate = list(logits.shape), _gan_loss.accumulate_dtype(logits.dtype)
    tensors = _gan_loss_inputs.targets_and_weights(
        target, sample_weight, pos_weight, loss, shape, accumulate, logits.device
    )
    _gan_loss_inputs.check_target_values(tensors[0], loss)
    autocast = _autocast.is_on(logits.device.type)
    return _gan_loss.loss_of_logits(logits, *tensors, loss_index, float(label_smoothing), reduction_index, autocast)


# ---- linear_cross_entropy ----


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    *,
    z_loss: float = 0.0,
    adversarial_radius: float = 0.0,
) -> Tensor:
    """A language model's head and its loss, the (tokens, vocabulary) logits never stored whole.

    Equals ``cross_entropy(linear(input, weight, bias), target, ...)`` in value and in derivatives of any order. Tokens
    whose target is ``ignore_index`` cost nothing. Where a gradient will be wanted, the forward computes it along with
    the loss; the backward of "mean" and "sum" only scales it.

    Args:
        input: features (H,) or (..., H), any strides; float32, float64, bfloat16 or float16.
        weight: (V, H), of input's dtype; a tied embedding's weight as it is. (V, d1, ..., H) computes d1 × ... losses a
            token, as ``torch.nn.functional.linear_cross_entropy`` does, through plain PyTorch.
        target: classes, int64 or uint8, of input's shape without H; or probabilities, floating-point, with V in
            H's place, through plain PyTorch.
        bias: (V,) or None.
        ignore_index: tokens of this target have no loss and no gradient, and the mean does not count them.
        label_smoothing: in [0, 1], spread over all classes; not counting ignored tokens.
        reduction: "mean" over the tokens that are not ignored (nan where there is none, as in torch), "sum" or "none".
        z_loss: adds z_loss · logsumexp(logits)² to each token's loss (PaLM, Chowdhery et al. 2022, section 5).
        adversarial_radius: the target's embedding is moved by so much in the direction that raises the loss most: its
            logit is lowered by radius · ‖input‖ (Wang, Gong and Liu, ICML 2019). Needs classes as target.

    Returns:
        The loss in input's dtype (computed in float32 for the 16-bit types; float32 under autocast, which multiplies
        float32 on the CPU and the lower type on a GPU), a scalar or, for "none", of target's shape.

    Raises:
        RuntimeError: shapes or dtypes that do not fit, or label_smoothing outside [0, 1].
        ValueError: another number of targets than tokens, an unknown reduction, a negative z_loss or radius.
        IndexError: a class outside [0, V) that is not ``ignore_index``.
        TypeError: an argument of another type.
    """
    check_tensors("bias", input=input, weight=weight, target=target, bias=bias)
    ignore_index = -100 if ignore_index is None else ignore_index
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
    label_smoothing, z_loss = number(label_smoothing, "label_smoothing"), number(z_loss, "z_loss")
    adversarial_radius = number(adversarial_radius, "adversarial_radius")
    _linear_cross_entropy_inputs.check(
        input, weight, target, bias, label_smoothing, reduction, z_loss, adversarial_radius
    )
    device, dtype = input.device.type, input.dtype
    if _autocast.is_on(device):
        # As torch: the loss in float32; on a GPU the factors in the lower type, their product though in float32.
        input, weight, bias = _linear_cross_entropy.autocast(device, input, weight, bias)
        dtype = _linear_cross_entropy.accumulate_dtype(input.dtype)
    index = _linear_cross_entropy.REDUCTIONS.index(reduction)
    settings = (ignore_index, label_smoothing, index, z_loss, adversarial_radius)
    if weight.dim() > 2 or target.is_floating_point():
        return _linear_cross_entropy.composed(input, weight, target, bias, *settings)
    arguments = (input.reshape(target.numel(), input.shape[-1]), weight, target.reshape(-1).long(), bias, *settings)
    if _impl.reference_selected() or not _linear_cross_entropy.has_kernel(device):
        with _autocast.off(device):
            loss = _linear_cross_entropy.reference(*arguments, [False] * 3)[0]
    else:
        gradients = _linear_cross_entropy.gradients_to_expect(input, weight, bias, index)
        loss = _linear_cross_entropy.linear_cross_entropy(*arguments, gradients)[0]
    return (loss.reshape(target.shape) if reduction == "none" else loss).to(dtype)


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
        and type(input) in (Tensor, torch.nn.Parameter)
        and input.device.type == "cpu"
        and input.dtype in _DROPPED
        and input.layout == torch.strided
        and input.is_contiguous()
        and input.numel() >= _dropout.SMALLEST
        and not torch.compiler.is_compiling()
        and not in_functorch()
        and _impl.kernels_run()
    )
    if not ours:
        return _F.dropout(input, p, training, inplace)
    return _dropout.dropout(input, draw_philox(input.device), p)


_DROPPED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
        and all(type(each) in (Tensor, torch.nn.Parameter) for each in given)
        and all(each.device.type == "cpu" and each.layout == torch.strided for each in given)
        and input.dtype in _DROPPED
        and all(each.dtype == input.dtype for each in given)
        and (bias is None or bias.shape == input.shape[-1:])
        and input.numel() >= _gelu.SMALLEST
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not in_functorch()
        and _impl.kernels_run()
    )
    if not ours:
        return _F.gelu(input if bias is None else input + bias, approximate=approximate)
    return _gelu.bias_gelu(input, bias, approximate == "tanh")


# ---- layer norm ----


def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    p: float = 0.0,
    eps: float = 1e-5,
    *,
    training: bool = True,
    prenorm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``layer_norm(dropout(input, p) + residual, weight, bias)``, what stands around each layer of a Transformer.

    On the CPU one pass forward and one backward, which keeps the sum alone, no mask. Twice differentiable. Where it
    pays: eager, outside ``torch.func`` and autocast, with weight and bias, 8,192 elements and more; everything else is
    torch's own three operations.

    Args:
        input: float32, float64, bfloat16 or float16, (..., features).
        residual: the same shape and dtype.
        weight, bias: (features), or None.
        p: the share of input that is dropped, in [0, 1].
        eps: what is added to the variance.
        training: False: nothing is dropped.
        prenorm: return the sum as well, for the next residual.

    Returns:
        input's shape and dtype; with ``prenorm`` (output, sum).

    Raises:
        ValueError: p outside [0, 1]. RuntimeError: shapes, dtypes or devices that do not fit.

    Source: Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must be in [0, 1], got {p}")
    if input.shape != residual.shape:
        raise RuntimeError(
            f"residual must have input's shape, got {tuple(residual.shape)} and an input of {tuple(input.shape)}"
        )
    p = p if training else 0.0
    given = [each for each in (input, residual, weight, bias) if each is not None]
    ours = (
        p < 1.0
        and weight is not None
        and bias is not None
        and all(type(each) in (Tensor, torch.nn.Parameter) for each in given)
        and all(each.device.type == "cpu" and each.layout == torch.strided for each in given)
        and input.dtype in _DROPPED
        and all(each.dtype == input.dtype for each in given)
        and weight.shape == bias.shape == input.shape[-1:]
        and input.numel() >= _layer_norm.SMALLEST
        and input.numel() <= 1 << 34
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not in_functorch()
        and _impl.kernels_run()
    )
    if not ours:
        sum = dropout(input, p) + residual
        output = _F.layer_norm(sum, input.shape[-1:], weight, bias, eps)
        return (output, sum) if prenorm else output
    philox = draw_philox(input.device) if p > 0.0 else None
    output, sum, _, _ = _layer_norm.dropout_add_layer_norm(input, residual, weight, bias, philox, float(p), eps)
    return (output, sum) if prenorm else output
