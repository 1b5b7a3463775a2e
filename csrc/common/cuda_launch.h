// How a .cu file starts its kernels, and the names that such a kernel is written with. One of the thin
// headers that stand between the kernels and the toolkit (cuda_launch.h, cuda_block.h, cuda_cluster.h,
// cuda_tensor_core.h, cuda_types.h, cuda_warpgroup.h): tests/cuda_emulation/common has a host version of
// each, so that the same .cu file runs there.
#pragma once
#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

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

// What holds of the current GPU or not, asked once for each of the first.
class OfEachGpu {
 public:
  template <class Ask>
  bool operator()(Ask ask) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return false;
    if (device < kKept)
      if (const int8_t known = known_[device].load(std::memory_order_relaxed)) return known == kYes;
    const bool is = ask();
    (void)cudaGetLastError();
    if (device < kKept) known_[device].store(is ? kYes : kNo, std::memory_order_relaxed);
    return is;
  }

 private:
  static constexpr int kKept = 16;
  static constexpr int8_t kNo = 1, kYes = 2;
  std::atomic<int8_t> known_[kKept] = {};
};

// Whether a kernel that only some GPUs can run was compiled for the current one: elsewhere its body is empty,
// which takes few registers. Kernels of one type were all compiled or none was.
template <class Kernel>
bool was_compiled(Kernel kernel) {
  static OfEachGpu known;
  return known([&] {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.numRegs > 32;
  });
}

// How a grid of clusters of `blocks` is asked for.
struct ClusterLaunch {
  cudaLaunchAttribute cluster = {};
  cudaLaunchConfig_t config = {};
  ClusterLaunch(int64_t grid, int blocks, int threads, size_t shared_bytes, void* stream) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(blocks), cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = dim3(unsigned(grid)), config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared_bytes, config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster, config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;  // it points to itself
};

// Whether a kernel for clusters was compiled for the current GPU, and one of `blocks` has room there: a part
// of a GPU may have few multiprocessors.
template <class Kernel>
bool runs_clusters(Kernel kernel, int blocks, int threads, size_t shared_bytes) {
  static OfEachGpu known;
  return was_compiled(kernel) && known([&] {
           const ClusterLaunch one(blocks, blocks, threads, shared_bytes, nullptr);
           int at_once = 0;
           return cudaOccupancyMaxActiveClusters(&at_once, kernel, &one.config) == cudaSuccess && at_once > 0;
         });
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

// The same for a grid of clusters of `blocks`, a power of two up to eight, which divides it; at most 48 KB.
template <class... Parameters, class... Args>
inline Error launch_clusters(void (*kernel)(Parameters...), int64_t grid, int blocks, int threads,
                             size_t shared_bytes, void* stream, const Args&... args) {
  if (grid <= 0) return nullptr;
  if (grid > 0x7fffffff) return "the tensor is too large for one launch";
  const ClusterLaunch launch(grid, blocks, threads, shared_bytes, stream);
  cudaError_t error = cudaLaunchKernelEx(&launch.config, kernel, args...);
  if (error == cudaSuccess) error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastgan
