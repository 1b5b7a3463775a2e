// Philox4x32-10 for one counter, in device code: the same words as common/philox.h's, on the same counters.
#pragma once
#include "common/cuda_launch.h"

namespace fastgan {

FASTGAN_DEVICE void philox4x32(uint32_t (&x)[4], uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = uint64_t(x[0]) * 0xD2511F53u, p1 = uint64_t(x[2]) * 0xCD9E8D57u;
    x[0] = uint32_t(p1 >> 32) ^ x[1] ^ k0;
    x[1] = uint32_t(p1);
    x[2] = uint32_t(p0 >> 32) ^ x[3] ^ k1;
    x[3] = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace fastgan
