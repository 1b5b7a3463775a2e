// What the attention kernels share: scratch, and a tile of scores with its bias, masks and dropout. What is
// hidden from all rows of a tile is found here, too, so that it is neither packed nor multiplied.
#pragma once
#include <cstdlib>

#include "attention/attention.h"
#include "common/gemm.h"
#include "common/philox.h"

namespace fastgan {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
T infinity() {
  return T(__builtin_inf());
}

// One allocation for all the scratch of a thread's pieces: count first, then take. A layout that has them is
// told when the thread begins and when it ends.
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
  if constexpr (requires { layout.begin(); }) layout.begin();
  return true;
}

template <class Layout>
void release(Layout& layout) {
  if constexpr (requires { layout.end(); }) layout.end();
  std::free(layout.memory);
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

template <class T, class X, class Storage>
T dot(const X* x, const Storage* y, int64_t stride, int64_t count) {
  Vec<T> sums{};
  int64_t c = 0;
  if (stride == 1)
    for (; c + lanes<T> <= count; c += lanes<T>) sums += load<T>(x + c) * load<T>(y + c);
  T out = sum<T>(sums);
  for (; c < count; ++c) out += load1<T>(x + c) * load1<T>(y + c * stride);
  return out;
}

// Threads are woken for not less than this many multiply-adds.
inline int64_t grain(int64_t cost) { return 1 + 200000 / (cost + 1); }

// How a sequence is cut: pieces of equal size, more or less, and the multiply-adds of one.
struct Pieces {
  int64_t count, cost;
};

// Under is_causal late chunks of rows cost more, and so do early ones of keys: one from the front and one
// from the back in turn.
inline int64_t in_turn(const AttentionArgs& a, int64_t chunk, int64_t chunks) {
  return !a.is_causal ? chunk : chunk % 2 ? chunks - 1 - chunk / 2 : chunk / 2;
}

template <class Storage>
void advance(int64_t rows, AttentionInput& x) {
  if (x.data) x.data = static_cast<const Storage*>(x.data) + rows * x.stride[2];
}
template <class Storage>
void advance(int64_t rows, AttentionOutput& x) {
  if (x.data) x.data = static_cast<Storage*>(x.data) + rows * x.stride[2];
}
template <class Storage, class... Tensors>
void advance_all(int64_t rows, Tensors&... tensors) {
  (advance<Storage>(rows, tensors), ...);
}

// The packed sequence n by itself. It is still batch n of its call: strides of batches are 0.
template <class Storage>
AttentionArgs sequence_of(const AttentionArgs& a, int64_t n) {
  AttentionArgs one = a;
  const int64_t row = a.row_offset[n], column = a.column_offset[n];
  one.rows = a.row_offset[n + 1] - row;
  one.columns = a.column_offset[n + 1] - column;
  one.diagonal = one.columns - one.rows;
  advance_all<Storage>(row, one.query, one.grad_output, one.saved_output, one.tangent_query, one.output,
                       one.grad_query, one.tangent_output);
  advance_all<Storage>(column, one.key, one.value, one.tangent_key, one.tangent_value, one.grad_key,
                       one.grad_value);
  return one;
}

// All pieces of all sequences in one parallel region: work(for_each) on each of its ranges, in which
// for_each(f) calls f(args, batch, piece). Packed sequences are cut by what pieces cost, so that a long one
// among short ones does not leave all to one thread; a piece belongs to the range that it begins in.
template <class Storage, class Cut, class Work>
void in_pieces(const AttentionArgs& a, const Threads& threads, int64_t sequences, Cut cut, Work work) {
  if (!a.row_offset) {
    const Pieces pieces = cut(a);
    parallel_for(threads, sequences * pieces.count, grain(pieces.cost), [&](int64_t begin, int64_t end) {
      work([&](auto f) {
        for (int64_t i = begin; i < end; ++i) f(a, i / pieces.count, i % pieces.count);
      });
    });
    return;
  }
  auto cut_of = [&](int64_t n) {
    AttentionArgs sizes;
    sizes.batch = a.batch, sizes.heads = a.heads, sizes.kv_heads = a.kv_heads;
    sizes.width = a.width, sizes.value_width = a.value_width;
    sizes.rows = a.row_offset[n + 1] - a.row_offset[n];
    sizes.columns = a.column_offset[n + 1] - a.column_offset[n];
    Pieces pieces = cut(sizes);
    ++pieces.cost;
    return pieces;
  };
  int64_t all = 0;
  for (int64_t n = 0; n < sequences; ++n) all += cut_of(n).count * cut_of(n).cost;
  parallel_for(threads, all, 200000, [&](int64_t begin, int64_t end) {
    work([&](auto f) {
      for (int64_t n = 0, before = 0; n < sequences && before < end; ++n) {
        const Pieces pieces = cut_of(n);
        int64_t i = before < begin ? (begin - before + pieces.cost - 1) / pieces.cost : 0;
        if (i < pieces.count) {
          const AttentionArgs one = sequence_of<Storage>(a, n);
          for (; i < pieces.count && before + i * pieces.cost < end; ++i) f(one, n, i);
        }
        before += pieces.count * pieces.cost;
      }
    });
  });
}

// exp for x <= 88: what comes in is a score less its row's maximum or log-sum-exp. At most 1 ulp from the
// exact value, exactly 1 at 0, and zero below -87.33, where the result would be denormal; NaN stays NaN.
// Against vector.h's exp it has no upper half, a polynomial of one degree less (minimax, 2e-9), and NaN costs
// nothing: it goes through the last multiplication.
FASTGAN_INLINE Vec<float> exp_of_difference(Vec<float> x) {
  constexpr float kShift = 12582912.0f, kLowest = -87.33f;
  Vec<float> shifted = x * 1.44269504088896341f + kShift;
  Vec<float> n = shifted - kShift;
  Vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> p = r * 1.3814539416e-3f + 8.3687454462e-3f;
  p = p * r + 4.1668388993e-2f;
  p = p * r + 1.6666521132e-1f;
  p = p * r + 4.9999994040e-1f;
  p = p * (r * r) + r + 1.0f;
  // The integer n is in the low bits of shifted; the shift leaves nothing else.
  Mask<float> power = ((Mask<float>)shifted << 23) + (127 << 23);
  return (Vec<float>)((Mask<float>)(p * (Vec<float>)power) & ~(x < kLowest));
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

// Of the columns from `column` on, how many the rows before `row` see under is_causal.
inline int64_t seen_columns(const AttentionArgs& a, int64_t row, int64_t column) {
  const int64_t end = row + a.diagonal;
  return end > column ? end - column : 0;
}

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
    if (a.is_causal) visible = smaller(visible, seen_columns(a, row + 1, t.column));
    for (int64_t c = visible; c < padded; ++c) scores[c] = -infinity<T>();
  }
}

// Whether there is anything to be done with a tile of scores: bias, masks, or columns beyond its end.
template <class T>
bool has_bias_or_masks(const AttentionArgs& a, const Tile& t) {
  const bool crosses = a.is_causal && t.column + t.columns > t.row + 1 + a.diagonal;
  return a.bias.data || a.mask.data || crosses || t.columns % kPanel<T>;
}

template <class Storage, class T>
void finish_scores(const AttentionArgs& a, const Tile& t, T* scores, int64_t stride) {
  if (has_bias_or_masks<T>(a, t)) apply_bias_and_masks<Storage>(a, t, scores, stride);
}

// Whether keys and values are read where they lie, rows of numbers side by side, for the only query row.
inline bool one_row_in_place(const AttentionArgs& a) {
  return a.rows == 1 && (a.key.stride[3] == 1 || a.width == 1) &&
         (a.value.stride[3] == 1 || a.value_width == 1);
}

// dot(query, row) · scale of key rows in place, four at a time: the chain of additions of one alone would
// wait.
template <class Storage, class T>
void scores_in_place(const T* query, const Storage* key, int64_t stride, int64_t width, int64_t rows, T scale,
                     T* scores) {
  constexpr int W = lanes<T>, N = 4;
  int64_t c = 0;
  for (; c + N <= rows; c += N, key += N * stride) {
    Vec<T> sums[N] = {};
    int64_t e = 0;
    for (; e + W <= width; e += W)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[n] += load<T>(query + e) * load<T>(key + n * stride + e);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      T score = sum<T>(sums[n]);
      for (int64_t rest = e; rest < width; ++rest) score += query[rest] * load1<T>(key + n * stride + rest);
      scores[c + n] = score * scale;
    }
  }
  for (; c < rows; ++c, key += stride) scores[c] = dot<T>(query, key, 1, width) * scale;
}

// The scores of a tile, of packed rows and transposed keys; of the only row, of keys in place. All passes
// take them from here: at scores of 200 a sum in another order than the log-sum-exp's is an error of 1e-4 in
// exp(S − logsumexp).
template <class Storage, class T>
void scores_of(const AttentionArgs& a, const Tile& t, const T* query, const T* key, T* scores,
               int64_t stride) {
  if (one_row_in_place(a)) {
    scores_in_place(query, at<Storage>(a.key, t.batch, t.head / (a.heads / a.kv_heads), t.column),
                    a.key.stride[2], a.width, t.columns, T(a.scale), scores);
    return finish_scores<Storage>(a, t, scores, stride);
  }
  multiply<false, Update::scale>(Product<T>{t.rows, whole_panels<T>(t.columns), a.width, query, a.width, key,
                                            a.width * kPanel<T>, scores, stride, T(a.scale)});
  finish_scores<Storage>(a, t, scores, stride);
}

void draw(const AttentionArgs& a, const Tile& t, int64_t r, uint32_t* words) {
  philox_row(words, t.columns, a.seed, a.offset, uint32_t(t.batch * a.heads + t.head), uint32_t(t.row + r),
             uint32_t(t.column / 4));
}

// exp(S − logsumexp) is taken in two steps: the first difference is exact or nearly so where the result is
// not negligible. A dead row, −inf, subtracts +inf and so gets exactly 0.
template <class T>
struct LogSumExp {
  explicit LogSumExp(double x)
      : subtracted(x == -infinity<double>() ? infinity<T>() : T(x)),
        remainder(subtracted == infinity<T>() ? T(0) : T(x - double(subtracted))) {}
  FASTGAN_INLINE Vec<T> probability(Vec<T> score) const {
    return exp_of_difference(score - subtracted - remainder);
  }
  T subtracted, remainder;
};

template <class T>
LogSumExp<T> logsumexp_of(const AttentionArgs& a, const Tile& t, int64_t r) {
  return LogSumExp<T>(a.logsumexp[row_index(a, t.batch, t.head, t.row + r)]);
}

// ---- what a mask hides from a whole tile ----

// Columns of a tile, from the first that some row sees to the one after the last; empty: begin >= end.
struct Range {
  int64_t begin, end;
};

template <class BiasStorage>
bool all_hidden(const BiasStorage* bias, int64_t stride, int64_t count) {
  using T = Accumulate<BiasStorage>;
  for (int64_t c = 0; c < count; ++c)
    if (load1<T>(bias + c * stride) != -infinity<T>()) return false;
  return true;
}

inline bool all_hidden(const uint8_t* mask, int64_t stride, int64_t count) {
  if (stride == 1 && count == 8) {
    uint64_t eight;
    std::memcpy(&eight, mask, 8);
    return eight == 0;
  }
  for (int64_t c = 0; c < count; ++c)
    if (mask[c * stride]) return false;
  return true;
}

// One row of the tile: are columns c to c + count hidden by the mask alone, or by the bias alone?
template <class Storage>
bool all_hidden(const AttentionArgs& a, const Tile& t, int64_t row, int64_t c, int64_t count) {
  if (a.mask.data) {
    int64_t step = a.mask.stride[3];
    if (all_hidden(at<uint8_t>(a.mask, t.batch, t.head, row) + (t.column + c) * step, step, count))
      return true;
  }
  if (!a.bias.data) return false;
  int64_t step = a.bias.stride[3];
  if (a.bias_dtype == a.dtype)
    return all_hidden(at<Storage>(a.bias, t.batch, t.head, row) + (t.column + c) * step, step, count);
  return all_hidden(at<float>(a.bias, t.batch, t.head, row) + (t.column + c) * step, step, count);
}

// Widens `seen` to what the tile's rows see. A row's scan ends at its first visible column from either side,
// so that a mask without holes costs nothing, and one with holes one pass at most.
template <class Storage>
void widen(const AttentionArgs& a, const Tile& t, Range& seen) {
  bool one_row = (!a.mask.data || a.mask.stride[2] == 0) && (!a.bias.data || a.bias.stride[2] == 0);
  for (int64_t r = 0; r < (one_row ? smaller(t.rows, 1) : t.rows); ++r) {
    int64_t row = t.row + r, c = 0;
    while (c + 8 <= seen.begin && all_hidden<Storage>(a, t, row, c, 8)) c += 8;
    while (c < seen.begin && all_hidden<Storage>(a, t, row, c, 1)) ++c;
    seen.begin = smaller(seen.begin, c);
    c = t.columns;
    while (c - 8 >= seen.end && all_hidden<Storage>(a, t, row, c - 8, 8)) c -= 8;
    while (c > seen.end && all_hidden<Storage>(a, t, row, c - 1, 1)) --c;
    seen.end = c > seen.end ? c : seen.end;
    if (seen.begin == 0 && seen.end == t.columns) return;
  }
}

// What the rows of the tile see, in any of `heads` heads beginning with the tile's own. is_causal is not
// looked at.
template <class Storage>
Range visible(const AttentionArgs& a, Tile t, int64_t heads = 1) {
  if (!a.mask.data && !a.bias.data) return {0, t.columns};
  Range seen{t.columns, 0};
  bool one_head = (!a.mask.data || a.mask.stride[1] == 0) && (!a.bias.data || a.bias.stride[1] == 0);
  for (int64_t h = 0; h < (one_head ? 1 : heads); ++h, ++t.head) widen<Storage>(a, t, seen);
  return seen;
}

}  // namespace
}  // namespace fastgan
