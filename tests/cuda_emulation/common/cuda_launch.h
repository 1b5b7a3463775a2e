// csrc/common/cuda_launch.h for the emulator.
#pragma once
#include <math.h>  // the global overloads for float

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "emulator.h"

#define FASTGAN_DEVICE inline __attribute__((always_inline))

namespace fastgan {

using Error = const char*;

// Of the GPU that is pretended.
inline int multiprocessors() { return 8; }

// Of compute capability 9.0 where FASTGAN_EMULATED_GPU is 90; all kernels were compiled for it.
template <class Kernel>
bool was_compiled(Kernel) {
  const char* gpu = std::getenv("FASTGAN_EMULATED_GPU");
  return gpu && std::strcmp(gpu, "90") == 0;
}

template <class Kernel>
bool runs_clusters(Kernel kernel, int, int, size_t) {
  return was_compiled(kernel);
}

template <class... Parameters, class... Args>
inline Error launch_clusters(void (*kernel)(Parameters...), int64_t grid, int blocks, int threads,
                             size_t shared_bytes, void*, const Args&... args) {
  if (grid <= 0) return nullptr;
  if (grid > 0x7fffffff) return "the tensor is too large for one launch";
  if (shared_bytes > 227 * 1024) return "emulator: no GPU has that much shared memory";
  if (emulator::recording()) {
    emulator::record({reinterpret_cast<const void*>(kernel), grid, threads, int64_t(shared_bytes)});
    return nullptr;
  }
  return emulator::launch(unsigned(grid), unsigned(blocks), unsigned(threads), shared_bytes,
                          [&] { kernel(args...); });
}

template <class... Parameters, class... Args>
inline Error launch(void (*kernel)(Parameters...), int64_t grid, int threads, size_t shared_bytes,
                    void* stream, const Args&... args) {
  return launch_clusters(kernel, grid, 1, threads, shared_bytes, stream, args...);
}

}  // namespace fastgan
