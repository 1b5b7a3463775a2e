// What the threads of a block do together: barriers, shuffles within a warp, shared memory. Every function
// here is for all threads of the block, or of the warp, at the same place of the program. A shuffle orders no
// memory: what a lane stores for another to read needs warp_sync or block_sync between.
#pragma once
#include "common/cuda_launch.h"

namespace fastgan {

constexpr int kWarp = 32;

FASTGAN_DEVICE void block_sync() { __syncthreads(); }
FASTGAN_DEVICE void warp_sync() { __syncwarp(); }

// The value of the lane whose number differs in the bits of `mask`.
template <class T>
FASTGAN_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The value of lane `source`.
template <class T>
FASTGAN_DEVICE T shuffle(T value, int source) {
  return __shfl_sync(0xffffffffu, value, source);
}

// Cuts a block's dynamic shared memory, which is aligned to 1024 bytes, into arrays, each aligned to 16
// bytes; every thread takes the same ones in the same order. What they hold at first is anything.
class SharedMemory {
 public:
  template <class T>
  FASTGAN_DEVICE T* take(int count) {
    extern __shared__ __align__(1024) unsigned char fastgan_shared_memory[];
    T* out = reinterpret_cast<T*>(fastgan_shared_memory + used_);
    used_ += bytes<T>(count);
    return out;
  }
  // What the host adds up for launch().
  template <class T>
  static constexpr __host__ __device__ size_t bytes(int count) {
    return (size_t(count) * sizeof(T) + 15) / 16 * 16;
  }

 private:
  size_t used_ = 0;
};

}  // namespace fastgan
