// Few queries and a long cache of keys: how the CUDA forward keeps a whole GPU busy.
//
// The queries of the heads that share a key head become rows of one head, so that keys and values are read
// once for all of them. The keys are cut into parts, a block each, whose outputs and sums a second kernel
// joins, always in the same order. Both are functions of the shape and of the number of multiprocessors: the
// same bits in every run on one GPU.
#pragma once
#include "attention/attention_cuda.h"

namespace fastgan {
namespace {

constexpr int64_t kFewRows = 64, kLongKeys = 1024;
constexpr int64_t kLeastPart = 256, kMostParts = 128;  // keys of a part, a multiple of every tile; parts

// A tile of a warp's 16 rows: there are few.
template <class S, int D>
struct PartTiling : ForwardTiling<S, D> {
  static constexpr int R = 1, rows = 16 * ForwardTiling<S, D>::warps;
};

// (batch, heads, rows) as (batch, kv_heads, group · rows), where strides allow it and nothing depends on
// which is which: causality does on the row, dropout on both.
inline AttentionArgs fold_group(const AttentionArgs& args) {
  const int64_t group = args.kv_heads ? args.heads / args.kv_heads : 1, rows = args.rows;
  if (args.row_offset || group <= 1 || group * rows > kFewRows || args.is_causal || args.has_dropout)
    return args;
  AttentionArgs out = args;
  bool folds = true;
  auto fold = [&](int64_t (&stride)[4]) {
    if (rows == 1) stride[2] = stride[1];
    folds = folds && stride[1] == rows * stride[2];
    stride[1] *= group;
  };
  fold(out.query.stride);
  fold(out.output.stride);
  if (out.mask.data) fold(out.mask.stride);
  if (out.bias.data) fold(out.bias.stride);
  if (!folds) return args;
  out.heads = args.kv_heads;
  out.rows = group * rows;
  return out;
}

struct Parts {
  int64_t count, keys;  // of each; count 1: the keys are not cut
};

// Two blocks for each multiprocessor or more, if the keys are enough for it. Two parts at least: a tile of
// kFewRows rows wastes less than a larger one, and memory has more of them to wait for.
inline Parts parts_of(const AttentionArgs& args, int64_t multiprocessors) {
  const int64_t pairs = args.batch * args.heads;
  const Parts whole{1, args.columns};
  // Of few rows is_causal leaves few keys.
  if (args.row_offset || pairs == 0 || args.rows == 0 || args.rows > kFewRows || args.is_causal ||
      args.columns < kLongKeys)
    return whole;
  int64_t count = 2 * multiprocessors / pairs;
  if (count < 2) count = 2;
  if (count > args.columns / kLeastPart) count = args.columns / kLeastPart;
  if (count > kMostParts) count = kMostParts;
  const int64_t keys = ceil_div(ceil_div(args.columns, count), kFewRows) * kFewRows;
  return {ceil_div(args.columns, keys), keys};
}

// Of each part and row: value_width numbers of the output before it is divided, the row's maximum and sum.
inline int64_t parts_size(const AttentionArgs& args, const Parts& parts) {
  if (parts.count == 1) return 0;
  const int64_t size = args.dtype == Dtype::float64 ? 8 : 4, rows = args.batch * args.heads * args.rows;
  return ceil_div(parts.count * rows * (args.value_width + 2) * size, 16) * 16;
}

}  // namespace
}  // namespace fastgan
