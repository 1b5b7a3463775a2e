// Attention on the CPU, forward and backward, in memory linear in the sequence.
//
// Forward, in tiles that are cut as attention_by_rows.h says: scores S = Q Kᵀ (a tile that stays in L2),
// bias, masks, the row maximum, P = exp(S − maximum), and O ← O · exp(old maximum − maximum) + P V; at the
// end O is divided by the row sums. Subtracting the running maximum keeps exp in range; the row's log-sum-exp
// is all that the backward needs.
//
// One query row (against a cache of keys, where text is generated) would not pay for packing: keys and values
// are then read where they lie, once, and the work is as fast as memory is.
//
// Backward. With D = rowsum(dO ∘ O):  P = exp(S − lse),  dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ − D),  dQ = dS K,  dK =
// dSᵀ Q, in tiles that are cut as attention_by_keys.h says.
//
// Tiles in which nothing is visible, under is_causal or under a mask, are skipped, and others are cut at the
// last column that is (the first, for a whole block of keys): what is left out has probability 0.
// A dead row (all scores −inf) has maximum −inf, and −inf − (−inf) is NaN: 0 is subtracted there instead,
// +inf in the backward, so that P is exactly 0. A NaN score is no maximum, but goes through exp into the
// row's sum, and so to the whole row.
//
// Where the time goes (BERT's shape, forward and backward, perf on a Zen 1): products 75 %, exp with its row
// sums 12 %, packing 8 %. Tried without gain: 128 rows a tile in the backward.
//
// Dropout: P is kept or dropped by the word that Philox gives for its place, in both passes the same; row
// sums are over what is not dropped yet. Inputs of half precision are packed as float32. All work is cut by
// shape alone and sums have one order, so that the result has the same bits for every number of threads.
#include "attention/attention_by_keys.h"
#include "attention/attention_by_rows.h"
#include "attention/attention_softmax.h"

namespace {

using namespace fastgan;

constexpr int64_t kForwardChunk = 192, kForwardRows = 48, kForwardKeys = 256;
constexpr int64_t kBackwardRows = 96;

// ---- forward ----

template <class T>
struct ForwardScratch {
  explicit ForwardScratch(const AttentionArgs& a)
      : chunk(smaller(a.rows, kForwardChunk)),
        block(smaller(a.rows, kForwardRows)),
        keys(whole_panels<T>(smaller(a.columns, kForwardKeys))),
        width(a.width),
        value_width(whole_panels<T>(a.value_width)) {}
  void place(Scratch& s) {
    query = s.take<T>(chunk * width);
    key = s.take<T>(keys * width);
    value = s.take<T>(keys * value_width);
    scores = s.take<T>(block * keys);
    output = s.take<T>(chunk * value_width);
    maximum = s.take<T>(chunk);
    total = s.take<T>(chunk);
    rescale = s.take<T>(block);
    words = s.take<uint32_t>(keys + kPhiloxStep);
  }
  int64_t chunk, block, keys, width, value_width;
  void* memory = nullptr;
  T *query, *key, *value, *scores, *output, *maximum, *total, *rescale;
  uint32_t* words;
};

// ---- one row: values in place ----

// sums ← sums · factor + weights V of U vectors of columns, for one row.
template <int U, class Storage, class T>
void add_columns_in_place(const Storage* value, int64_t stride, int64_t columns, const T* weights, T factor,
                          T* output) {
  constexpr int W = lanes<T>;
  Vec<T> sums[U];
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) sums[u] = load<T>(output + u * W) * factor;
  for (int64_t c = 0; c < columns; ++c, value += stride) {
    const Vec<T> p = broadcast<T>(weights[c]);
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) sums[u] += p * load<T>(value + u * W);
  }
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) store(output + u * W, sums[u]);
}

// output ← output · factor + weights V, for one row. Nothing is prefetched: rows lie one behind the other,
// and the hints cost a third of the time (Zen 4, from the third-level cache).
template <class Storage, class T>
void add_values_in_place(const Storage* value, int64_t stride, int64_t width, int64_t columns,
                         const T* weights, T factor, T* output) {
  constexpr int W = lanes<T>;
  int64_t v = 0;
  const auto add = [&]<int U>() {
    for (; v + U * W <= width; v += U * W)
      add_columns_in_place<U>(value + v, stride, columns, weights, factor, output + v);
  };
  add.template operator()<8>();
  add.template operator()<4>();
  add.template operator()<2>();
  add.template operator()<1>();
  for (; v < width; ++v) {
    T total = output[v] * factor;
    for (int64_t c = 0; c < columns; ++c) total += weights[c] * load1<T>(value + c * stride + v);
    output[v] = total;
  }
}

template <class S>
struct ForwardPass {
  using Storage = S;
  using T = Accumulate<S>;
  using Scratch = ForwardScratch<T>;
  static constexpr int64_t kChunk = kForwardChunk, kRows = kForwardRows, kKeys = kForwardKeys;
  static constexpr double kUnit = 1;

  static void pack_rows(const AttentionArgs& a, Scratch& s, int64_t batch, int64_t head, int64_t row0,
                        int64_t rows) {
    fastgan::pack_rows<T>(at<S>(a.query, batch, head, row0), a.query.stride[2], a.query.stride[3], rows,
                          a.width, s.query);
  }
  static void pack_keys(const AttentionArgs& a, Scratch& s, int64_t batch, int64_t kv_head, int64_t key0,
                        int64_t keys) {
    if (one_row_in_place(a)) return;
    pack_transposed<T>(at<S>(a.key, batch, kv_head, key0), a.key.stride[2], a.key.stride[3], keys, a.width,
                       s.key);
    pack_panels<T>(at<S>(a.value, batch, kv_head, key0), a.value.stride[2], a.value.stride[3], keys,
                   a.value_width, s.value);
  }
  static void tile(const AttentionArgs& a, Scratch& s, const Tile& t, int64_t block, int64_t keys) {
    scores_of<S>(a, t, s.query + block * a.width, s.key, s.scores, s.keys);
    softmax_tile<T>(a, t, Natural<T>{}, s.scores, s.keys, s.scores, s.keys, s.maximum + block,
                    s.total + block, s.rescale, s.words);
    if (one_row_in_place(a))
      add_values_in_place(at<S>(a.value, t.batch, t.head / (a.heads / a.kv_heads), t.column),
                          a.value.stride[2], a.value_width, t.columns, s.scores, s.rescale[0], s.output);
    else
      multiply<false, Update::rescale>(Product<T>{t.rows, s.value_width, t.columns, s.scores, s.keys, s.value,
                                                  keys * kPanel<T>, s.output + block * s.value_width,
                                                  s.value_width, T(1), s.rescale});
  }
};

template <class Storage>
void forward(const AttentionArgs& a, const Threads& threads) {
  run_by_rows<ForwardPass<Storage>>(a, threads);
}

// ---- backward ----

template <class T>
struct BackwardScratch : KeyScratch<T> {
  using Base = KeyScratch<T>;
  using Base::keys, Base::padded, Base::padded_value, Base::rows, Base::stride, Base::value_width,
      Base::width;
  explicit BackwardScratch(const AttentionArgs& a) : Base(a, kBackwardRows) {}
  void place(Scratch& s) {
    Base::place(s);
    query = s.take<T>(rows * width);
    query_panels = s.take<T>(rows * padded);
    grad = s.take<T>(rows * value_width);
    grad_panels = s.take<T>(rows * padded_value);
    key = s.take<T>(keys * width);
    key_panels = s.take<T>(keys * padded);
    value = s.take<T>(keys * value_width);
    scores = s.take<T>(rows * stride);
    grad_scores = s.take<T>(rows * stride);
    delta = s.take<T>(rows);
    this->bias_scores = grad_scores;
  }
  T *query, *query_panels, *grad, *grad_panels, *key, *key_panels, *value, *scores, *grad_scores, *delta;
};

template <class Storage, class T>
void pack_backward_keys(const AttentionArgs& a, BackwardScratch<T>& s, int64_t batch, int64_t kv_head,
                        int64_t key0, int64_t keys) {
  const Storage* key = at<Storage>(a.key, batch, kv_head, key0);
  if (!one_row_in_place(a)) pack_transposed<T>(key, a.key.stride[2], a.key.stride[3], keys, a.width, s.key);
  pack_panels<T>(key, a.key.stride[2], a.key.stride[3], keys, a.width, s.key_panels);
  pack_transposed<T>(at<Storage>(a.value, batch, kv_head, key0), a.value.stride[2], a.value.stride[3], keys,
                     a.value_width, s.value);
}

// Packs the tile's query rows and output gradients, and computes P (dropped and rescaled) in `scores` and
// dS in `grad_scores`.
template <class Storage, class T>
void backward_tile(const AttentionArgs& a, BackwardScratch<T>& s, const Tile& t) {
  const int64_t panel = kPanel<T>, padded = whole_panels<T>(t.columns);
  const Storage* query = at<Storage>(a.query, t.batch, t.head, t.row);
  const Storage* grad = at<Storage>(a.grad_output, t.batch, t.head, t.row);
  pack_rows<T>(query, a.query.stride[2], a.query.stride[3], t.rows, a.width, s.query);
  pack_panels<T>(query, a.query.stride[2], a.query.stride[3], t.rows, a.width, s.query_panels);
  pack_rows<T>(grad, a.grad_output.stride[2], a.grad_output.stride[3], t.rows, a.value_width, s.grad);
  pack_panels<T>(grad, a.grad_output.stride[2], a.grad_output.stride[3], t.rows, a.value_width,
                 s.grad_panels);
  // A tile that has the whole row sums them up itself (score_gradients).
  for (int64_t r = 0; a.columns > kKeyBlock && r < t.rows; ++r)
    s.delta[r] = dot<T>(s.grad + r * a.value_width, at<Storage>(a.saved_output, t.batch, t.head, t.row + r),
                        a.saved_output.stride[3], a.value_width);

  scores_of<Storage>(a, t, s.query, s.key, s.scores, s.stride);
  multiply<false, Update::set>(Product<T>{t.rows, padded, a.value_width, s.grad, a.value_width, s.value,
                                          a.value_width * panel, s.grad_scores, s.stride});

  score_gradients<T>(a, t, s.scores, s.grad_scores, s.stride, s.delta, s.words);
}

template <class S>
struct BackwardPass {
  using Storage = S;
  using T = Accumulate<S>;
  using Scratch = BackwardScratch<T>;
  static constexpr int64_t kRows = kBackwardRows, panel = kPanel<T>;

  static void pack_keys(const AttentionArgs& a, Scratch& s, int64_t batch, int64_t kv_head, int64_t key0,
                        int64_t keys) {
    pack_backward_keys<S>(a, s, batch, kv_head, key0, keys);
  }
  static void tile(const AttentionArgs& a, Scratch& s, const Tile& t) { backward_tile<S>(a, s, t); }
  static void key_gradients(const AttentionArgs&, Scratch& s, const Tile& t) {
    multiply<true, Update::add>(Product<T>{t.columns, s.padded_value, t.rows, s.scores, s.stride,
                                           s.grad_panels, t.rows * panel, s.grad_value, s.padded_value});
    multiply<true, Update::add>(Product<T>{t.columns, s.padded, t.rows, s.grad_scores, s.stride,
                                           s.query_panels, t.rows * panel, s.grad_key, s.padded});
  }
  static void query_gradient(const AttentionArgs& a, Scratch& s, const Tile& t, int64_t keys, QuerySum<T> sum,
                             bool first) {
    Product<T> product{t.rows,       a.width,      t.columns, s.grad_scores, s.stride,
                       s.key_panels, keys * panel, sum.data,  sum.stride};
    if (first)
      multiply<false, Update::set>(product);
    else
      multiply<false, Update::add>(product);
  }
};

template <class Storage>
void backward(const AttentionArgs& a, const Threads& threads) {
  run_by_keys<BackwardPass<Storage>>(a, threads, 3 * a.width + 2 * a.value_width);
}

}  // namespace

FASTGAN_ATTENTION_ENTRY(attention_forward, forward)
FASTGAN_ATTENTION_ENTRY(attention_backward, backward)
