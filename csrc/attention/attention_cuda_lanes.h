// Where the numbers of attention's tiles lie: in a warp's lanes, as mma.sync spreads them, and in shared
// memory.
//
// A row of shared memory is D elements in chunks of 16 bytes; chunk c of row i lies where c ^ (i % 8) would:
// eight rows' reads of one chunk, and a row's reads of eight, meet all banks.
#pragma once
#include <type_traits>

#include "common/cuda_tensor_core.h"
#include "common/cuda_types.h"

namespace fastgan {
namespace {

template <class S>
constexpr bool kInTerms = std::is_same_v<S, tf32>;
template <class S>
using InMemory = std::conditional_t<kInTerms<S>, float, S>;  // for kernels without products

template <class S>
constexpr bool kHalf = sizeof(S) == 2;
template <class S>
constexpr bool kTensorCores = kHalf<S> || kInTerms<S>;
template <class S>
constexpr int kChunk = 16 / int(sizeof(S));  // elements

FASTGAN_DEVICE int lane_row() { return int(threadIdx.x) % kWarp / 4; }     // r
FASTGAN_DEVICE int lane_column() { return int(threadIdx.x) % kWarp % 4; }  // q

template <class S, int D>
FASTGAN_DEVICE int place(int row, int chunk) {
  return (row * (D / kChunk<S>)+(chunk ^ (row & 7))) * kChunk<S>;
}

// The same within a row, for a chunk c + d with c a constant and even, d 0 or 1, and
// x = d ^ (row % 8): so that a lane keeps few addresses, not one for each c.
template <class S>
FASTGAN_DEVICE int swizzled(int c, int x) {
  return ((c & ~7) + ((c & 7) ^ x)) * kChunk<S>;
}

}  // namespace
}  // namespace fastgan
