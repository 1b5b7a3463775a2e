// Philox4x32-10 written out, word by word.
#pragma once
#include <cstdint>

namespace harness {

// Of the counter (c0, c1, c2, index / 4) the word index % 4.
inline uint32_t philox_word(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint64_t index) {
  uint32_t c[4] = {c0, c1, c2, uint32_t(index / 4)};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = uint64_t(c[0]) * 0xD2511F53u, p1 = uint64_t(c[2]) * 0xCD9E8D57u;
    uint32_t n[4] = {uint32_t(p1 >> 32) ^ c[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ k1,
                     uint32_t(p0)};
    for (int i = 0; i < 4; ++i) c[i] = n[i];
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return c[index % 4];
}

// The number that dropout takes for the element of an index.
inline uint32_t philox_word(uint64_t seed, uint32_t offset, uint64_t index) {
  return philox_word(seed, offset, 0, uint32_t(index / 4 >> 32), index);
}

}  // namespace harness
