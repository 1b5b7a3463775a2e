// How the products of attention are made, by the tiling: a warp at a time (attention_cuda_products.h), or by
// warpgroups, four warps of 16 rows each, on the GPUs that have them (common/cuda_warpgroup.h). A lane has
// the same places of a tile either way (R = 1), so that softmax, masks, bias and dropout are written once.
//
// For warpgroups a tile of shared memory is panels of 64 columns. An instruction multiplies 64 rows and runs
// beside what follows; the warps of a warpgroup go the same way, by its rows and not by their own.
#pragma once
#include "attention/attention_cuda_products.h"
#include "common/cuda_warpgroup.h"

namespace fastgan {
namespace {

constexpr int kPanel = 64;  // columns of a panel; rows of a warpgroup as well

// 16-bit elements of heads up to 128 wide.
template <class S, int D>
constexpr bool kWarpgroups = sizeof(S) == 2 && D <= 128;

// Whether this compilation has the kernel of a tiling: on a GPU with warpgroups one of the two is launched.
template <class S, int D, class Tiling>
constexpr bool kCompiled = Tiling::warpgroups ? kHasWarpgroups : !(kOnlyWarpgroups && kWarpgroups<S, D>);

// Measured on an H200: the products of one block run beside another's softmax where two are on a
// multiprocessor, as two of 64-wide heads are and two of half the rows in the backward. Blocks that begin the
// next tile's scores before this one's softmax, or of 192 rows, were slower.
template <int Warps, int Keys, int Blocks>
struct Warpgroups {
  static constexpr bool warpgroups = true, split = false;
  static constexpr int warps = Warps, R = 1, N = Keys, stages = 2, blocks = Blocks;
  static constexpr int threads = warps * kWarp, rows = 16 * warps;
};
template <int D>
using ForwardWarpgroups = std::conditional_t<D == 64, Warpgroups<8, 64, 2>, Warpgroups<8, 128, 1>>;
using BackwardWarpgroups = Warpgroups<4, 64, 2>;

template <class S, int Rows>
FASTGAN_DEVICE int place_in_panels(int row, int chunk) {
  return ((chunk / 8) * Rows + row) * kPanel + ((chunk ^ row) & 7) * kChunk<S>;
}

// The first of the rows that are multiplied together with a warp's, and how many they are.
template <class Tiling>
constexpr int kTogether = Tiling::warpgroups ? kPanel : 16 * Tiling::R;
template <class Tiling>
FASTGAN_DEVICE int together() {
  return int(threadIdx.x) / (Tiling::warpgroups ? kWarpgroup : kWarp) * kTogether<Tiling>;
}

// Whether finish_scores leaves the scale to exp2: where the register for it is had.
template <class S, class Tiling>
constexpr bool kScalesLater = Tiling::warpgroups || !kHalf<S>;

// sums (16 R, N) = A Bᵀ: `a` is the block's tile of Tiling::rows, `b` one of N. Not there before
// finish_products.
template <class S, int D, class Tiling>
FASTGAN_DEVICE void start_products(Accumulate<S> (&sums)[Tiling::R][Tiling::N / 8][4], const S* a, const S* b,
                                   Float32Products products) {
  constexpr int N = Tiling::N;
  if constexpr (Tiling::warpgroups) {
    const Panels from_a = panels_at(a + together<Tiling>() * kPanel), from_b = panels_at(b);
    hold(sums[0]);
    begin_products();
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
      multiply_shared<S, N>(sums[0], advanced<S>(from_a, k / 4 * Tiling::rows * kPanel + k % 4 * 16),
                            advanced<S>(from_b, k / 4 * N * kPanel + k % 4 * 16), k > 0);
    commit_products();
  } else {
    products_of_rows<S, D, N, Tiling::R>(sums, a + together<Tiling>() * D, b, products);
  }
}

// Waits for all but the `pending` latest.
template <class Tiling, int pending = 0, class T, int R, int N8>
FASTGAN_DEVICE void finish_products(T (&sums)[R][N8][4]) {
  if constexpr (Tiling::warpgroups) {
    wait_for_products<pending>();
    hold(sums[0]);
  }
}

// sums (16 R, D) += weights (16 R, N) B; `memory` as in attention_cuda_products.h.
template <class S, int D, class Tiling>
FASTGAN_DEVICE void add_weighted(Accumulate<S> (&sums)[Tiling::R][D / 8][4],
                                 const Accumulate<S> (&weights)[Tiling::R][Tiling::N / 8][4], const S* b,
                                 Accumulate<S>* memory, Float32Products products) {
  constexpr int N = Tiling::N;
  if constexpr (Tiling::warpgroups) {
    (void)memory;
    uint32_t from_a[N / 16][4];  // a tile of sums is half a fragment of the next product
#pragma unroll
    for (int k = 0; k < N / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        from_a[k][i] = narrow_pair<S>(weights[0][2 * k + i / 2][i % 2 * 2],  //
                                      weights[0][2 * k + i / 2][i % 2 * 2 + 1]);
    const Panels from_b = panels_at(b, N * kPanel);
    hold(sums[0]);
    begin_products();
#pragma unroll
    for (int k = 0; k < N / 16; ++k)
      multiply_registers<S, D>(sums[0], from_a[k], advanced<S>(from_b, k * 16 * kPanel), true);
    commit_products();
    finish_products<Tiling>(sums);
  } else {
    add_weighted_rows<S, D, N, Tiling::R>(sums, weights, b, memory, products);
  }
}

}  // namespace
}  // namespace fastgan
