// Storage types in device code: conversions that round to nearest even, and vectors (cuda_vectors.h).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/cuda_launch.h"
#include "common/types.h"

namespace fastgan {

FASTGAN_DEVICE float widen(float x) { return x; }
FASTGAN_DEVICE double widen(double x) { return x; }
FASTGAN_DEVICE float widen(tf32 x) { return x.value; }
FASTGAN_DEVICE float widen(bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
FASTGAN_DEVICE float widen(float16 x) { return __half2float(__ushort_as_half(x.bits)); }

FASTGAN_DEVICE void narrow(float& out, float x) { out = x; }
FASTGAN_DEVICE void narrow(double& out, double x) { out = x; }
FASTGAN_DEVICE void narrow(tf32& out, float x) { out.value = x; }
FASTGAN_DEVICE void narrow(bfloat16& out, float x) {
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
FASTGAN_DEVICE void narrow(float16& out, float x) { out.bits = __half_as_ushort(__float2half_rn(x)); }

FASTGAN_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
FASTGAN_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// x, of which the compiler no longer knows that it has been here before: what follows from it is computed
// again rather than kept in registers.
FASTGAN_DEVICE float forget(float x) {
  asm volatile("" : "+f"(x));
  return x;
}

// A quotient to within 2 ulp in float, for 2^-126 <= b <= 2^126: no branch, and no call for rare cases.
FASTGAN_DEVICE float quick_divide(float a, float b) { return __fdividef(a, b); }
FASTGAN_DEVICE double quick_divide(double a, double b) { return a / b; }

// 2^x to within 2 ulp in float, exact at 0; what would be denormal is zero, NaN stays NaN.
FASTGAN_DEVICE float quick_exp2(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
FASTGAN_DEVICE double quick_exp2(double x) { return exp2(x); }

// Two numbers rounded to one register, the first in the low half.
template <class S>
FASTGAN_DEVICE uint32_t narrow_pair(float low, float high);
template <>
FASTGAN_DEVICE uint32_t narrow_pair<bfloat16>(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<uint32_t&>(pair);
}
template <>
FASTGAN_DEVICE uint32_t narrow_pair<float16>(float low, float high) {
  __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<uint32_t&>(pair);
}

// Words to global memory in one instruction; p is aligned to all of them.
FASTGAN_DEVICE void store_words(void* p, const uint32_t (&w)[1]) {
  asm volatile("st.global.b32 [%0], %1;" ::"l"(p), "r"(w[0]) : "memory");
}
FASTGAN_DEVICE void store_words(void* p, const uint32_t (&w)[2]) {
  asm volatile("st.global.v2.b32 [%0], {%1,%2};" ::"l"(p), "r"(w[0]), "r"(w[1]) : "memory");
}
FASTGAN_DEVICE void store_words(void* p, const uint32_t (&w)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
               : "memory");
}

}  // namespace fastgan

#include "common/cuda_vectors.h"
