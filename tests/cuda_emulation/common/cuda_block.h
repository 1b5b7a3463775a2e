// csrc/common/cuda_block.h for the emulator.
#pragma once
#include "common/cuda_launch.h"

namespace fastgan {

constexpr int kWarp = 32;

FASTGAN_DEVICE void block_sync(emulator::Where where = emulator::Where::current()) {
  emulator::block_barrier(where);
}
FASTGAN_DEVICE void warp_sync(emulator::Where where = emulator::Where::current()) {
  emulator::warp_barrier(where);
}

template <class T>
FASTGAN_DEVICE T shuffle(T value, int source, emulator::Where where = emulator::Where::current()) {
  return emulator::gather(value, where)[source];
}
template <class T>
FASTGAN_DEVICE T shuffle_xor(T value, int mask, emulator::Where where = emulator::Where::current()) {
  return fastgan::shuffle(value, int(threadIdx.x % kWarp) ^ mask, where);  // not std::shuffle
}

class SharedMemory {
 public:
  template <class T>
  T* take(int count) {
    size_t offset = used_;
    used_ += bytes<T>(count);
    return static_cast<T*>(emulator::shared(offset, size_t(count) * sizeof(T)));
  }
  template <class T>
  static constexpr size_t bytes(int count) {
    return (size_t(count) * sizeof(T) + 15) / 16 * 16;
  }

 private:
  size_t used_ = 0;
};

}  // namespace fastgan
