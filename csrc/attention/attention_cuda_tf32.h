// The two products of attention_cuda_products.h of floats on tensor cores, each factor in two terms:
//
//   x = big + small, big = x rounded to TF32's 11 bits     a b ≈ small_a big_b + big_a small_b + big_a big_b
//
// What is left out, small_a small_b and what small has beyond 11 bits, is 2^-22 of a product. Tensor cores
// cut their sums off where arithmetic elsewhere rounds, and a long sum would drift towards 0 by half a unit
// at each step: sums of more than kPart products are rounded additions of such parts (Ootomo,
// Yokota: Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak
// performance, 2022). Heads of up to 128 numbers. An infinite factor becomes NaN. Of a single term, which is
// the user's to choose, a factor's error is up to 2^-10.
//
// A lane has the second product's sums of other columns than with 16 bits: B is read by its rows, four
// neighbours at a time, and each of the four is a tile's.
#pragma once
#include "attention/attention.h"
#include "attention/attention_cuda_lanes.h"

namespace fastgan {
namespace {

constexpr int kPart = 16;

// What is added to a number's bits to round it. A single term is cut off: a NaN of all ones, CUDA's own,
// would become 0, which in three terms the small one prevents.
FASTGAN_DEVICE uint32_t rounding_of(Float32Products products) {
  return products == Float32Products::three_terms ? 0x1000u : 0;
}

FASTGAN_DEVICE void split(float x, uint32_t rounding, uint32_t& big, uint32_t& small) {
  big = (bits_of(x) + rounding) & 0xffffe000u;
  small = bits_of(x - float_of(big));
}

// sums[t][j] += a[t] b[j], [0] the big terms, [1] the small. A product waits for the sum that it is added to:
// between two of one sum are those of all others.
template <int R, int J>
FASTGAN_DEVICE void multiply_terms(float (&sums)[R][J][4], const uint32_t (&a)[R][2][4],
                                   const uint32_t (&b)[J][2][2], Float32Products products) {
  auto add = [&](int of_a, int of_b) {
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int t = 0; t < R; ++t) mma_m16n8k8(sums[t][j], a[t][of_a], b[j][of_b]);
  };
  if (products == Float32Products::three_terms) {
    add(1, 0);
    add(0, 1);
  }
  add(0, 0);
}

// sums (16 R, N) += A Bᵀ
template <int D, int N, int R>
FASTGAN_DEVICE void products_in_terms(float (&sums)[R][N / 8][4], const tf32* a, const tf32* b,
                                      Float32Products products) {
  const uint32_t rounding = rounding_of(products);
  const int lane = int(threadIdx.x) % kWarp, xa = lane / 16 ^ lane % 8, xb = lane / 8 % 2 ^ lane % 8;
  const tf32 *rows_a = a + lane % 16 * D, *rows_b = b + (lane % 8 + (N > 8 ? lane / 16 * 8 : 0)) * D;
#pragma unroll 1  // of more, fragments and addresses would be fetched ahead into too many registers
  for (int from = 0; from < D; from += 32)
#pragma unroll
    for (int column = 0; column < 32; column += kPart) {
      float part[R][N / 8][4] = {};
#pragma unroll
      for (int k = column / 8; k < (column + kPart) / 8; ++k) {
        uint32_t from_a[R][2][4];
#pragma unroll
        for (int t = 0; t < R; ++t) {
          uint32_t whole[4];
          load_matrices(whole, rows_a + 16 * t * D + from + swizzled<tf32>(2 * k, xa));
#pragma unroll
          for (int i = 0; i < 4; ++i) split(float_of(whole[i]), rounding, from_a[t][0][i], from_a[t][1][i]);
        }
        uint32_t from_b[N / 8][2][2];
#pragma unroll
        for (int j = 0; j < N / 8; j += 2) {
          uint32_t whole[4];
          load_matrices(whole, rows_b + 8 * j * D + from + swizzled<tf32>(2 * k, xb));
#pragma unroll
          for (int i = 0; i < (N > 8 ? 4 : 2); ++i)
            split(float_of(whole[i]), rounding, from_b[j + i / 2][0][i % 2], from_b[j + i / 2][1][i % 2]);
        }
        multiply_terms(part, from_a, from_b, products);
      }
#pragma unroll
      for (int t = 0; t < R; ++t)
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[t][j][i] += part[t][j][i];
    }
}

// Keys 2 q and 2 q + 1, which a lane has weights of, are its lines q and q + 4 of B.
template <int D, int N, int R>
FASTGAN_DEVICE void add_weighted_in_terms(float (&sums)[R][D / 8][4], const float (&weights)[R][N / 8][4],
                                          const tf32* b, Float32Products products) {
  const uint32_t rounding = rounding_of(products);
  const int r = lane_row(), q = lane_column();
  const tf32* lines[2] = {b + place<tf32, D>(2 * q, r), b + place<tf32, D>(2 * q + 1, r)};
  constexpr int part_rows = N < kPart ? N : kPart;
#pragma unroll
  for (int c = 0; c < D / 32; ++c)
#pragma unroll
    for (int row = 0; row < N; row += part_rows) {
      float part[R][4][4] = {};
#pragma unroll
      for (int k = row / 8; k < (row + part_rows) / 8; ++k) {
        uint32_t from_a[R][2][4], from_b[4][2][2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float whole[4];
          load_vector<4>(lines[i] + 8 * k * D + 32 * c, whole);
#pragma unroll
          for (int e = 0; e < 4; ++e) split(whole[e], rounding, from_b[e][0][i], from_b[e][1][i]);
        }
#pragma unroll
        for (int t = 0; t < R; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            split(forget(weights[t][k][i % 2 * 2 + i / 2]), rounding, from_a[t][0][i], from_a[t][1][i]);
        multiply_terms(part, from_a, from_b, products);
      }
#pragma unroll
      for (int t = 0; t < R; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[t][4 * c + e][i] += part[t][e][i];
    }
}

// Of sums[t][j][i] or [i + 2] in the second product.
FASTGAN_DEVICE int column_in_terms(int j, int i) { return j / 4 * 32 + lane_column() * 8 + 4 * i + j % 4; }

}  // namespace
}  // namespace fastgan
