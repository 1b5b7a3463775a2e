// Attention on the CPU, forward and backward, in memory linear in the sequence.
//
// Forward. A piece of work is one head of one batch and up to kForwardChunk query rows. For each block of
// keys, packed once for the piece, and each block of query rows: scores S = Q Kᵀ (a tile that stays in L2),
// bias, masks, the row maximum, P = exp(S − maximum), and O ← O · exp(old maximum − maximum) + P V; at the
// end O is divided by the row sums. Subtracting the running maximum keeps exp in range; the row's log-sum-exp
// is all that the backward needs.
//
// Backward. With D = rowsum(dO ∘ O):  P = exp(S − lse),  dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ − D),  dQ = dS K,  dK =
// dSᵀ Q. A piece is one key head of one batch (or a range of its keys where these are too few to keep threads
// busy, with a partial dQ each, added in order afterwards): blocks of keys outside, so that dK and dV are
// summed in scratch and written once, all query rows of all the heads that share them inside. dQ is added to
// in place. The gradient of a bias may be summed over batches and heads, which belong to several pieces; it
// has a pass of its own over its tiles.
//
// Blocks in which nothing is visible under is_causal are skipped, and the ones on the diagonal are cut at it.
// A dead row (all scores −inf) has maximum −inf, and −inf − (−inf) is NaN: 0 is subtracted there instead,
// +inf in the backward, so that P is exactly 0. A NaN score is no maximum, but goes through exp into the
// row's sum, and so to the whole row.
//
// Dropout: P is kept or dropped by the word that Philox gives for its place, in both passes the same; row
// sums are over what is not dropped yet. Inputs of half precision are packed as float32. All work is cut by
// shape alone and sums have one order, so that the result has the same bits for every number of threads.
#include <cstdlib>

#include "attention/attention.h"
#include "common/gemm.h"
#include "common/philox.h"

namespace {

using namespace fastgan;

constexpr int64_t kForwardChunk = 192, kForwardRows = 48, kForwardKeys = 256;
constexpr int64_t kBackwardRows = 96, kBackwardKeys = kAttentionKeyBlock;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
T infinity() {
  return T(__builtin_inf());
}

// One allocation for all the scratch of a piece: count first, then take.
struct Scratch {
  char* memory = nullptr;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* at = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
    used += (count * int64_t(sizeof(T)) + 127) / 64 * 64;
    return at;
  }
};

template <class Layout>
bool allocate(Layout& layout, const AttentionArgs& args) {
  Scratch scratch;
  layout.place(scratch);
  scratch.memory = static_cast<char*>(std::aligned_alloc(64, size_t((scratch.used + 127) / 64 * 64)));
  if (!scratch.memory) {
    if (args.out_of_memory) __atomic_store_n(args.out_of_memory, true, __ATOMIC_RELAXED);
    return false;
  }
  scratch.used = 0;
  layout.place(scratch);
  layout.memory = scratch.memory;
  return true;
}

template <class Storage>
const Storage* at(const AttentionInput& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const Storage*>(x.data) + batch * x.stride[0] + head * x.stride[1] + row * x.stride[2];
}

template <class Storage>
Storage* at(const AttentionOutput& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<Storage*>(x.data) + batch * x.stride[0] + head * x.stride[1] + row * x.stride[2];
}

template <class T, class Storage>
void store_row(const T* from, T factor, int64_t count, Storage* to) {
  int64_t c = 0;
  for (; c + lanes<T> <= count; c += lanes<T>) store(to + c, load<T>(from + c) * factor);
  for (; c < count; ++c) store1(to + c, from[c] * factor);
}

// exp for x <= 88: what comes in is a score less its row's maximum or log-sum-exp. Without the upper half of
// vector.h's exp, and zero where the result would be denormal; NaN stays NaN.
FASTGAN_INLINE Vec<float> exp_of_difference(Vec<float> x) {
  constexpr float kShift = 12582912.0f, kLowest = -87.33f;
  Vec<float> shifted = x * 1.44269504088896341f + kShift;
  Vec<float> n = shifted - kShift;
  Vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // The integer n is in the low bits of shifted; the shift leaves nothing else.
  p = (Vec<float>)((Mask<float>)p + ((Mask<float>)shifted << 23));
  p = select(x == x, p, x);
  return select(x < kLowest, Vec<float>{}, p);
}
FASTGAN_INLINE Vec<double> exp_of_difference(Vec<double> x) { return exp(x); }

// ---- a tile of scores: bias, masks ----

template <class T>
FASTGAN_INLINE Mask<T> load_mask(const uint8_t* p) {
  typedef uint8_t Bytes __attribute__((vector_size(lanes<T>)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Mask<T>) != 0;
}

template <class T, class BiasStorage>
void add_bias(T* scores, int64_t count, const BiasStorage* bias, int64_t stride) {
  int64_t c = 0;
  if (stride == 1)
    for (; c + lanes<T> <= count; c += lanes<T>) store(scores + c, load<T>(scores + c) + load<T>(bias + c));
  for (; c < count; ++c) scores[c] += load1<T>(bias + c * stride);
}

template <class T>
void apply_mask(T* scores, int64_t count, const uint8_t* mask, int64_t stride) {
  const Vec<T> hidden = broadcast<T>(-infinity<T>());
  int64_t c = 0;
  if (stride == 1)
    for (; c + lanes<T> <= count; c += lanes<T>)
      store(scores + c, select(load_mask<T>(mask + c), load<T>(scores + c), hidden));
  for (; c < count; ++c)
    if (!mask[c * stride]) scores[c] = -infinity<T>();
}

struct Tile {
  int64_t batch, head, row, column;  // of its first number
  int64_t rows, columns;             // columns rounded up to whole vectors hold −inf
};

template <class Storage, class T>
void apply_bias_and_masks(const AttentionArgs& a, const Tile& t, T* scores, int64_t stride) {
  int64_t padded = whole_panels<T>(t.columns);
  for (int64_t r = 0; r < t.rows; ++r, scores += stride) {
    int64_t row = t.row + r;
    if (a.bias.data) {
      int64_t step = a.bias.stride[3];
      if (a.bias_dtype == a.dtype)
        add_bias<T>(scores, t.columns, at<Storage>(a.bias, t.batch, t.head, row) + t.column * step, step);
      else if constexpr (sizeof(Storage) == 2)
        add_bias<T>(scores, t.columns, at<float>(a.bias, t.batch, t.head, row) + t.column * step, step);
    }
    if (a.mask.data) {
      int64_t step = a.mask.stride[3];
      apply_mask<T>(scores, t.columns, at<uint8_t>(a.mask, t.batch, t.head, row) + t.column * step, step);
    }
    int64_t visible = t.columns;
    if (a.is_causal) visible = smaller(visible, row + 1 > t.column ? row + 1 - t.column : 0);
    for (int64_t c = visible; c < padded; ++c) scores[c] = -infinity<T>();
  }
}

template <class T>
FASTGAN_INLINE Mask<T> kept(const uint32_t* words, uint32_t threshold) {
  typedef uint32_t Words __attribute__((vector_size(lanes<T> * 4)));
  Words w;
  std::memcpy(&w, words, sizeof w);
  return __builtin_convertvector(w >= threshold, Mask<T>);
}

void draw(const AttentionArgs& a, const Tile& t, int64_t r, uint32_t* words) {
  philox_row(words, t.columns, a.seed, a.offset, uint32_t(t.batch * a.heads + t.head), uint32_t(t.row + r),
             uint32_t(t.column / 4));
}

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

// P = exp(S − maximum) in place; updates the rows' maxima and sums, and leaves in `rescale` what O is to be
// scaled by.
template <class T>
void softmax_tile(const AttentionArgs& a, const Tile& t, T* scores, int64_t stride, T* maximum, T* total,
                  T* rescale, uint32_t* words) {
  constexpr int W = lanes<T>;
  int64_t padded = whole_panels<T>(t.columns);
  for (int64_t r = 0; r < t.rows; ++r, scores += stride) {
    Vec<T> first = broadcast<T>(-infinity<T>()), second = first;
    for (int64_t c = 0; c < padded; c += 2 * W) {
      first = max(load<T>(scores + c), first);
      second = max(load<T>(scores + c + W), second);
    }
    T before = maximum[r], now = fastgan::maximum<T>(max(first, second));
    if (!(now > before)) now = before;
    T subtracted = now == -infinity<T>() ? T(0) : now;
    if (a.has_dropout) draw(a, t, r, words);
    Vec<T> sum0{}, sum1{};
    for (int64_t c = 0; c < padded; c += 2 * W) {
      Vec<T> p0 = exp_of_difference(load<T>(scores + c) - subtracted);
      Vec<T> p1 = exp_of_difference(load<T>(scores + c + W) - subtracted);
      sum0 += p0;
      sum1 += p1;
      if (a.has_dropout) {
        p0 = select(kept<T>(words + c, a.threshold), p0, Vec<T>{});
        p1 = select(kept<T>(words + c + W, a.threshold), p1, Vec<T>{});
      }
      store(scores + c, p0);
      store(scores + c + W, p1);
    }
    T scale = exp_of_difference(broadcast<T>(before - subtracted))[0];
    rescale[r] = scale;
    total[r] = total[r] * scale + sum<T>(sum0 + sum1);
    maximum[r] = now;
  }
}

template <class Storage, class T>
void forward_piece(const AttentionArgs& a, ForwardScratch<T>& s, int64_t batch, int64_t head, int64_t row0,
                   int64_t rows) {
  const int64_t kv_head = head / (a.heads / a.kv_heads), panel = kPanel<T>;
  pack_rows<T>(at<Storage>(a.query, batch, head, row0), a.query.stride[2], a.query.stride[3], rows, a.width,
               s.query);
  for (int64_t r = 0; r < rows; ++r) s.maximum[r] = -infinity<T>(), s.total[r] = T(0);
  for (int64_t i = 0; i < rows * s.value_width; ++i) s.output[i] = T(0);

  int64_t end = a.is_causal ? smaller(a.columns, row0 + rows) : a.columns;
  for (int64_t key0 = 0; key0 < end; key0 += kForwardKeys) {
    int64_t keys = smaller(kForwardKeys, end - key0);
    pack_transposed<T>(at<Storage>(a.key, batch, kv_head, key0), a.key.stride[2], a.key.stride[3], keys,
                       a.width, s.key);
    pack_panels<T>(at<Storage>(a.value, batch, kv_head, key0), a.value.stride[2], a.value.stride[3], keys,
                   a.value_width, s.value);
    for (int64_t block = 0; block < rows; block += kForwardRows) {
      Tile t{batch, head, row0 + block, key0, smaller(kForwardRows, rows - block), keys};
      if (a.is_causal) t.columns = smaller(keys, t.row + t.rows - key0);
      if (t.columns <= 0) continue;
      multiply<false, Update::scale>(Product<T>{t.rows, whole_panels<T>(t.columns), a.width,
                                                s.query + block * a.width, a.width, s.key, a.width * panel,
                                                s.scores, s.keys, T(a.scale)});
      bool crosses = a.is_causal && t.column + t.columns > t.row + 1;
      if (a.bias.data || a.mask.data || crosses || t.columns % panel)
        apply_bias_and_masks<Storage>(a, t, s.scores, s.keys);
      softmax_tile<T>(a, t, s.scores, s.keys, s.maximum + block, s.total + block, s.rescale, s.words);
      multiply<false, Update::rescale>(Product<T>{t.rows, s.value_width, t.columns, s.scores, s.keys, s.value,
                                                  keys * panel, s.output + block * s.value_width,
                                                  s.value_width, T(1), s.rescale});
    }
  }
  T kept_scale = a.has_dropout ? T(a.kept_scale) : T(1);
  double* logsumexp = a.logsumexp + (batch * a.heads + head) * a.rows + row0;
  for (int64_t r = 0; r < rows; ++r) {
    bool dead = s.total[r] == T(0);
    T factor = dead ? T(0) : kept_scale / s.total[r];
    store_row<T>(s.output + r * s.value_width, factor, a.value_width,
                 at<Storage>(a.output, batch, head, row0 + r));
    logsumexp[r] = dead ? -infinity<double>() : double(s.maximum[r]) + std::log(double(s.total[r]));
  }
}

// Threads are woken for not less than this many multiply-adds.
inline int64_t grain(int64_t cost) { return 1 + 200000 / (cost + 1); }

template <class Storage>
void forward(const AttentionArgs& a, const Threads& threads) {
  using T = Accumulate<Storage>;
  int64_t chunks = (a.rows + kForwardChunk - 1) / kForwardChunk;
  int64_t cost = smaller(a.rows, kForwardChunk) * a.columns * (a.width + a.value_width + 16);
  parallel_for(threads, a.batch * a.heads * chunks, grain(cost), [&](int64_t begin, int64_t end) {
    ForwardScratch<T> scratch(a);
    if (!allocate(scratch, a)) return;
    for (int64_t piece = begin; piece < end; ++piece) {
      int64_t pair = piece / chunks, chunk = piece % chunks;
      // Under is_causal late chunks cost more: one from the front and one from the back in turn.
      if (a.is_causal) chunk = chunk % 2 ? chunks - 1 - chunk / 2 : chunk / 2;
      int64_t row = chunk * kForwardChunk;
      forward_piece<Storage, T>(a, scratch, pair / a.heads, pair % a.heads, row,
                                smaller(kForwardChunk, a.rows - row));
    }
    std::free(scratch.memory);
  });
}

// ---- backward ----

template <class T>
struct BackwardScratch {
  explicit BackwardScratch(const AttentionArgs& a)
      : rows(smaller(a.rows, kBackwardRows)),
        keys(whole_panels<T>(smaller(a.columns, kBackwardKeys))),
        stride(keys +
               kPanel<T>),  // off a power of two: columns of P are read, and would share few cache sets
        width(a.width),
        value_width(a.value_width),
        padded(whole_panels<T>(a.width)),
        padded_value(whole_panels<T>(a.value_width)) {}
  void place(Scratch& s) {
    query = s.take<T>(rows * width);
    query_panels = s.take<T>(rows * padded);
    grad = s.take<T>(rows * value_width);
    grad_panels = s.take<T>(rows * padded_value);
    key = s.take<T>(keys * width);
    key_panels = s.take<T>(keys * padded);
    value = s.take<T>(keys * value_width);
    scores = s.take<T>(rows * stride);
    grad_scores = s.take<T>(rows * stride);
    grad_key = s.take<T>(keys * padded);
    grad_value = s.take<T>(keys * padded_value);
    delta = s.take<T>(rows);
    words = s.take<uint32_t>(keys + kPhiloxStep);
  }
  int64_t rows, keys, stride, width, value_width, padded, padded_value;
  void* memory = nullptr;
  T *query, *query_panels, *grad, *grad_panels, *key, *key_panels, *value, *scores, *grad_scores, *grad_key,
      *grad_value, *delta;
  uint32_t* words;
};

template <class T, class Storage>
T dot(const T* x, const Storage* y, int64_t stride, int64_t count) {
  Vec<T> sums{};
  int64_t c = 0;
  if (stride == 1)
    for (; c + lanes<T> <= count; c += lanes<T>) sums += load<T>(x + c) * load<T>(y + c);
  T out = sum<T>(sums);
  for (; c < count; ++c) out += x[c] * load1<T>(y + c * stride);
  return out;
}

template <class Storage, class T>
void pack_keys(const AttentionArgs& a, BackwardScratch<T>& s, int64_t batch, int64_t kv_head, int64_t key0,
               int64_t keys) {
  const Storage* key = at<Storage>(a.key, batch, kv_head, key0);
  pack_transposed<T>(key, a.key.stride[2], a.key.stride[3], keys, a.width, s.key);
  pack_panels<T>(key, a.key.stride[2], a.key.stride[3], keys, a.width, s.key_panels);
  pack_transposed<T>(at<Storage>(a.value, batch, kv_head, key0), a.value.stride[2], a.value.stride[3], keys,
                     a.value_width, s.value);
}

// Packs the tile's query rows and output gradients, and computes P (dropped and rescaled) in `scores` and
// scale · dS in `grad_scores`.
template <class Storage, class T>
void backward_tile(const AttentionArgs& a, BackwardScratch<T>& s, const Tile& t, T scale) {
  constexpr int W = lanes<T>;
  const int64_t panel = kPanel<T>, padded = whole_panels<T>(t.columns);
  const Storage* query = at<Storage>(a.query, t.batch, t.head, t.row);
  const Storage* grad = at<Storage>(a.grad_output, t.batch, t.head, t.row);
  pack_rows<T>(query, a.query.stride[2], a.query.stride[3], t.rows, a.width, s.query);
  pack_panels<T>(query, a.query.stride[2], a.query.stride[3], t.rows, a.width, s.query_panels);
  pack_rows<T>(grad, a.grad_output.stride[2], a.grad_output.stride[3], t.rows, a.value_width, s.grad);
  pack_panels<T>(grad, a.grad_output.stride[2], a.grad_output.stride[3], t.rows, a.value_width,
                 s.grad_panels);
  // D in two ways. Where the tile has the whole row it is summed up from P ∘ dP, the numbers that it is
  // subtracted from: a weight of 1 then has a gradient of exactly 0, as it must. Otherwise from dO ∘ O, equal
  // but for rounding.
  const bool whole_row = a.columns <= kBackwardKeys;
  for (int64_t r = 0; !whole_row && r < t.rows; ++r)
    s.delta[r] = dot<T>(s.grad + r * a.value_width, at<Storage>(a.saved_output, t.batch, t.head, t.row + r),
                        a.saved_output.stride[3], a.value_width);

  multiply<false, Update::scale>(Product<T>{t.rows, padded, a.width, s.query, a.width, s.key, a.width * panel,
                                            s.scores, s.stride, T(a.scale)});
  multiply<false, Update::set>(Product<T>{t.rows, padded, a.value_width, s.grad, a.value_width, s.value,
                                          a.value_width * panel, s.grad_scores, s.stride});
  bool crosses = a.is_causal && t.column + t.columns > t.row + 1;
  if (a.bias.data || a.mask.data || crosses || t.columns % panel)
    apply_bias_and_masks<Storage>(a, t, s.scores, s.stride);

  const double* logsumexp = a.logsumexp + (t.batch * a.heads + t.head) * a.rows + t.row;
  const T kept_scale = T(a.kept_scale);
  for (int64_t r = 0; r < t.rows; ++r) {
    T* scores = s.scores + r * s.stride;
    T* grads = s.grad_scores + r * s.stride;
    // In two parts: the first difference is exact or nearly so where P is not negligible.
    T subtracted = logsumexp[r] == -infinity<double>() ? infinity<T>() : T(logsumexp[r]);
    T remainder = subtracted == infinity<T>() ? T(0) : T(logsumexp[r] - double(subtracted));
    if (a.has_dropout) draw(a, t, r, s.words);
    Vec<T> sums{};
    for (int64_t c = 0; c < padded; c += W) {
      Vec<T> p = exp_of_difference(load<T>(scores + c) - subtracted - remainder), g = load<T>(grads + c);
      if (a.has_dropout) g = select(kept<T>(s.words + c, a.threshold), g * kept_scale, Vec<T>{});
      sums += p * g;
      store(scores + c, p);
      store(grads + c, g);
    }
    T delta = whole_row ? sum<T>(sums) : s.delta[r];
    for (int64_t c = 0; c < padded; c += W) {
      Vec<T> p = load<T>(scores + c);
      store(grads + c, p * (load<T>(grads + c) - delta) * scale);
      if (a.has_dropout)
        store(scores + c, select(kept<T>(s.words + c, a.threshold), p * kept_scale, Vec<T>{}));
    }
  }
}

// Where the gradient of query is summed up: in place, or in the workspace.
template <class T>
struct QuerySum {
  T* data;
  int64_t stride;
};

template <class Storage, class T>
QuerySum<T> query_sum(const AttentionArgs& a, int64_t chunk, int64_t batch, int64_t head, int64_t row) {
  if (a.workspace) {
    int64_t index = ((chunk * a.batch + batch) * a.heads + head) * a.rows + row;
    return {static_cast<T*>(a.workspace) + index * a.width, a.width};
  }
  return {reinterpret_cast<T*>(at<Storage>(a.grad_query, batch, head, row)), a.grad_query.stride[2]};
}

template <class Storage, class T>
void backward_piece(const AttentionArgs& a, BackwardScratch<T>& s, int64_t batch, int64_t kv_head,
                    int64_t chunk, int64_t first_key, int64_t end_key) {
  const int64_t group = a.heads / a.kv_heads, panel = kPanel<T>;
  for (int64_t key0 = first_key; key0 < end_key; key0 += kBackwardKeys) {
    int64_t keys = smaller(kBackwardKeys, end_key - key0);
    pack_keys<Storage>(a, s, batch, kv_head, key0, keys);
    for (int64_t i = 0; i < keys * s.padded; ++i) s.grad_key[i] = T(0);
    for (int64_t i = 0; i < keys * s.padded_value; ++i) s.grad_value[i] = T(0);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      for (int64_t row = a.is_causal ? key0 : 0; row < a.rows; row += kBackwardRows) {
        Tile t{batch, head, row, key0, smaller(kBackwardRows, a.rows - row), keys};
        if (a.is_causal) t.columns = smaller(keys, row + t.rows - key0);
        backward_tile<Storage>(a, s, t, T(a.scale));
        multiply<true, Update::add>(Product<T>{t.columns, s.padded_value, t.rows, s.scores, s.stride,
                                               s.grad_panels, t.rows * panel, s.grad_value, s.padded_value});
        multiply<true, Update::add>(Product<T>{t.columns, s.padded, t.rows, s.grad_scores, s.stride,
                                               s.query_panels, t.rows * panel, s.grad_key, s.padded});
        QuerySum<T> sum = query_sum<Storage, T>(a, chunk, batch, head, row);
        Product<T> grad_query{t.rows,       a.width,      t.columns, s.grad_scores, s.stride,
                              s.key_panels, keys * panel, sum.data,  sum.stride};
        if (key0 == first_key)
          multiply<false, Update::set>(grad_query);
        else
          multiply<false, Update::add>(grad_query);
      }
    for (int64_t k = 0; k < keys; ++k) {
      store_row<T>(s.grad_key + k * s.padded, T(1), a.width,
                   at<Storage>(a.grad_key, batch, kv_head, key0 + k));
      store_row<T>(s.grad_value + k * s.padded_value, T(1), a.value_width,
                   at<Storage>(a.grad_value, batch, kv_head, key0 + k));
    }
  }
}

// Keys of a chunk begin here, at a whole block.
inline int64_t chunk_begin(const AttentionArgs& a, int64_t chunks, int64_t chunk) {
  int64_t blocks = (a.columns + kBackwardKeys - 1) / kBackwardKeys;
  return smaller(a.columns, blocks * chunk / chunks * kBackwardKeys);
}

template <class Storage, class T>
void add_partial_gradients(const AttentionArgs& a, int64_t chunks, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    int64_t row = index % a.rows, head = index / a.rows % a.heads, batch = index / a.rows / a.heads;
    Storage* out = at<Storage>(a.grad_query, batch, head, row);
    // Under is_causal a row has no partial gradient from keys behind it.
    int64_t seen = 0;
    while (seen < chunks && (!a.is_causal || chunk_begin(a, chunks, seen) <= row)) ++seen;
    T* total = query_sum<Storage, T>(a, 0, batch, head, row).data;
    for (int64_t chunk = 1; chunk < seen; ++chunk) {
      const T* part = query_sum<Storage, T>(a, chunk, batch, head, row).data;
      for (int64_t c = 0; c < a.width; ++c) total[c] += part[c];
    }
    store_row<T>(total, T(1), a.width, out);
  }
}

template <class Storage>
void bias_gradient(const AttentionArgs& a, const Threads& threads);

template <class Storage>
void backward(const AttentionArgs& a, const Threads& threads) {
  using T = Accumulate<Storage>;
  int64_t chunks = attention_key_chunks(a);
  int64_t cost = a.rows * (a.columns / chunks) * (3 * a.width + 2 * a.value_width + 32) *
                 (a.heads / (a.kv_heads + !a.kv_heads));
  if (a.columns == 0) {  // grad_query alone has elements, and perhaps grad_bias
    if (a.grad_bias) bias_gradient<Storage>(a, threads);
    parallel_for(threads, a.batch * a.heads * a.rows, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Storage* out = at<Storage>(a.grad_query, i / a.rows / a.heads, i / a.rows % a.heads, i % a.rows);
        for (int64_t c = 0; c < a.width; ++c) store1(out + c, T(0));
      }
    });
    return;
  }
  parallel_for(threads, a.batch * a.kv_heads * chunks, grain(cost), [&](int64_t begin, int64_t end) {
    BackwardScratch<T> scratch(a);
    if (!allocate(scratch, a)) return;
    for (int64_t piece = begin; piece < end; ++piece) {
      int64_t pair = piece / chunks, chunk = piece % chunks;
      if (a.is_causal) chunk = chunk % 2 ? chunks - 1 - chunk / 2 : chunk / 2;
      backward_piece<Storage, T>(a, scratch, pair / a.kv_heads, pair % a.kv_heads, chunk,
                                 chunk_begin(a, chunks, chunk), chunk_begin(a, chunks, chunk + 1));
    }
    std::free(scratch.memory);
  });
  if (a.workspace)
    parallel_for(
        threads, a.batch * a.heads * a.rows, 1 + 65536 / (a.width * chunks + 1),
        [&](int64_t begin, int64_t end) { add_partial_gradients<Storage, T>(a, chunks, begin, end); });
  if (a.grad_bias) bias_gradient<Storage>(a, threads);
}

// ---- the gradient of the bias: dS, summed over what the bias was broadcast over ----

template <class T>
struct BiasScratch : BackwardScratch<T> {
  using BackwardScratch<T>::BackwardScratch;
  void place(Scratch& s) {
    BackwardScratch<T>::place(s);
    sums = s.take<T>(this->rows * this->stride);
  }
  T* sums;
};

template <class Storage, class T, class BiasStorage>
void bias_piece(const AttentionArgs& a, BiasScratch<T>& s, int64_t piece, int64_t row_blocks,
                int64_t key_blocks) {
  const int64_t* size = a.bias_size;
  const int64_t group = a.heads / a.kv_heads;
  int64_t key_block = piece % key_blocks, row_block = piece / key_blocks % row_blocks;
  int64_t head = piece / key_blocks / row_blocks % size[1], batch = piece / key_blocks / row_blocks / size[1];
  // What is summed here: a range of each dimension, whole where the bias has size 1.
  int64_t batches = size[0] == 1 ? a.batch : 1, heads = size[1] == 1 ? a.heads : 1;
  int64_t row_end = size[2] == 1 ? a.rows : smaller(a.rows, (row_block + 1) * kBackwardRows);
  int64_t key_end = size[3] == 1 ? a.columns : smaller(a.columns, (key_block + 1) * kBackwardKeys);
  for (int64_t i = 0; i < s.rows * s.stride; ++i) s.sums[i] = T(0);
  for (int64_t b = batch; b < batch + batches; ++b)
    for (int64_t h = head; h < head + heads; ++h)
      for (int64_t key0 = key_block * kBackwardKeys; key0 < key_end; key0 += kBackwardKeys) {
        int64_t keys = smaller(kBackwardKeys, key_end - key0);
        pack_keys<Storage>(a, s, b, h / group, key0, keys);
        for (int64_t row = row_block * kBackwardRows; row < row_end; row += kBackwardRows) {
          Tile t{b, h, row, key0, smaller(kBackwardRows, row_end - row), keys};
          if (a.is_causal && row + t.rows <= key0) continue;
          backward_tile<Storage>(a, s, t, T(1));
          for (int64_t r = 0; r < t.rows; ++r)
            for (int64_t c = 0; c < keys; ++c) s.sums[r * s.stride + c] += s.grad_scores[r * s.stride + c];
        }
      }
  int64_t rows = size[2] == 1 ? smaller(a.rows, kBackwardRows) : row_end - row_block * kBackwardRows;
  int64_t keys = size[3] == 1 ? smaller(a.columns, kBackwardKeys) : key_end - key_block * kBackwardKeys;
  if (size[2] == 1)
    for (int64_t r = 1; r < rows; ++r)
      for (int64_t c = 0; c < keys; ++c) s.sums[c] += s.sums[r * s.stride + c];
  if (size[2] == 1) rows = 1;
  if (size[3] == 1)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 1; c < keys; ++c) s.sums[r * s.stride] += s.sums[r * s.stride + c];
  if (size[3] == 1) keys = 1;
  int64_t row0 = row_block * kBackwardRows, key0 = key_block * kBackwardKeys;
  auto* out =
      static_cast<BiasStorage*>(a.grad_bias) + ((batch * size[1] + head) * size[2] + row0) * size[3] + key0;
  for (int64_t r = 0; r < rows; ++r) store_row<T>(s.sums + r * s.stride, T(1), keys, out + r * size[3]);
}

template <class Storage>
void bias_gradient(const AttentionArgs& a, const Threads& threads) {
  using T = Accumulate<Storage>;
  const int64_t* size = a.bias_size;
  if (a.batch * a.heads * a.rows * a.columns == 0) {  // a sum over nothing, if there is an element at all
    int64_t count = size[0] * size[1] * size[2] * size[3],
            bytes = a.bias_dtype == Dtype::float32 ? 4 : int64_t(sizeof(Storage));
    std::memset(a.grad_bias, 0, size_t(count * bytes));
    return;
  }
  int64_t row_blocks = (size[2] + kBackwardRows - 1) / kBackwardRows;
  int64_t key_blocks = (size[3] + kBackwardKeys - 1) / kBackwardKeys;
  int64_t cost = a.batch * a.heads * a.rows * a.columns / (size[0] * size[1] * row_blocks * key_blocks) *
                 (a.width + a.value_width);
  parallel_for(threads, size[0] * size[1] * row_blocks * key_blocks, grain(cost),
               [&](int64_t begin, int64_t end) {
                 BiasScratch<T> scratch(a);
                 if (!allocate(scratch, a)) return;
                 for (int64_t piece = begin; piece < end; ++piece) {
                   if (a.bias_dtype == a.dtype)
                     bias_piece<Storage, T, Storage>(a, scratch, piece, row_blocks, key_blocks);
                   else if constexpr (sizeof(Storage) == 2)
                     bias_piece<Storage, T, float>(a, scratch, piece, row_blocks, key_blocks);
                 }
                 std::free(scratch.memory);
               });
}

}  // namespace

extern "C" void FASTGAN_KERNEL(attention_forward)(const AttentionArgs& args, const Threads& threads) {
  switch (args.dtype) {
    case Dtype::float32:
      return forward<float>(args, threads);
    case Dtype::float64:
      return forward<double>(args, threads);
    case Dtype::bfloat16:
      return forward<bfloat16>(args, threads);
    case Dtype::float16:
      return forward<float16>(args, threads);
  }
}

extern "C" void FASTGAN_KERNEL(attention_backward)(const AttentionArgs& args, const Threads& threads) {
  switch (args.dtype) {
    case Dtype::float32:
      return backward<float>(args, threads);
    case Dtype::float64:
      return backward<double>(args, threads);
    case Dtype::bfloat16:
      return backward<bfloat16>(args, threads);
    case Dtype::float16:
      return backward<float16>(args, threads);
  }
}
