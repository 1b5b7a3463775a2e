// Attention of bfloat16 on the CPU by AMX, forward and backward: attention_cpu.cpp's tiles and softmax, with
// the products of common/amx.h. As in PyTorch's and in CUDA's kernels the weights, and the gradients of the
// scores, are rounded to bfloat16 before they are multiplied; sums are float32.
//
// What is multiplied is packed once, with zeros to whole tiles: as rows where it is a left factor, as pairs
// where it is a right one. Backward, the gradients of key and value are summed up transposed,
//
//   dVᵀ += dOᵀ P    dKᵀ += Qᵀ dS    dQ += dS K
//
// so that P and dS, right factors, become pairs of their rows by an exchange within registers; it is dO and
// Q, smaller than they are, that are transposed.
//
// A few rows, or another type, go to AVX-512's kernels.
#include "attention/attention_amx_softmax.h"
#include "attention/attention_by_keys.h"
#include "attention/attention_by_rows.h"
#include "common/amx.h"

namespace {

using namespace fastgan;

constexpr int64_t kFewestRows = 8;  // nn/_attention_inputs.py knows it
constexpr int64_t kForwardChunk = 384, kForwardRows = 32, kForwardKeys = 256;
constexpr int64_t kBackwardRows = 128;

TileRows rows_of(const AttentionInput& x, int64_t batch, int64_t head, int64_t row, int64_t rows,
                 int64_t width, bfloat16* room) {
  return tile_rows(at<bfloat16>(x, batch, head, row), x.stride[2], x.stride[3], rows, width, room);
}

// Scores by rows and the keys' transposed pairs, with bias and masks; what they are still to be multiplied by
// to be powers of two. All passes take them from here.
float scores_of(const AttentionArgs& a, const Tile& t, TileRows query, const bfloat16* key, float* scores,
                int64_t stride) {
  const int64_t columns = whole_tiles(t.columns), depth = whole_tiles(a.width);
  multiply(false, {whole_tiles(t.rows), columns, depth, query.data, query.stride, key, depth * kTile, scores,
                   stride});
  if (a.scale > 0 && !has_bias_or_masks<float>(a, t)) return float(a.scale * kLog2e);
  const float scale = float(a.scale);
  for (int64_t r = 0; r < t.rows; ++r)
    for (int64_t c = 0; c < columns; c += kTile)
      store(scores + r * stride + c, load<float>(scores + r * stride + c) * scale);
  if (has_bias_or_masks<float>(a, t)) apply_bias_and_masks<bfloat16>(a, t, scores, stride);
  return float(kLog2e);
}

// ---- forward ----

struct ForwardScratch {
  explicit ForwardScratch(const AttentionArgs& a)
      : chunk(whole_tiles(smaller(a.rows, kForwardChunk))),
        keys(whole_tiles(smaller(a.columns, kForwardKeys))),
        weight_stride(keys + kTileDepth),  // off a power of two, for the sake of the cache's sets
        width(whole_tiles(a.width)),
        value_width(whole_tiles(a.value_width)) {}
  void place(Scratch& s) {
    query_room = s.take<bfloat16>(chunk * width);
    room = s.take<bfloat16>(keys * larger());
    key = s.take<bfloat16>(keys * width);
    value = s.take<bfloat16>(keys * value_width);
    scores = s.take<float>(kForwardRows * keys);
    weights = s.take<bfloat16>(kForwardRows * weight_stride);
    output = s.take<float>(chunk * value_width);
    maximum = s.take<float>(chunk);
    total = s.take<float>(chunk);
    rescale = s.take<float>(kForwardRows);
    words = s.take<uint32_t>(keys + kPhiloxStep);
  }
  void begin() { begin_tiles(); }
  void end() { end_tiles(); }
  int64_t larger() const { return width > value_width ? width : value_width; }
  int64_t chunk, keys, weight_stride, width, value_width;
  void* memory = nullptr;
  TileRows query;
  bfloat16 *query_room, *room, *key, *value, *weights;
  float *scores, *output, *maximum, *total, *rescale;
  uint32_t* words;
};

struct ForwardPass {
  using Storage = bfloat16;
  using T = float;
  using Scratch = ForwardScratch;
  static constexpr int64_t kChunk = kForwardChunk, kRows = kForwardRows, kKeys = kForwardKeys;
  static constexpr double kUnit = 1 / kLog2e;  // of the maxima

  static void pack_rows(const AttentionArgs& a, Scratch& s, int64_t batch, int64_t head, int64_t row0,
                        int64_t rows) {
    s.query = rows_of(a.query, batch, head, row0, rows, a.width, s.query_room);
  }
  static void pack_keys(const AttentionArgs& a, Scratch& s, int64_t batch, int64_t kv_head, int64_t key0,
                        int64_t keys) {
    const int64_t height = whole_tiles(keys);
    const TileRows key = rows_of(a.key, batch, kv_head, key0, keys, a.width, s.room);
    pack_transposed_pairs(key.data, key.stride, height, s.width, s.key);
    const TileRows value = rows_of(a.value, batch, kv_head, key0, keys, a.value_width, s.room);
    pack_pairs(value.data, value.stride, height, s.value_width, s.value);
  }
  static void tile(const AttentionArgs& a, Scratch& s, const Tile& t, int64_t block, int64_t keys) {
    const int64_t columns = whole_tiles(t.columns);
    const Binary base{
        scores_of(a, t, {s.query.data + block * s.query.stride, s.query.stride}, s.key, s.scores, s.keys)};
    softmax_tile<float>(a, t, base, s.scores, s.keys, s.weights, s.weight_stride, s.maximum + block,
                        s.total + block, s.rescale, s.words);
    float* output = s.output + block * s.value_width;
    for (int64_t r = 0; r < t.rows; ++r) {
      if (s.rescale[r] == 1) continue;
      for (int64_t v = 0; v < s.value_width; v += kTile) {
        float* at = output + r * s.value_width + v;
        store(at, load<float>(at) * s.rescale[r]);
      }
    }
    multiply(true, {whole_tiles(t.rows), s.value_width, columns, s.weights, s.weight_stride, s.value,
                    whole_tiles(keys) * kTile, output, s.value_width});
  }
};

// ---- backward ----

struct BackwardScratch : KeyScratch<float> {
  explicit BackwardScratch(const AttentionArgs& a)
      : KeyScratch<float>(a, kBackwardRows),
        depth(whole_tiles(width)),
        value_depth(whole_tiles(value_width)),
        height(whole_tiles(rows)),
        row_stride(height + kTileDepth),
        pair_stride(keys + kTileDepth) {}
  void place(Scratch& s) {
    KeyScratch<float>::place(s);
    room = s.take<bfloat16>(keys * (depth > value_depth ? depth : value_depth));
    key = s.take<bfloat16>(keys * depth);
    key_pairs = s.take<bfloat16>(keys * depth);
    value = s.take<bfloat16>(keys * value_depth);
    query_room = s.take<bfloat16>(height * depth);
    query_columns = s.take<bfloat16>(row_stride * depth);
    grad_room = s.take<bfloat16>(height * value_depth);
    grad_columns = s.take<bfloat16>(row_stride * value_depth);
    scores = s.take<float>(height * stride);
    grad_scores = s.take<float>(height * stride);
    weights = s.take<bfloat16>(height * keys);
    score_pairs = s.take<bfloat16>(height * keys);
    score_rows = s.take<bfloat16>(height * pair_stride);
    key_sums = s.take<float>(depth * keys);
    value_sums = s.take<float>(value_depth * keys);
    query_sums = s.take<float>(height * depth);
    delta = s.take<float>(height);
    words = s.take<uint32_t>(2 * (kKeyBlock + kPhiloxStep));  // of two rows
    bias_scores = grad_scores;
  }
  void begin() { begin_tiles(); }
  void end() { end_tiles(); }
  // width, value_width and rows to whole tiles; strides of what is read by 16 rows at a time
  int64_t depth, value_depth, height, row_stride, pair_stride;
  TileRows query, grad;
  bfloat16 *room, *key, *key_pairs, *value, *query_room, *query_columns, *grad_room, *grad_columns, *weights,
      *score_pairs, *score_rows;
  float *scores, *grad_scores, *key_sums, *value_sums, *query_sums, *delta;
};

// sums, transposed, to rows of keys
void transpose_sums(const float* sums, int64_t width, int64_t keys, int64_t stride, float* to,
                    int64_t to_stride) {
  for (int64_t w = 0; w < width; w += kTile)
    for (int64_t k = 0; k < keys; k += kTile)
      transpose_square([&](int i) FASTGAN_INLINE_LAMBDA { return load<float>(sums + (w + i) * stride + k); },
                       to + k * to_stride + w, to_stride);
}

struct BackwardPass {
  using Storage = bfloat16;
  using T = float;
  using Scratch = BackwardScratch;
  static constexpr int64_t kRows = kBackwardRows;

  static void pack_keys(const AttentionArgs& a, Scratch& s, int64_t batch, int64_t kv_head, int64_t key0,
                        int64_t keys) {
    const int64_t height = whole_tiles(keys);
    const TileRows key = rows_of(a.key, batch, kv_head, key0, keys, a.width, s.room);
    pack_transposed_pairs(key.data, key.stride, height, s.depth, s.key);
    pack_pairs(key.data, key.stride, height, s.depth, s.key_pairs);
    const TileRows value = rows_of(a.value, batch, kv_head, key0, keys, a.value_width, s.room);
    pack_transposed_pairs(value.data, value.stride, height, s.value_depth, s.value);
    std::memset(s.key_sums, 0, size_t(s.depth * s.keys) * sizeof(float));
    std::memset(s.value_sums, 0, size_t(s.value_depth * s.keys) * sizeof(float));
  }
  static void tile(const AttentionArgs& a, Scratch& s, const Tile& t) {
    const int64_t rows = whole_tiles(t.rows);
    s.query = rows_of(a.query, t.batch, t.head, t.row, t.rows, a.width, s.query_room);
    s.grad = rows_of(a.grad_output, t.batch, t.head, t.row, t.rows, a.value_width, s.grad_room);
    const bool whole_row = a.columns <= kKeyBlock;
    for (int64_t r = 0; !whole_row && r < t.rows; ++r)
      s.delta[r] = dot<float>(s.grad.data + r * s.grad.stride,
                              at<bfloat16>(a.saved_output, t.batch, t.head, t.row + r),
                              a.saved_output.stride[3], a.value_width);
    const Binary base{scores_of(a, t, s.query, s.key, s.scores, s.stride)};
    multiply(false, {rows, whole_tiles(t.columns), s.value_depth, s.grad.data, s.grad.stride, s.value,
                     s.value_depth * kTile, s.grad_scores, s.stride});
    const BackwardTile x{s.scores,      s.grad_scores, s.stride,      s.weights,
                         s.score_pairs, s.score_rows,  s.pair_stride, a.grad_bias != nullptr};
    if (whole_row || a.has_dropout)
      score_gradients_in_two(a, t, base, x, s.delta, s.words);
    else
      score_gradients_in_one(a, t, base, x, s.delta);
  }
  static void key_gradients(const AttentionArgs&, Scratch& s, const Tile& t) {
    const int64_t rows = whole_tiles(t.rows), columns = whole_tiles(t.columns), panel = rows * kTile;
    pack_transposed_rows(s.query.data, s.query.stride, rows, s.depth, s.query_columns, s.row_stride);
    pack_transposed_rows(s.grad.data, s.grad.stride, rows, s.value_depth, s.grad_columns, s.row_stride);
    multiply(true, {s.value_depth, columns, rows, s.grad_columns, s.row_stride, s.weights, panel,
                    s.value_sums, s.keys});
    multiply(true, {s.depth, columns, rows, s.query_columns, s.row_stride, s.score_pairs, panel, s.key_sums,
                    s.keys});
  }
  static void query_gradient(const AttentionArgs& a, Scratch& s, const Tile& t, int64_t keys,
                             QuerySum<float> sum, bool first) {
    multiply(false, {whole_tiles(t.rows), s.depth, whole_tiles(t.columns), s.score_rows, s.pair_stride,
                     s.key_pairs, whole_tiles(keys) * kTile, s.query_sums, s.depth});
    for (int64_t r = 0; r < t.rows; ++r) {
      const float* from = s.query_sums + r * s.depth;
      float* to = sum.data + r * sum.stride;
      int64_t w = 0;
      for (; w + kTile <= a.width; w += kTile)
        store(to + w, first ? load<float>(from + w) : load<float>(to + w) + load<float>(from + w));
      for (; w < a.width; ++w) to[w] = first ? from[w] : to[w] + from[w];
    }
  }
  static void finish_keys(Scratch& s, int64_t keys) {
    transpose_sums(s.key_sums, s.depth, whole_tiles(keys), s.keys, s.grad_key, s.padded);
    transpose_sums(s.value_sums, s.value_depth, whole_tiles(keys), s.keys, s.grad_value, s.padded_value);
  }
};

bool takes(const AttentionArgs& a) { return a.dtype == Dtype::bfloat16 && a.rows >= kFewestRows; }

}  // namespace

// FASTGAN_ISA is what the rest of the work is done by.
extern "C" void fastgan_attention_forward_amx(const AttentionArgs& a, const Threads& threads) {
  if (!takes(a)) return FASTGAN_KERNEL(attention_forward)(a, threads);
  run_by_rows<ForwardPass>(a, threads);
}

extern "C" void fastgan_attention_backward_amx(const AttentionArgs& a, const Threads& threads) {
  if (!takes(a)) return FASTGAN_KERNEL(attention_backward)(a, threads);
  run_by_keys<BackwardPass>(a, threads, 3 * a.width + 2 * a.value_width);
}
