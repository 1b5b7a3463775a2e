// Vectors for kernel files, on the compiler's own vector types: the width is a compile-time constant of the
// instruction set that the file is compiled for, arithmetic is written with operators, and comparisons give
// integer masks.
//
//   Vec<T>             T is float or double; lanes<T> elements
//   load<T>(pointer)   reads lanes<T> elements of any storage type (float, double, bfloat16, float16) as
//   Vec<T>; store(pointer, v)  rounds to nearest even; the *_partial forms touch `count` elements and read
//   zero beyond select(mask, a, b) a where the mask is set exp(v)             float: at most 1 ulp from the
//   exact value on [-87, 88] (tests/kernel_harness/vector_harness.cpp), 0 below -104,
//                      +inf above 88.73, NaN stays NaN; double: libm lane by lane
//
// Everything is in an unnamed namespace so that no symbol is shared between instruction sets (see threads.h).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "common/types.h"

namespace fastgan {
namespace {

#if defined(FASTGAN_VECTOR_BYTES)  // a test's: the compiler makes several registers of one vector
constexpr int kVectorBytes = FASTGAN_VECTOR_BYTES;
#elif defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
constexpr int lanes = kVectorBytes / int(sizeof(T));

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
  typedef float unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
  typedef double unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
using Mask = typename VecOf<T>::mask;

#define FASTGAN_INLINE __attribute__((always_inline)) inline
#define FASTGAN_INLINE_LAMBDA __attribute__((always_inline))

// x in every lane. Subtracting zero changes nothing, -0 included, so that this is one broadcast; adding would
// be two.
template <class T>
FASTGAN_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// ---- scalars ----

FASTGAN_INLINE float to_float(bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

FASTGAN_INLINE bfloat16 to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40)};  // NaN stays NaN
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

FASTGAN_INLINE float to_float(float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Shift the half's exponent and fraction under the float's and let a multiplication by 2^112 mend the bias:
  // exact, denormals included. What was infinite or NaN is then at 2^16 or above and gets the float's own
  // exponent.
  uint32_t bits = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  out *= 5.192296858534828e33f;
  std::memcpy(&bits, &out, 4);
  if (out >= 65536.0f) bits |= 0x7f800000u;
  bits |= sign;
  std::memcpy(&out, &bits, 4);
  return out;
#endif
}

FASTGAN_INLINE float16 to_float16(float x) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00)};  // rounds to 65520 or more: infinity
  if (magnitude < 0x38800000u) {                                   // a half denormal: let the adder round it
    float shifted;
    std::memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    std::memcpy(&magnitude, &shifted, 4);
    return {uint16_t(sign | (magnitude - 0x3f000000u))};
  }
  magnitude += 0xc8000000u + 0xfffu + ((magnitude >> 13) & 1);
  return {uint16_t(sign | (magnitude >> 13))};
#endif
}

template <class T>
FASTGAN_INLINE T load1(const float* p) {
  return T(*p);
}
template <class T>
FASTGAN_INLINE T load1(const double* p) {
  return T(*p);
}
template <class T>
FASTGAN_INLINE T load1(const bfloat16* p) {
  return T(to_float(*p));
}
template <class T>
FASTGAN_INLINE T load1(const float16* p) {
  return T(to_float(*p));
}
FASTGAN_INLINE void store1(float* p, float x) { *p = x; }
FASTGAN_INLINE void store1(double* p, double x) { *p = x; }
FASTGAN_INLINE void store1(bfloat16* p, float x) { *p = to_bfloat16(x); }
FASTGAN_INLINE void store1(float16* p, float x) { *p = to_float16(x); }

// ---- vectors ----

template <class T>
FASTGAN_INLINE Vec<T> splat(T x) {
  return Vec<T>{} + x;
}

template <class T>
FASTGAN_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(p);
}
template <class T>
FASTGAN_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(p) = v;
}

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t WordBits __attribute__((vector_size(kVectorBytes)));

template <class T>
FASTGAN_INLINE Vec<float> load(const bfloat16* p) {
  HalfBits half;
  std::memcpy(&half, p, sizeof half);
  return (Vec<float>)(__builtin_convertvector(half, WordBits) << 16);
}
// Kernels that are compiled for AVX512_BF16 take its instruction: denormal numbers become 0.
FASTGAN_INLINE void store(bfloat16* p, Vec<float> v) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &half, sizeof half);
#else
  WordBits bits = (WordBits)v;
  WordBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  Mask<float> nan = v != v;
  WordBits out = ((WordBits)nan & ((bits >> 16) | 0x40)) | (~(WordBits)nan & rounded);
  HalfBits half = __builtin_convertvector(out, HalfBits);
  std::memcpy(p, &half, sizeof half);
#endif
}

template <class T>
FASTGAN_INLINE Vec<float> load(const float16* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> out;
  for (int i = 0; i < lanes<float>; ++i) out[i] = to_float(p[i]);
  return out;
#endif
}
FASTGAN_INLINE void store(float16* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < lanes<float>; ++i) p[i] = to_float16(v[i]);
#endif
}

// `load<Compute>(pointer)` for every storage type: the first template argument is the compute type
// throughout.
template <class T, class Storage>
FASTGAN_INLINE Vec<T> load_partial(const Storage* p, int count) {
  Storage buffer[lanes<T>] = {};
  std::memcpy(buffer, p, size_t(count) * sizeof(Storage));
  return load<T>(buffer);
}
template <class T, class Storage>
FASTGAN_INLINE void store_partial(Storage* p, Vec<T> v, int count) {
  Storage buffer[lanes<T>];
  store(buffer, v);
  std::memcpy(p, buffer, size_t(count) * sizeof(Storage));
}

FASTGAN_INLINE Vec<float> select(Mask<float> mask, Vec<float> a, Vec<float> b) { return mask ? a : b; }
FASTGAN_INLINE Vec<double> select(Mask<double> mask, Vec<double> a, Vec<double> b) { return mask ? a : b; }

// a where a > b, else b: a NaN in b is kept, one in a is lost.
template <class V>
FASTGAN_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
template <class V>
FASTGAN_INLINE V min(V a, V b) {
  return a < b ? a : b;
}

// v with the lanes exchanged that are kStep, a power of two, apart.
template <class T, int kStep>
FASTGAN_INLINE Vec<T> exchanged(Vec<T> v) {
  Mask<T> from{};
#pragma GCC unroll 16
  for (int i = 0; i < lanes<T>; ++i) from[i] = i ^ kStep;
  return __builtin_shuffle(v, from);
}

// Pairs that are half a vector apart, then a quarter, ...
template <class T, int kStep = lanes<T> / 2>
FASTGAN_INLINE T sum(Vec<T> v) {
  if constexpr (kStep == 0)
    return v[0];
  else
    return sum<T, kStep / 2>(v + exchanged<T, kStep>(v));
}
template <class T, int kStep = lanes<T> / 2>
FASTGAN_INLINE T maximum(Vec<T> v) {
  if constexpr (kStep == 0)
    return v[0];
  else
    return maximum<T, kStep / 2>(max(v, exchanged<T, kStep>(v)));
}

// exp(x) = 2^n times what is returned, n the nearest integer to x / ln 2; it is in the low bits of `shifted`.
FASTGAN_INLINE Vec<float> exp_of_rest(Vec<float> x, Vec<float>& shifted) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
  shifted = x * 1.44269504088896341f + kShift;
  Vec<float> n = shifted - kShift;
  Vec<float> r = x - n * 0.693359375f;  // ln 2 in two parts, the first exact in 9 bits
  r = r + n * 2.12194440e-4f;
  // e^r on [-ln2/2, ln2/2]
  Vec<float> p = splat<float>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r + 1.0f;
}

FASTGAN_INLINE Vec<float> exp(Vec<float> x) {
  typedef Mask<float> Int;
  // Clamped by comparisons that are false for NaN, so that NaN goes through.
  Vec<float> clamped = select(x < -105.0f, splat<float>(-105.0f), select(x > 89.0f, splat<float>(89.0f), x));
  Vec<float> shifted;
  const Vec<float> p = exp_of_rest(clamped, shifted);
  Int integer = (Int)shifted - (int32_t)0x4b400000;
  // 2^n in two halves, so that denormal results and the last binade before infinity are right.
  Int half = integer >> 1, rest = integer - half;
  Vec<float> a = (Vec<float>)((half + 127) << 23), b = (Vec<float>)((rest + 127) << 23);
  return p * a * b;
}

FASTGAN_INLINE Vec<double> exp(Vec<double> x) {
  Vec<double> out;
  for (int i = 0; i < lanes<double>; ++i) out[i] = std::exp(x[i]);
  return out;
}

}  // namespace
}  // namespace fastgan
