// Small matrix products for tiles that lie in the caches: C (rows × columns) from A (rows × depth) and B
// (depth × columns), all in contiguous scratch that the caller packed.
//
// The micro-kernel keeps 6 rows × 2 vectors of C in registers (12 of AVX2's 16), reads two vectors of B and
// broadcasts six numbers of A for every step of depth: 12 multiply-adds on 8 loads. B is packed in panels of
// kPanel columns, so that a panel (depth × kPanel) is read in one stream and stays in L1 while the rows of A
// go by. A is read where it is, by rows or, for AᵀB, by columns. Each number of C is one chain of depth
// multiply-adds, whatever the tile it lies in.
//
// Unnamed namespace: see threads.h.
#pragma once
#include "common/vector.h"

namespace fastgan {
namespace {

template <class T>
constexpr int kPanel = 2 * lanes<T>;
constexpr int kRows = 6;

template <class T>
FASTGAN_INLINE int64_t whole_panels(int64_t n) {
  return (n + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
}

enum class Update {
  set,      // C = A B
  scale,    // C = factor A B
  add,      // C = C + A B
  rescale,  // C = row_factors C + A B
};

template <class T>
struct Product {
  int64_t rows, columns, depth;  // columns: whole panels, or the columns that C has
  const T* a;
  int64_t lda;
  const T* b;
  int64_t panel_stride;  // from a panel of B to the next; within one, rows are kPanel apart
  T* c;
  int64_t ldc;
  T factor = T(1);
  const T* row_factors = nullptr;
};

template <class T, int kCount, bool kTransposed, Update kUpdate>
__attribute__((noinline)) void micro_kernel(int64_t depth, const T* a, int64_t lda, const T* b, T* c,
                                            int64_t ldc, T factor, const T* row_factors) {
  constexpr int W = lanes<T>;
  Vec<T> sums[kCount][2];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) sums[i][0] = sums[i][1] = Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> b0 = load<T>(b), b1 = load<T>(b + W);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      Vec<T> x = broadcast<T>(kTransposed ? a[i] : a[i * lda]);
      sums[i][0] += x * b0;
      sums[i][1] += x * b1;
    }
    b += kPanel<T>;
    a += kTransposed ? lda : 1;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      T* at = c + i * ldc + half * W;
      Vec<T> value = sums[i][half];
      if constexpr (kUpdate == Update::scale) value = value * factor;
      if constexpr (kUpdate == Update::add) value = load<T>(at) + value;
      if constexpr (kUpdate == Update::rescale) value = load<T>(at) * row_factors[i] + value;
      store(at, value);
    }
}

template <class T, bool kTransposed, Update kUpdate>
FASTGAN_INLINE void micro_kernel_of(int count, int64_t depth, const T* a, int64_t lda, const T* b, T* c,
                                    int64_t ldc, T factor, const T* row_factors) {
  switch (count) {
    case 6:
      return micro_kernel<T, 6, kTransposed, kUpdate>(depth, a, lda, b, c, ldc, factor, row_factors);
    case 5:
      return micro_kernel<T, 5, kTransposed, kUpdate>(depth, a, lda, b, c, ldc, factor, row_factors);
    case 4:
      return micro_kernel<T, 4, kTransposed, kUpdate>(depth, a, lda, b, c, ldc, factor, row_factors);
    case 3:
      return micro_kernel<T, 3, kTransposed, kUpdate>(depth, a, lda, b, c, ldc, factor, row_factors);
    case 2:
      return micro_kernel<T, 2, kTransposed, kUpdate>(depth, a, lda, b, c, ldc, factor, row_factors);
    default:
      return micro_kernel<T, 1, kTransposed, kUpdate>(depth, a, lda, b, c, ldc, factor, row_factors);
  }
}

template <bool kTransposed, Update kUpdate, class T>
void multiply(const Product<T>& p) {
  for (int64_t j = 0; j < p.columns; j += kPanel<T>) {
    const T* b = p.b + j / kPanel<T> * p.panel_stride;
    bool whole = j + kPanel<T> <= p.columns;
    int count;
    for (int64_t i = 0; i < p.rows; i += count) {
      // Sixes, and what is left over six in two halves: two rows alone would not hide the latency of a
      // multiply-add.
      int64_t left = p.rows - i;
      count = int(left <= kRows ? left : left < 2 * kRows ? (left + 1) / 2 : kRows);
      const T* a = p.a + (kTransposed ? i : i * p.lda);
      T* c = p.c + i * p.ldc + j;
      const T* factors = p.row_factors ? p.row_factors + i : nullptr;
      if (whole) {
        micro_kernel_of<T, kTransposed, kUpdate>(count, p.depth, a, p.lda, b, c, p.ldc, p.factor, factors);
        continue;
      }
      T corner[kRows * kPanel<T>];
      int64_t width = p.columns - j;
      for (int64_t r = 0; r < count; ++r)
        for (int64_t x = 0; x < kPanel<T>; ++x)
          corner[r * kPanel<T> + x] = x < width ? c[r * p.ldc + x] : T(0);
      micro_kernel_of<T, kTransposed, kUpdate>(count, p.depth, a, p.lda, b, corner, kPanel<T>, p.factor,
                                               factors);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t x = 0; x < width; ++x) c[r * p.ldc + x] = corner[r * kPanel<T> + x];
    }
  }
}

// ---- packing: any strides and any storage type into contiguous tiles of T ----

// rows × columns -> rows × columns, contiguous
template <class T, class Storage>
void pack_rows(const Storage* from, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
               T* to) {
  for (int64_t r = 0; r < rows; ++r, to += columns) {
    const Storage* row = from + r * row_stride;
    int64_t c = 0;
    if (column_stride == 1)
      for (; c + lanes<T> <= columns; c += lanes<T>) store(to + c, load<T>(row + c));
    for (; c < columns; ++c) to[c] = load1<T>(row + c * column_stride);
  }
}

// rows × columns -> panels of kPanel columns, each rows × kPanel; zero beyond the columns
template <class T, class Storage>
void pack_panels(const Storage* from, int64_t row_stride, int64_t column_stride, int64_t rows,
                 int64_t columns, T* to) {
  for (int64_t j = 0; j < columns; j += kPanel<T>) {
    int64_t width = columns - j < kPanel<T> ? columns - j : kPanel<T>;
    for (int64_t r = 0; r < rows; ++r, to += kPanel<T>) {
      const Storage* row = from + r * row_stride + j * column_stride;
      if (column_stride == 1 && width == kPanel<T>) {
        store(to, load<T>(row));
        store(to + lanes<T>, load<T>(row + lanes<T>));
        continue;
      }
      for (int64_t c = 0; c < kPanel<T>; ++c) to[c] = c < width ? load1<T>(row + c * column_stride) : T(0);
    }
  }
}

// Exchanges rows and columns of a square of lanes × lanes numbers, in log2(lanes) rounds of pairwise
// exchanges.
template <class T, int kStep = lanes<T> / 2>
FASTGAN_INLINE void transpose(Vec<T> (&v)[lanes<T>]) {
  if constexpr (kStep > 0) {
    constexpr int W = lanes<T>;
    Mask<T> first{}, second{};
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) {
      first[j] = j & kStep ? W + (j ^ kStep) : j;
      second[j] = j & kStep ? W + j : (j | kStep);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i & kStep) continue;
      Vec<T> low = v[i], high = v[i | kStep];
      v[i] = __builtin_shuffle(low, high, first);
      v[i | kStep] = __builtin_shuffle(low, high, second);
    }
    transpose<T, kStep / 2>(v);
  }
}

// lanes × lanes numbers of a matrix, read by rows (stride apart; `row(i)` is where row i is) and exchanged.
// With AVX2 alone the halves of rows are loaded where they belong, and the rest are exchanges within halves:
// a permutation across them is eight operations on some machines.
#if defined(__AVX2__) && !defined(__AVX512F__)
FASTGAN_INLINE Vec<float> halves(const float* low, const float* high) {
  return (Vec<float>)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
}
FASTGAN_INLINE Vec<double> halves(const double* low, const double* high) {
  return (Vec<double>)_mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(low)), _mm_loadu_pd(high), 1);
}
template <class Row>
FASTGAN_INLINE void transpose_halves(Vec<float> (&v)[8], const Row& row) {
  constexpr Mask<float> kLow{0, 8, 1, 9, 4, 12, 5, 13}, kHigh{2, 10, 3, 11, 6, 14, 7, 15};
  constexpr Mask<float> kFirst{0, 1, 8, 9, 4, 5, 12, 13}, kSecond{2, 3, 10, 11, 6, 7, 14, 15};
#pragma GCC unroll 2
  for (int half = 0; half < 8; half += 4) {
    Vec<float> a = halves(row(0) + half, row(4) + half), b = halves(row(1) + half, row(5) + half);
    Vec<float> c = halves(row(2) + half, row(6) + half), d = halves(row(3) + half, row(7) + half);
    Vec<float> ab0 = __builtin_shuffle(a, b, kLow), ab1 = __builtin_shuffle(a, b, kHigh);
    Vec<float> cd0 = __builtin_shuffle(c, d, kLow), cd1 = __builtin_shuffle(c, d, kHigh);
    v[half] = __builtin_shuffle(ab0, cd0, kFirst);
    v[half + 1] = __builtin_shuffle(ab0, cd0, kSecond);
    v[half + 2] = __builtin_shuffle(ab1, cd1, kFirst);
    v[half + 3] = __builtin_shuffle(ab1, cd1, kSecond);
  }
}
template <class Row>
FASTGAN_INLINE void transpose_halves(Vec<double> (&v)[4], const Row& row) {
  constexpr Mask<double> kFirst{0, 4, 2, 6}, kSecond{1, 5, 3, 7};
#pragma GCC unroll 2
  for (int half = 0; half < 4; half += 2) {
    Vec<double> a = halves(row(0) + half, row(2) + half), b = halves(row(1) + half, row(3) + half);
    v[half] = __builtin_shuffle(a, b, kFirst);
    v[half + 1] = __builtin_shuffle(a, b, kSecond);
  }
}
constexpr bool kHasHalves = true;
#else
template <class T, class Row>
FASTGAN_INLINE void transpose_halves(T&, const Row&) {}
constexpr bool kHasHalves = false;
#endif

template <class T, class Storage, class Row>
FASTGAN_INLINE void load_transposed(Vec<T> (&v)[lanes<T>], const Row& row) {
  if constexpr (kHasHalves && sizeof(Storage) == sizeof(T)) {
    transpose_halves(v, row);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; ++i) v[i] = load<T>(row(i));
    transpose<T>(v);
  }
}

// rows × columns -> its transpose in panels of kPanel rows, each columns × kPanel; zero beyond the rows
template <class T, class Storage>
void pack_transposed(const Storage* from, int64_t row_stride, int64_t column_stride, int64_t rows,
                     int64_t columns, T* to) {
  constexpr int W = lanes<T>;
  for (int64_t j = 0; j < rows; j += kPanel<T>, to += columns * kPanel<T>) {
    for (int64_t half = 0; half < kPanel<T>; half += W) {
      const Storage* row = from + (j + half) * row_stride;
      int64_t height = rows - j - half, c = 0;
      if (height >= W && column_stride == 1)
        for (; c + W <= columns; c += W) {
          Vec<T> square[W];
          load_transposed<T, Storage>(square, [&](int i) { return row + i * row_stride + c; });
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) store(to + (c + i) * kPanel<T> + half, square[i]);
        }
      for (; c < columns; ++c)
        for (int64_t i = 0; i < W; ++i)
          to[c * kPanel<T> + half + i] =
              i < height ? load1<T>(row + i * row_stride + c * column_stride) : T(0);
    }
  }
}

}  // namespace
}  // namespace fastgan
