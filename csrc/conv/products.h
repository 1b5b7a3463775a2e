// The matrix products between the transforms: C (rows × columns) = or += A (rows × depth) B (depth ×
// columns), one a point, all in scratch. As common/gemm.h's, but B is read where the transforms left it, with
// the distance between its rows as an argument, and columns come in multiples of kSlice. The micro-kernel
// keeps kRowsOf × 2 vectors of C in registers. Each product is one chain of multiply-adds in the order of
// depth, begun at zero and then added to C: chains of at most kDepth or kTiles steps, which keep half the
// error of one chain over thousands.
#pragma once
#include "conv/layout.h"

namespace fastgan {
namespace {

constexpr int kMicroRows = 6;

template <int kCount, int kVectors, bool kTransposed>
__attribute__((noinline)) void conv_micro_kernel(int64_t depth, const float* a, int64_t lda, const float* b,
                                                 int64_t ldb, float* c, int64_t ldc, bool add) {
  constexpr int W = lanes<float>;
  Vec<float> sums[kCount][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[i][v] = Vec<float>{};
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) __builtin_prefetch(c + i * ldc, 1);
  for (int64_t k = 0; k < depth; ++k) {
    Vec<float> row[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) row[v] = load<float>(b + v * W);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      Vec<float> x = broadcast<float>(kTransposed ? a[i] : a[i * lda]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[i][v] += x * row[v];
    }
    b += ldb;
    a += kTransposed ? lda : 1;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* at = c + i * ldc + v * W;
      store(at, add ? load<float>(at) + sums[i][v] : sums[i][v]);
    }
}

template <int kVectors, bool kTransposed>
FASTGAN_INLINE void conv_micro_kernel_of(int count, int64_t depth, const float* a, int64_t lda,
                                         const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  switch (count) {
    case 6:
      return conv_micro_kernel<6, kVectors, kTransposed>(depth, a, lda, b, ldb, c, ldc, add);
    case 5:
      return conv_micro_kernel<5, kVectors, kTransposed>(depth, a, lda, b, ldb, c, ldc, add);
    case 4:
      return conv_micro_kernel<4, kVectors, kTransposed>(depth, a, lda, b, ldb, c, ldc, add);
    case 3:
      return conv_micro_kernel<3, kVectors, kTransposed>(depth, a, lda, b, ldb, c, ldc, add);
    case 2:
      return conv_micro_kernel<2, kVectors, kTransposed>(depth, a, lda, b, ldb, c, ldc, add);
    default:
      return conv_micro_kernel<1, kVectors, kTransposed>(depth, a, lda, b, ldb, c, ldc, add);
  }
}

// What the next product will read, brought from the last cache into the second a few lines at a time: by
// itself the hardware follows only the rows of B, since the columns of A are far apart.
struct Ahead {
  const float *a = nullptr, *b = nullptr;
  int64_t a_count = 0, b_count = 0;  // numbers, contiguous
  FASTGAN_INLINE void fetch(const float* from, int64_t count, int64_t part, int64_t parts) const {
    constexpr int64_t kLine = 16;
    for (int64_t i = part * kLine; i < count; i += parts * kLine) __builtin_prefetch(from + i, 0, 2);
  }
  FASTGAN_INLINE void fetch(int64_t part, int64_t parts) const {
    fetch(a, a_count, part, parts);
    fetch(b, b_count, part, parts);
  }
};

// kTransposed: A is stored depth × rows.
template <bool kTransposed>
void multiply_point(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b,
                    int64_t ldb, float* c, int64_t ldc, bool add, const Ahead& ahead = {}) {
  constexpr int W = lanes<float>;
  const int64_t parts = (columns + 2 * W - 1) / (2 * W) * ((rows + kMicroRows - 1) / kMicroRows);
  int64_t part = 0;
  for (int64_t j = 0; j < columns; j += 2 * W) {
    int count;
    for (int64_t i = 0; i < rows; i += count) {
      if (part < parts) ahead.fetch(part++, parts);
      // Sixes, and what is left over six in two halves: two rows alone would not hide the latency.
      const int64_t left = rows - i;
      count = int(left <= kMicroRows ? left : left < 2 * kMicroRows ? (left + 1) / 2 : kMicroRows);
      const float* from = a + (kTransposed ? i : i * lda);
      float* to = c + i * ldc + j;
      if (columns - j >= 2 * W)
        conv_micro_kernel_of<2, kTransposed>(count, depth, from, lda, b + j, ldb, to, ldc, add);
      else
        conv_micro_kernel_of<1, kTransposed>(count, depth, from, lda, b + j, ldb, to, ldc, add);
    }
  }
}

}  // namespace
}  // namespace fastgan
