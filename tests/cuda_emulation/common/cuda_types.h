// csrc/common/cuda_types.h for the emulator.
#pragma once
#include "common/cuda_launch.h"
#include "common/types.h"

namespace fastgan {

// Conversions by the compiler's own half type and by bits: nothing shared with the CPU kernels that judge.
FASTGAN_DEVICE float widen(float x) { return x; }
FASTGAN_DEVICE double widen(double x) { return x; }
FASTGAN_DEVICE float widen(tf32 x) { return x.value; }
FASTGAN_DEVICE float widen(bfloat16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
FASTGAN_DEVICE float widen(float16 x) { return float(__builtin_bit_cast(_Float16, x.bits)); }

FASTGAN_DEVICE void narrow(float& out, float x) { out = x; }
FASTGAN_DEVICE void narrow(double& out, double x) { out = x; }
FASTGAN_DEVICE void narrow(tf32& out, float x) { out.value = x; }
FASTGAN_DEVICE void narrow(bfloat16& out, float x) {
  uint32_t bits = __builtin_bit_cast(uint32_t, x);
  out.bits = x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
FASTGAN_DEVICE void narrow(float16& out, float x) {
  out.bits = __builtin_bit_cast(uint16_t, static_cast<_Float16>(x));
}

FASTGAN_DEVICE uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
FASTGAN_DEVICE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

FASTGAN_DEVICE float forget(float x) { return x; }

// Two units in the last place off, as the device's may be.
FASTGAN_DEVICE float quick_divide(float a, float b) { return a / b * (1 + 2 * 1.1920929e-7f); }
FASTGAN_DEVICE double quick_divide(double a, double b) { return a / b; }

// As the device's: up to two units off but at 0, and no denormals.
FASTGAN_DEVICE float quick_exp2(float x) {
  float out = x == 0 ? 1.0f : exp2f(x) * (1 + 2 * 1.1920929e-7f);
  return out < 1.17549435e-38f ? 0.0f : out;
}
FASTGAN_DEVICE double quick_exp2(double x) { return exp2(x); }

template <class S>
FASTGAN_DEVICE uint32_t narrow_pair(float low, float high) {
  S pair[2];
  narrow(pair[0], low);
  narrow(pair[1], high);
  return uint32_t(pair[0].bits) | uint32_t(pair[1].bits) << 16;
}

template <int N>
FASTGAN_DEVICE void store_words(void* p, const uint32_t (&words)[N]) {
  struct alignas(4 * N) All {
    uint32_t words[N];
  };
  *static_cast<All*>(p) = __builtin_bit_cast(All, words);
}

}  // namespace fastgan

#include "common/cuda_vectors.h"
