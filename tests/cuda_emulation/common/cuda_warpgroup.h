// csrc/common/cuda_warpgroup.h for the emulator: panels by the layout that is documented there, products at
// once.
#pragma once
#include "common/cuda_tensor_core.h"

namespace fastgan {

constexpr int kWarpgroup = 128;
constexpr bool kHasWarpgroups = true, kOnlyWarpgroups = false;

struct Panels {
  const uint16_t* at;
  int next;
  // Element `column` of row `row`: bits 4 to 6 of the address are changed by bits 7 to 9, as hardware does.
  uint16_t element(int row, int column) const {
    uintptr_t address = reinterpret_cast<uintptr_t>(at + column / 64 * next + row * 64 + column % 64);
    address ^= (address >> 7 & 7) << 4;
    return *reinterpret_cast<const uint16_t*>(address);
  }
};

template <class S>
FASTGAN_DEVICE Panels panels_at(const S* at, int next = 0) {
  if (reinterpret_cast<uintptr_t>(at) % 16) emulator::fault("wgmma: a matrix is not aligned to 16 bytes");
  return {reinterpret_cast<const uint16_t*>(at), next};
}

template <class S>
FASTGAN_DEVICE Panels advanced(Panels matrix, int elements) {
  return {matrix.at + elements, matrix.next};
}

FASTGAN_DEVICE void fence_shared() {}
FASTGAN_DEVICE void begin_products(emulator::Where where = emulator::Where::current()) {
  emulator::warp_barrier(where);
}
FASTGAN_DEVICE void commit_products() {}
template <int pending>
FASTGAN_DEVICE void wait_for_products(emulator::Where where = emulator::Where::current()) {
  emulator::warp_barrier(where);
}
template <int N8>
FASTGAN_DEVICE void hold(float (&)[N8][4]) {}

// Products in float, summed in double and rounded once, as in cuda_tensor_core.h.
template <class S, int N>
inline void multiply_shared(float (&d)[N / 8][4], Panels a, Panels b, bool add) {
  const int lane = int(threadIdx.x % kWarp), row0 = int(threadIdx.x % kWarpgroup) / kWarp * 16 + lane / 4;
  for (int j = 0; j < N / 8; ++j)
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + i / 2 * 8, column = 8 * j + lane % 4 * 2 + i % 2;
      double sum = add ? double(d[j][i]) : 0;
      for (int k = 0; k < 16; ++k)
        sum += double(widen(S{a.element(row, k)})) * double(widen(S{b.element(column, k)}));
      d[j][i] = float(sum);
    }
}

template <class S, int N>
inline void multiply_registers(float (&d)[N / 8][4], const uint32_t (&a)[4], Panels b, bool add,
                               emulator::Where where = emulator::Where::current()) {
  struct Lane {
    uint32_t a[4];
  };
  const auto all = emulator::gather(Lane{{a[0], a[1], a[2], a[3]}}, where);
  const int lane = int(threadIdx.x % kWarp);
  for (int j = 0; j < N / 8; ++j)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = 8 * j + lane % 4 * 2 + i % 2;
      double sum = add ? double(d[j][i]) : 0;
      for (int k = 0; k < 16; ++k) {
        const uint32_t word = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
        sum += double(half_of<S>(word, k % 2)) * double(widen(S{b.element(k, column)}));
      }
      d[j][i] = float(sum);
    }
}

}  // namespace fastgan
