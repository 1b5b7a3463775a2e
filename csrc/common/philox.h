// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3, SC 2011): four
// 32-bit words for each counter of four 32-bit words, a pure function of counter and key. The same bits on
// every instruction set, and as fastgan.ops.attention.philox4x32.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/vector.h"

namespace fastgan {
namespace {

typedef uint64_t PhiloxLanes __attribute__((vector_size(kVectorBytes)));

// The product of the low halves of each lane; the high halves may hold anything.
FASTGAN_INLINE PhiloxLanes multiply_low_halves(PhiloxLanes a, PhiloxLanes b) {
#if defined(__AVX512F__)
  return (PhiloxLanes)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (PhiloxLanes)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && !defined(FASTGAN_VECTOR_BYTES)
  return (PhiloxLanes)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Words of the counters (c0, c1, c2, first), (c0, c1, c2, first + 1), ...: word i of counter n at words[4 n +
// i]. Writes `count` words rounded up to kPhiloxStep.
constexpr int kPhiloxVectors = 2;
constexpr int kPhiloxStep = kPhiloxVectors * kVectorBytes / 2;

inline void philox_row(uint32_t* words, int64_t count, uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2,
                       uint32_t first) {
  constexpr int N = kVectorBytes / 8, U = kPhiloxVectors;
  const PhiloxLanes zero{}, m0 = zero + 0xD2511F53u, m1 = zero + 0xCD9E8D57u;
  const PhiloxLanes step0 = zero + 0x9E3779B9u, step1 = zero + 0xBB67AE85u;
  // Counters lie in the lanes so that two exchanges of neighbours put all words in order.
  PhiloxLanes index{}, even{}, odd{};
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    index[i] = uint64_t(i % 2 ? N / 2 + i / 2 : i / 2);
    even[i] = uint64_t(i % 2 ? N + i - 1 : i);
    odd[i] = uint64_t(i % 2 ? N + i : i + 1);
  }
  for (int64_t done = 0; done < count; done += kPhiloxStep, first += N * U) {
    PhiloxLanes x0[U], x1[U], x2[U], x3[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      x0[u] = zero + c0;
      x1[u] = zero + c1;
      x2[u] = zero + c2;
      x3[u] = index + (uint64_t(first) + uint64_t(N * u));
    }
    PhiloxLanes k0 = zero + (seed & 0xffffffffu), k1 = zero + (seed >> 32);
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        // What the high halves hold is never looked at: products take the low ones.
        PhiloxLanes p0 = multiply_low_halves(x0[u], m0), p1 = multiply_low_halves(x2[u], m1);
        x0[u] = (p1 >> 32) ^ x1[u] ^ k0;
        x1[u] = p1;
        x2[u] = (p0 >> 32) ^ x3[u] ^ k1;
        x3[u] = p0;
      }
      k0 += step0;
      k1 += step1;
    }
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      PhiloxLanes front = (x0[u] & 0xffffffffu) | (x1[u] << 32), back = (x2[u] & 0xffffffffu) | (x3[u] << 32);
      PhiloxLanes low = __builtin_shuffle(front, back, even), high = __builtin_shuffle(front, back, odd);
      std::memcpy(words, &low, sizeof low);
      std::memcpy(words + kVectorBytes / 4, &high, sizeof high);
      words += kVectorBytes / 2;
    }
  }
}

// Dropout: which of the next numbers stay.
template <class T>
FASTGAN_INLINE Mask<T> kept(const uint32_t* words, uint32_t threshold) {
  typedef uint32_t Words __attribute__((vector_size(lanes<T> * 4)));
  Words w;
  std::memcpy(&w, words, sizeof w);
  return __builtin_convertvector(w >= threshold, Mask<T>);
}

}  // namespace
}  // namespace fastgan
