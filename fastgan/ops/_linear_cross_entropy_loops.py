"""The loops behind ``linear_cross_entropy``: chunks of tokens, and on a GPU blocks of the vocabulary.

Of 16 bits on a GPU the vocabulary goes through in blocks, twice (``_by_blocks``): once for the statistics of each
token's logits, once, from logits made again, for their gradient. That is four products instead of three. But the
weight's gradient is made of all tokens at once and rounded once. Chunks of c tokens add to one in float32, which is
read and written tokens / c times: 8 V H bytes at some 4 TB/s, more than the fourth product's 2 tokens V H operations at
some 600 TFLOP/s take where c is below 600; and with its rounded copy it is more memory than all else. In float32 the
products are so slow that nothing else counts: chunks there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan.ops._autograd import LIBRARY
from fastgan.ops._output import new_output
from fastgan.ops.product import product_into, tiles_multiply

#: bytes of one chunk's logits. Below the 32 MiB from which malloc returns memory to the system at every free (and pays
#: for its pages at every call), and enough tokens for the matrix products to run at their full rate.
CHUNK_BYTES = 30 << 20
#: of bfloat16 on the tiles of AMX, where the products are so fast that reading the weight and its gradient for every
#: chunk counts: 500 tokens of 50,257 classes
TILE_CHUNK_BYTES = 100 << 20
#: on a GPU, of float32 and float64: of fewer rows the products are slower
CUDA_CHUNK_BYTES = 128 << 20
#: of 16 bits there: one block's logits of all tokens, at most so many tokens; 3,072 classes of 8,192 tokens
BLOCK_BYTES, BLOCK_TOKENS = 96 << 20, 16384
#: rows and columns that a multiprocessor takes of a product, and how many multiprocessors an H100 or H200 has
_TILE, _MULTIPROCESSORS = 128, 132
#: rows of logits on a GPU begin at multiples of so many entries, for its matrix products and kernels that read vectors:
#: a row of 50,257 would not, and cuBLAS takes kernels of a fraction of the speed
_ALIGNED = 64


# The row kernel, in place, and CUDA's of blocks of classes; only the loops below call them, beneath autograd.
LIBRARY.define(
    "linear_cross_entropy_rows(Tensor(a!) logits, Tensor target, Tensor? bias, Tensor? margin, Tensor? gradient, "
    "Tensor(b!)? loss, float smoothing, float z) -> ()"
)
LIBRARY.define(
    "linear_cross_entropy_statistics(Tensor logits, int begin, int classes, Tensor target, Tensor? bias, "
    "Tensor? margin, Tensor(a!) state, Tensor(b!)? loss, float smoothing, float z) -> ()"
)
LIBRARY.define(
    "linear_cross_entropy_gradient(Tensor logits, int begin, int classes, Tensor target, Tensor? bias, "
    "Tensor? margin, Tensor(a!) state, Tensor gradient, Tensor(b!) out, float smoothing) -> ()"
)
_rows_kernel = torch.ops.fastgan.linear_cross_entropy_rows.default
_statistics_kernel = torch.ops.fastgan.linear_cross_entropy_statistics.default
_gradient_kernel = torch.ops.fastgan.linear_cross_entropy_gradient.default


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for the 16-bit types, the type itself otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """Of the gradients of input and weight that the forward leaves. A loss is scaled later: not float16."""
    return dtype if dtype == torch.bfloat16 and _multiplies_16_bits(device) else accumulate_dtype(dtype)


def _rows_per_chunk(tokens: int, classes: int, dtype: torch.dtype, budget: int) -> int:
    """Chunks of equal size within the budget; by shape only."""
    return _equal_parts(tokens, max(16, budget // max(1, classes * dtype.itemsize)))


def _tokens_and_classes_per_block(tokens: int, classes: int, features: int) -> tuple[int, int]:
    """Within the budget; by shape only."""
    chunk = _equal_parts(tokens, BLOCK_TOKENS)
    most = max(_ALIGNED, BLOCK_BYTES // (4 * chunk) // _ALIGNED * _ALIGNED)
    if classes <= most:
        return chunk, max(1, classes)
    if classes <= 4 * most:  # of a few blocks the last, which is made once, should not be small
        return chunk, -(-_equal_parts(classes, most) // _ALIGNED) * _ALIGNED
    # A block's weight gradient is few tiles, 144 of 3,072 classes and 768 features: two rounds, and one nearly idle.
    across = -(-features // _TILE)

    def busy(block: int) -> float:
        tiles = block // _TILE * across
        return tiles / (-(-tiles // _MULTIPROCESSORS) * _MULTIPROCESSORS)

    least = -(-most // 2 // _TILE) * _TILE
    return chunk, max(range(least, most + 1, _TILE), default=most, key=lambda block: (busy(block), block))


def _blocks_of_classes(classes: int, block: int) -> list[slice]:
    """Blocks of a large vocabulary; what is left over of a multiple of _ALIGNED is one by itself.

    A product that is an odd number wide runs at a fraction of the speed: better one of 17 classes than one of 2,385.
    """
    ends = {*range(block, classes, block), classes}
    if classes >= _TILE * _ALIGNED:
        ends.add(classes // _ALIGNED * _ALIGNED)
    begin, blocks = 0, []
    for end in sorted(ends):
        blocks.append(slice(begin, end))
        begin = end
    return blocks


def _equal_parts(whole: int, most: int) -> int:
    """The size of the fewest parts of equal size of at most ``most``."""
    return -(-whole // max(1, -(-whole // most)))


def _multiplies_16_bits(device: str) -> bool:
    """Whether its matrix products take 16-bit factors and give float32."""
    return device != "cpu"


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out, of the factors' dtype or float32 of 16-bit ones, = a @ b, or is added to."""
    if a.dtype != out.dtype:
        _widening_product(a, b, out, add)
    elif add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def _widening_product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out (float32) = a @ b of 16-bit factors, or is added to."""
    if add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


class _Products:
    """The three matrix products of a chunk. On the CPU, 16-bit weights are widened a block of classes at a time."""

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        if weight.stride(0) != 1 and weight.stride(1) != 1:
            weight = weight.contiguous()  # a matrix product would copy it for every chunk
        self.weight, self.dtype = weight, dtype
        self.block = weight.shape[0]
        if weight.dtype != dtype:
            self.block = max(16, CHUNK_BYTES // max(1, 4 * weight.shape[1]))

    def _blocks(self):
        for begin in range(0, self.weight.shape[0], self.block):
            part = slice(begin, begin + self.block)
            yield part, self.weight[part].to(self.dtype)

    def logits(self, x: Tensor, out: Tensor) -> None:
        """out (t, V) = x (t, H) @ weightᵀ"""
        for part, weight in self._blocks():
            _product(x, weight.t(), out[:, part])

    def input_gradient(self, dlogits: Tensor, out: Tensor) -> None:
        """out (t, H) = dlogits (t, V) @ weight"""
        for part, weight in self._blocks():
            _product(dlogits[:, part], weight, out, add=part.start > 0)

    def weight_gradient(self, dlogits: Tensor, x: Tensor, out: Tensor, add: bool) -> None:
        """out (V, H) = dlogitsᵀ (V, t) @ x (t, H), or is added to"""
        _product(dlogits.t(), x, out, add)


class _TileProducts:
    """The same of bfloat16 by AMX: logits and sums are float32, their gradient is rounded, as on a GPU."""

    dtype = torch.bfloat16

    def __init__(self, weight: Tensor):
        self.weight = weight if 1 in weight.stride() else weight.contiguous()

    def logits(self, x: Tensor, out: Tensor) -> None:
        product_into(out, x, self.weight.t(), False)

    def input_gradient(self, dlogits: Tensor, out: Tensor) -> None:
        product_into(out, dlogits, self.weight, False)

    def weight_gradient(self, dlogits: Tensor, x: Tensor, out: Tensor, add: bool) -> None:
        product_into(out, dlogits.t(), x, add)


def _check_targets(target: Tensor, classes: int) -> None:
    if target.numel() == 0:
        return
    low, high = target.aminmax()
    _check_range(int(low), int(high), classes)


def _check_range(low: int, high: int, classes: int) -> None:
    if low < 0 or high >= classes:
        raise IndexError(f"Target {low if low < 0 else high} is out of bounds: target must be in [0, {classes})")


def chunked(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    adversarial_radius: float,
    upstream: Tensor | None,
    mean: bool,
    gradients: Sequence[bool],
    want_loss: bool,
) -> tuple[Tensor, int | Tensor, list[Tensor]]:
    """Loss of each token, how many count, and the gradients for ``upstream`` (a scalar or one a token, None is 1)."""
    (tokens, features), classes, dtype = input.shape, weight.shape[0], accumulate_dtype(input.dtype)
    device = input.device
    out_dtype = gradient_dtype(input.dtype, device.type)
    zeros = lambda *size: torch.zeros(size, dtype=dtype, device=device)
    target = target.contiguous()
    kept = target != ignore_index
    count: int | Tensor
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # All tokens go along.
        index, rows, count = None, tokens, kept.sum()
        target = torch.where(kept, target, 0)
    else:
        index, target = _kept_tokens(kept, target, classes)
        rows = count = target.numel()
    wants_input, wants_weight, wants_bias = gradients
    losses = torch.empty(rows if want_loss else 0, dtype=dtype, device=device)
    out = [input.new_empty(0, dtype=each) for each in (out_dtype, out_dtype, dtype)]
    if wants_input:
        out[0] = new_output(input, (tokens, features), dtype=out_dtype)
        if index is not None:
            out[0].zero_()  # the ignored tokens'; all others are written
    if rows == 0:
        if wants_weight:
            out[1] = zeros(classes, features).to(out_dtype)
        if wants_bias:
            out[2] = zeros(classes)
        return zeros(tokens if want_loss else 0), count, out
    row_gradient = None
    # float16 would lose most of a mean's gradient of the logits, which is rounded.
    divide_later = mean and upstream is None and input.dtype == torch.float16
    if any(gradients):
        row_gradient = torch.ones((), dtype=dtype, device=device) if upstream is None else upstream.to(dtype)
        if row_gradient.dim() == 1 and index is not None:
            row_gradient = row_gradient[index]
        if mean and not divide_later:
            row_gradient = row_gradient / count
        row_gradient = row_gradient.expand(rows)
        row_gradient = row_gradient.contiguous() if index is not None else torch.where(kept, row_gradient, 0.0)
    offset = None if bias is None else bias.to(dtype).contiguous()
    by_blocks = _multiplies_16_bits(device.type) and input.dtype != dtype
    call = _Call(
        input, index, weight, target, offset, row_gradient, losses if want_loss else None, label_smoothing, z_loss,
        adversarial_radius, gradients, out,
    )  # fmt: skip
    (_by_blocks if by_blocks else _by_chunks)(call)
    if divide_later:
        out = [gradient.div_(count) for gradient in out]
    if want_loss:
        losses = torch.where(kept, losses, 0.0) if index is None else zeros(tokens).index_copy_(0, index, losses)
    return losses, count, out


def _kept_tokens(kept: Tensor, target: Tensor, classes: int) -> tuple[Tensor | None, Tensor]:
    """Which tokens count, None if all do, and their targets; IndexError for a target that is no class."""
    if target.device.type != "cpu":
        return _kept_by_one_question(kept, target, classes)
    index = kept.nonzero().squeeze(-1)
    all_count = index.numel() == target.numel()
    target = target if all_count else target[index]
    _check_targets(target, classes)
    return None if all_count else index, target


def _kept_by_one_question(kept: Tensor, target: Tensor, classes: int) -> tuple[Tensor | None, Tensor]:
    """The same: the host waits for the device once, for three numbers."""
    if target.numel() == 0:
        return None, target
    count, low, high = torch.stack((kept.sum(), *torch.where(kept, target, 0).aminmax())).tolist()
    if count > 0:
        _check_range(low, high, classes)
    if count == target.numel():
        return None, target
    index = torch.nonzero_static(kept, size=count).squeeze(-1)
    return index, target[index]


def _buffer(input: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """(rows, columns), uninitialised; on a GPU with aligned rows."""
    if not _multiplies_16_bits(input.device.type):
        return new_output(input, (rows, columns), dtype=dtype)
    stride = -(-columns // _ALIGNED) * _ALIGNED
    return input.new_empty((rows, stride), dtype=dtype)[:, :columns]


@dataclasses.dataclass
class _Call:
    """What both loops are given: they fill ``losses`` and ``out``. ``target`` is of the tokens at ``index``."""

    input: Tensor
    index: Tensor | None
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    row_gradient: Tensor | None
    losses: Tensor | None
    label_smoothing: float
    z_loss: float
    adversarial_radius: float
    gradients: Sequence[bool]
    out: list[Tensor]

    def features(self, part: slice) -> Tensor:
        return self.input[part] if self.index is None else self.input[self.index[part]]

    def margin(self, x: Tensor) -> Tensor | None:
        if self.adversarial_radius == 0.0:
            return None
        dtype = accumulate_dtype(self.input.dtype)
        return torch.linalg.vector_norm(x, dim=-1, dtype=dtype).mul_(self.adversarial_radius)

    def lower(self, dx: Tensor, at_target: Tensor, margin: Tensor, x: Tensor) -> None:
        """The margin's part of the gradient of x; ``at_target`` (t, 1) is the gradient of the target's logit."""
        slope = torch.where(margin == 0, 0.0, self.adversarial_radius**2 / margin)
        dx.sub_(at_target * slope[:, None] * x)


def _by_chunks(c: _Call) -> None:
    """Chunks of the tokens with all classes."""
    classes, features = c.weight.shape
    rows, dtype, out = c.target.numel(), accumulate_dtype(c.input.dtype), c.out
    wants_input, wants_weight, wants_bias = c.gradients
    tiles = tiles_multiply(c.input, c.weight)
    products = _TileProducts(c.weight) if tiles else _Products(c.weight, dtype)
    budget = CUDA_CHUNK_BYTES if c.input.is_cuda else TILE_CHUNK_BYTES if tiles else CHUNK_BYTES
    chunk = _rows_per_chunk(rows, classes, dtype, budget)
    buffer = _buffer(c.input, chunk, classes, dtype)
    rounded = _buffer(c.input, chunk, classes, c.input.dtype) if tiles and c.row_gradient is not None else None
    for begin in range(0, rows, chunk):
        part = slice(begin, min(begin + chunk, rows))
        x = c.features(part).to(products.dtype)
        logits = buffer[: x.shape[0]]
        products.logits(x, logits)
        margin = c.margin(x)
        upstream_part = None if c.row_gradient is None else c.row_gradient[part]
        loss_part = None if c.losses is None else c.losses[part]
        _rows_kernel(logits, c.target[part], c.bias, margin, upstream_part, loss_part, c.label_smoothing, c.z_loss)
        dlogits = logits if rounded is None else rounded[: x.shape[0]].copy_(logits)
        if wants_input:
            dx = out[0][part] if c.index is None else torch.empty_like(x, dtype=dtype)
            products.input_gradient(dlogits, dx)
            if margin is not None:
                c.lower(dx, logits.gather(1, c.target[part, None]), margin, x)
            if c.index is not None:
                out[0].index_copy_(0, c.index[part], dx)
        if wants_weight:
            if begin == 0:
                out[1] = new_output(c.input, (classes, features), dtype=dtype)
            products.weight_gradient(dlogits, x, out[1], add=begin > 0)
        if wants_bias:
            if begin == 0:
                out[2] = logits.sum(0)
            else:
                out[2].add_(logits.sum(0))


def _by_blocks(c: _Call) -> None:
    """Of 16 bits on a GPU: blocks of the classes with all tokens (or, of very many, a part of them).

    The second time goes backwards: the last block's logits are there already, and of one block nothing is made twice.
    """
    classes, features = c.weight.shape
    rows, dtype, out, new_empty = c.target.numel(), torch.float32, c.out, c.input.new_empty
    wants_input, wants_weight, wants_bias = c.gradients
    weight = c.weight
    if weight.stride(0) != 1 and weight.stride(1) != 1:
        weight = weight.contiguous()
    chunk, block = _tokens_and_classes_per_block(rows, classes, features)
    buffer = _buffer(c.input, chunk, block, dtype)
    blocks = _blocks_of_classes(classes, block)
    if wants_weight:
        # Of one chunk each block of it is written once.
        out[1] = new_empty((classes, features), dtype=out[1].dtype if chunk == rows else dtype)
    if wants_bias:
        out[2] = new_empty(classes, dtype=dtype)
    for begin in range(0, rows, chunk):
        part = slice(begin, min(begin + chunk, rows))
        x = c.features(part)
        count, margin = x.shape[0], c.margin(x)
        state = torch.empty((count, 4), dtype=torch.float64, device=x.device)
        of_rows = (c.target[part], c.bias, margin, state)
        loss_part = None if c.losses is None else c.losses[part]
        for columns in blocks:
            logits = buffer[:count, : columns.stop - columns.start]
            _product(x, weight[columns].t(), logits)
            _statistics_kernel(logits, columns.start, classes, *of_rows, loss_part, c.label_smoothing, c.z_loss)
        if c.row_gradient is None:
            continue
        dx = new_empty((count, features), dtype=dtype) if wants_input else None
        for columns in reversed(blocks):
            logits = buffer[:count, : columns.stop - columns.start]
            if columns is not blocks[-1]:
                _product(x, weight[columns].t(), logits)
            # Where the bias has a gradient, that is summed from what is not rounded.
            to = logits if wants_bias else buffer.view(x.dtype)[:count, : logits.shape[1]]
            _gradient_kernel(logits, columns.start, classes, *of_rows, c.row_gradient[part], to, c.label_smoothing)
            if wants_bias:
                torch.sum(logits, 0, out=out[2][columns]) if begin == 0 else out[2][columns].add_(logits.sum(0))
                to = _buffer(c.input, count, logits.shape[1], x.dtype).copy_(logits)
            if dx is not None:
                _product(to, weight[columns], dx, add=columns is not blocks[-1])
            if wants_weight:
                _product(to.t(), x, out[1][columns], add=begin > 0)
        if dx is not None:
            if margin is not None:
                c.lower(dx, state[:, 3:].to(dtype), margin, x)
            if c.index is None:
                out[0][part] = dx
            else:
                out[0].index_copy_(0, c.index[part], dx.to(out[0].dtype))
    if wants_weight:
        out[1] = out[1].to(gradient_dtype(c.input.dtype, c.input.device.type))
