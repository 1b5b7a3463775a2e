// csrc/common/cuda_tensor_core.h for the emulator: fragments by the layout that is documented there, and
// asynchronous copies as late as they may come, at the wait; before it, the place holds NaNs.
#pragma once
#include <cmath>

#include "common/cuda_block.h"
#include "common/cuda_types.h"

namespace fastgan {

template <class S>
FASTGAN_DEVICE float half_of(uint32_t word, int which) {
  return widen(S{uint16_t(which ? word >> 16 : word)});
}

// A lane's fragments of two factors.
struct Fragments {
  uint32_t a[4], b[2];
};
inline emulator::Lanes<Fragments> gather_fragments(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                   emulator::Where where) {
  return emulator::gather(Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, where);
}

// Products in float, summed in double and rounded once: hardware's order is its own, and a test's bound has
// to hold for any.
template <class S>
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         emulator::Where where = emulator::Where::current()) {
  const auto all = gather_fragments(a, b, where);
  int lane = int(threadIdx.x % kWarp);
  for (int i = 0; i < 4; ++i) {
    int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = double(c[i]);
    for (int k = 0; k < 16; ++k) {
      const Fragments& from_a = all[row % 8 * 4 + k % 8 / 2];
      const Fragments& from_b = all[column * 4 + k % 8 / 2];
      sum += double(half_of<S>(from_a.a[row / 8 + k / 8 * 2], k % 2)) *
             double(half_of<S>(from_b.b[k / 8], k % 2));
    }
    c[i] = float(sum);
  }
}

// Of a float what TF32 has; the sum cut off, not rounded, as tensor cores do.
FASTGAN_DEVICE double tf32_of(uint32_t bits) { return double(float_of(bits & 0xffffe000u)); }
inline float cut_off(double x) {
  float out = float(x);
  if (std::isfinite(out) && std::fabs(double(out)) > std::fabs(x)) out = std::nextafter(out, 0.0f);
  return out;
}
inline void mma_m16n8k8(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                        emulator::Where where = emulator::Where::current()) {
  const auto all = gather_fragments(a, b, where);
  int lane = int(threadIdx.x % kWarp);
  for (int i = 0; i < 4; ++i) {
    int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = double(c[i]);
    for (int k = 0; k < 8; ++k)
      sum += tf32_of(all[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]) *
             tf32_of(all[column * 4 + k % 4].b[k / 4]);
    c[i] = cut_off(sum);
  }
}

inline void load_matrices_of(uint32_t (&out)[4], const void* row, bool transposed, emulator::Where where) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fault("ldmatrix: a row is not aligned to 16 bytes");
  const auto rows = emulator::gather(static_cast<const uint16_t*>(row), where);
  int r = int(threadIdx.x % kWarp) / 4, q = int(threadIdx.x % kWarp) % 4;
  for (int tile = 0; tile < 4; ++tile) {
    const int first = tile * 8;
    uint16_t low = transposed ? rows[first + 2 * q][r] : rows[first + r][2 * q];
    uint16_t high = transposed ? rows[first + 2 * q + 1][r] : rows[first + r][2 * q + 1];
    out[tile] = uint32_t(low) | uint32_t(high) << 16;
  }
}
FASTGAN_DEVICE void load_matrices(uint32_t (&out)[4], const void* row,
                                  emulator::Where where = emulator::Where::current()) {
  load_matrices_of(out, row, false, where);
}
FASTGAN_DEVICE void load_matrices_transposed(uint32_t (&out)[4], const void* row,
                                             emulator::Where where = emulator::Where::current()) {
  load_matrices_of(out, row, true, where);
}

inline void async_copy16(void* to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || (valid && reinterpret_cast<uintptr_t>(from) % 16))
    emulator::fault("cp.async: an address is not aligned to 16 bytes");
  std::memset(to, 0xff, 16);
  emulator::async_add({to, from, valid});
}
inline void async_commit() { emulator::async_end_group(); }
template <int pending>
inline void async_wait() {
  emulator::AsyncCopy copy;
  while (emulator::async_take(pending, &copy)) {
    if (copy.valid)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
  }
}

}  // namespace fastgan
