// Vectors of up to 16 bytes that are one access to memory, on the conversions of cuda_types.h, which includes
// this. There is one of it: the emulator runs it as it is.
#pragma once
#include "common/cuda_launch.h"
#include "common/types.h"

namespace fastgan {

template <class S, int V>
struct alignas(sizeof(S) * V) Packed {
  S values[V];
};

// V neighbouring elements, widened; p is aligned to all of them.
template <int V, class S>
FASTGAN_DEVICE void load_vector(const S* p, Accumulate<S> (&out)[V]) {
  Packed<S, V> packed = *reinterpret_cast<const Packed<S, V>*>(p);
#pragma unroll
  for (int i = 0; i < V; ++i) out[i] = widen(packed.values[i]);
}

template <int V, class S>
FASTGAN_DEVICE void store_vector(S* p, const Accumulate<S> (&from)[V]) {
  Packed<S, V> packed;
#pragma unroll
  for (int i = 0; i < V; ++i) narrow(packed.values[i], from[i]);
  *reinterpret_cast<Packed<S, V>*>(p) = packed;
}

// The same, to global memory. Where an address is a multiple of a step, nvcc 13 finds each element's by
// itself and splits a vector's store into as many: this is one.
template <int V, class S>
FASTGAN_DEVICE void store_global(S* p, const Accumulate<S> (&from)[V]) {
  if constexpr (sizeof(S) * V < 4) {
    store_vector<V>(p, from);
  } else {
    Packed<S, V> packed;
#pragma unroll
    for (int i = 0; i < V; ++i) narrow(packed.values[i], from[i]);
    uint32_t words[sizeof(packed) / 4];
    memcpy(words, &packed, sizeof(packed));
    store_words(p, words);
  }
}

// Host: whether `p` may be read as vectors of `bytes`; null may.
inline bool is_aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace fastgan
