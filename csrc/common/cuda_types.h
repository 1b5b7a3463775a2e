// Storage types in device code: conversions that round to nearest even, and vectors of up to 16 bytes that
// are one access to memory.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/cuda_launch.h"
#include "common/types.h"

namespace fastgan {

FASTGAN_DEVICE float widen(float x) { return x; }
FASTGAN_DEVICE double widen(double x) { return x; }
FASTGAN_DEVICE float widen(bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
FASTGAN_DEVICE float widen(float16 x) { return __half2float(__ushort_as_half(x.bits)); }

FASTGAN_DEVICE void narrow(float& out, float x) { out = x; }
FASTGAN_DEVICE void narrow(double& out, double x) { out = x; }
FASTGAN_DEVICE void narrow(bfloat16& out, float x) {
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
FASTGAN_DEVICE void narrow(float16& out, float x) { out.bits = __half_as_ushort(__float2half_rn(x)); }

// A quotient to within 2 ulp in float, for 2^-126 <= b <= 2^126: no branch, and no call for rare cases.
FASTGAN_DEVICE float quick_divide(float a, float b) { return __fdividef(a, b); }
FASTGAN_DEVICE double quick_divide(double a, double b) { return a / b; }

// What sums are kept in for each storage type.
template <class S>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};
template <class S>
using AccumulateType = typename AccumulateIn<S>::type;

template <class S, int V>
struct alignas(sizeof(S) * V) Packed {
  S values[V];
};

// V neighbouring elements, widened; p is aligned to all of them.
template <int V, class S>
FASTGAN_DEVICE void load_vector(const S* p, AccumulateType<S> (&out)[V]) {
  Packed<S, V> packed = *reinterpret_cast<const Packed<S, V>*>(p);
#pragma unroll
  for (int i = 0; i < V; ++i) out[i] = widen(packed.values[i]);
}

template <int V, class S>
FASTGAN_DEVICE void store_vector(S* p, const AccumulateType<S> (&from)[V]) {
  Packed<S, V> packed;
#pragma unroll
  for (int i = 0; i < V; ++i) narrow(packed.values[i], from[i]);
  *reinterpret_cast<Packed<S, V>*>(p) = packed;
}

// Host: whether `p` may be read as vectors of `bytes`; null may.
inline bool is_aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace fastgan
