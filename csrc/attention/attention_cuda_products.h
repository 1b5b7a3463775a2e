// The two matrix products that all of attention is made of, each by one warp, with rows in shared memory:
//
//   products_of_rows   sums (16 R, N) = A (16 R, D) Bᵀ, B (N, D)       scores from queries and keys
//   add_weighted_rows  sums (16 R, D) += weights (16 R, N) B (N, D)    output from weights and values
//
// 16-bit elements go through the tensor cores, floats too in terms (attention_cuda_tf32.h) or, where they
// shall be exact, as doubles always, through fused multiply-adds in the order of the width. Sums are spread
// over the lanes as mma.sync spreads them, for all types, so that softmax, masks and dropout are written
// once: with r = lane / 4 and q = lane % 4 a lane holds of a 16 x 8 tile (t, j)
//
//   sums[t][j][0], [1]   row 16 t + r,      columns 8 j + 2 q and 8 j + 2 q + 1
//   sums[t][j][2], [3]   row 16 t + r + 8,  the same columns
//
// (of the second product of floats, columns as output_column says: four neighbours are one vector).
//
// Rows of shared memory lie as attention_cuda_lanes.h says.
#pragma once
#include "attention/attention_cuda_tf32.h"

namespace fastgan {
namespace {

// Of sums[t][j][i] or [i + 2] in the second product.
template <class S>
FASTGAN_DEVICE int output_column(int j, int i) {
  if (kInTerms<S>) return column_in_terms(j, i);
  if (sizeof(S) == 4) return j / 2 * 16 + 4 * lane_column() + j % 2 * 2 + i;
  return j * 8 + 2 * lane_column() + i;
}

// Numbers of shared memory that a warp needs for its weights in the second product.
template <class S, int N, int R>
constexpr int kWeightsSize = kTensorCores<S> ? 0 : 16 * R * (N + kChunk<S>);

// `Add`: to what is in sums.
template <class S, int D, int N, int R, bool Add = false>
FASTGAN_DEVICE void products_of_rows(Accumulate<S> (&sums)[R][N / 8][4], const S* a, const S* b,
                                     Float32Products products) {
  using T = Accumulate<S>;
  if (!Add) {
#pragma unroll
    for (int t = 0; t < R; ++t)
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[t][j][i] = 0;
  }
  if constexpr (kInTerms<S>) {
    products_in_terms<D, N, R>(sums, a, b, products);
  } else if constexpr (kHalf<S>) {
    const int lane = int(threadIdx.x) % kWarp, xa = lane / 16 ^ lane % 8, xb = lane / 8 % 2 ^ lane % 8;
    const S *rows_a = a + lane % 16 * D, *rows_b = b + (lane % 8 + lane / 16 * 8) * D;
#pragma unroll 4  // of more, fragments and addresses would be fetched ahead into too many registers
    for (int k = 0; k < D / 16; ++k) {
      uint32_t from_a[R][4];
#pragma unroll
      for (int t = 0; t < R; ++t) load_matrices(from_a[t], rows_a + 16 * t * D + swizzled<S>(2 * k, xa));
#pragma unroll
      for (int j = 0; j < N / 8; j += 2) {
        uint32_t tiles[4];
        load_matrices(tiles, rows_b + 8 * j * D + swizzled<S>(2 * k, xb));
        const uint32_t low[2] = {tiles[0], tiles[1]}, high[2] = {tiles[2], tiles[3]};
#pragma unroll
        for (int t = 0; t < R; ++t) {
          mma_m16n8k16<S>(sums[t][j], from_a[t], low);
          mma_m16n8k16<S>(sums[t][j + 1], from_a[t], high);
        }
      }
    }
  } else {
    constexpr int E = kChunk<S>;
    const int r = lane_row(), q = lane_column();
#pragma unroll 1
    for (int k = 0; k < D / E; ++k) {
      T from_a[R][2][E];
#pragma unroll
      for (int t = 0; t < R; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) load_vector<E>(a + place<S, D>(16 * t + 8 * h + r, k), from_a[t][h]);
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          T from_b[E];
          load_vector<E>(b + place<S, D>(8 * j + 2 * q + i, k), from_b);
#pragma unroll
          for (int t = 0; t < R; ++t)
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
              for (int e = 0; e < E; ++e)
                sums[t][j][2 * h + i] = fma(from_a[t][h][e], from_b[e], sums[t][j][2 * h + i]);
        }
    }
  }
}

// `memory` is the warp's own, of kWeightsSize numbers.
template <class S, int D, int N, int R>
FASTGAN_DEVICE void add_weighted_rows(Accumulate<S> (&sums)[R][D / 8][4],
                                      const Accumulate<S> (&weights)[R][N / 8][4], const S* b,
                                      Accumulate<S>* memory, Float32Products products) {
  using T = Accumulate<S>;
  if constexpr (kInTerms<S>) {
    add_weighted_in_terms<D, N, R>(sums, weights, b, products);
  } else if constexpr (kHalf<S>) {
    const int lane = int(threadIdx.x) % kWarp, x = lane / 16 ^ lane % 8;
    const S* rows = b + lane % 16 * D;
    (void)memory;
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
      uint32_t from_a[R][4];  // a tile of sums is half a fragment of the next product
#pragma unroll
      for (int t = 0; t < R; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          from_a[t][i] = narrow_pair<S>(weights[t][2 * k + i / 2][i % 2 * 2],  //
                                        weights[t][2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int j = 0; j < D / 8; j += 2) {
        uint32_t tiles[4];
        load_matrices_transposed(tiles, rows + 16 * k * D + swizzled<S>(j, x));
        const uint32_t low[2] = {tiles[0], tiles[1]}, high[2] = {tiles[2], tiles[3]};
#pragma unroll
        for (int t = 0; t < R; ++t) {
          mma_m16n8k16<S>(sums[t][j], from_a[t], low);
          mma_m16n8k16<S>(sums[t][j + 1], from_a[t], high);
        }
      }
    }
  } else {
    // Wide rows fetch B for one row at a time, or more of it would wait in registers than there are.
    constexpr int E = kChunk<S>, stride = N + E, step = D * sizeof(T) >= 1024 ? 1 : E;
    const int r = lane_row(), q = lane_column();
    warp_sync();  // the weights of the former call may still be read
#pragma unroll
    for (int t = 0; t < R; ++t)
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const T pair[2] = {weights[t][j][2 * h], weights[t][j][2 * h + 1]};
          store_vector<2>(memory + (16 * t + 8 * h + r) * stride + 8 * j + 2 * q, pair);
        }
    warp_sync();
#pragma unroll 1
    for (int k = 0; k < N; k += step) {
      T from_a[R][2][step];
#pragma unroll
      for (int t = 0; t < R; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          load_vector<step>(memory + (16 * t + 8 * h + r) * stride + k, from_a[t][h]);
#pragma unroll
      for (int e = 0; e < step; ++e)
#pragma unroll
        for (int c = 0; c < D / (4 * E); ++c) {
          T from_b[E];
          load_vector<E>(b + place<S, D>(k + e, 4 * c + q), from_b);
#pragma unroll
          for (int t = 0; t < R; ++t)
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
              for (int x = 0; x < E; ++x) {
                T& sum = sums[t][c * (E / 2) + x / 2][2 * h + x % 2];
                sum = fma(from_a[t][h][e], from_b[x], sum);
              }
        }
    }
  }
}

}  // namespace
}  // namespace fastgan
