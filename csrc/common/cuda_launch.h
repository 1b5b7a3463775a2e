// How a .cu file starts its kernels, and the names that such a kernel is written with. One of the thin
// headers that stand between the kernels and the toolkit (cuda_launch.h, cuda_block.h, cuda_tensor_core.h,
// cuda_types.h, cuda_warpgroup.h): tests/cuda_emulation/common has a host version of each, so that the same
// .cu file runs there.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>

#define FASTGAN_DEVICE __device__ __forceinline__

namespace fastgan {

// Null, or what CUDA says went wrong: kernels come back with a message, and only *_op.cpp throws.
using Error = const char*;

// Of the current device; 1 where that cannot be asked.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  return count;
}

// kernel<<<grid, threads, shared_bytes, stream>>>(args...); threads is a multiple of 32.
template <class... Parameters, class... Args>
inline Error launch(void (*kernel)(Parameters...), int64_t grid, int threads, size_t shared_bytes,
                    void* stream, const Args&... args) {
  if (grid <= 0) return nullptr;
  if (grid > 0x7fffffff) return "the tensor is too large for one launch";
  if (shared_bytes > 48 * 1024) {
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  kernel<<<dim3(unsigned(grid)), dim3(unsigned(threads)), shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      args...);
  cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastgan
