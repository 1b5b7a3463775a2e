// What the *_op.cpp files share: the only bridge between kernels and PyTorch, on the LibTorch stable ABI.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "common/capability.h"
#include "common/threads.h"
#include "common/types.h"

// An *_op.cpp with a CUDA kernel is compiled for the CPU and, with FASTGAN_CUDA, for fastgan._C_cuda: the
// same checks and outputs. The tests compile it with FASTGAN_EMULATED as well, in a namespace of its own, to
// run CUDA's kernels on the CPU's tensors.
#if defined(FASTGAN_EMULATED)
#define FASTGAN_NAMESPACE fastgan_emulated
#define FASTGAN_DEVICE_KEY CPU
#elif defined(FASTGAN_CUDA)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define FASTGAN_NAMESPACE fastgan
#define FASTGAN_DEVICE_KEY CUDA
#else
#define FASTGAN_NAMESPACE fastgan
#define FASTGAN_DEVICE_KEY CPU
#endif
#define FASTGAN_LIBRARY_IMPL_(space, key, m) STABLE_TORCH_LIBRARY_IMPL(space, key, m)  // expands the names
#define FASTGAN_LIBRARY_IMPL(m) FASTGAN_LIBRARY_IMPL_(FASTGAN_NAMESPACE, FASTGAN_DEVICE_KEY, m)

// Runs a kernel of the contract on the device of `tensor`.
#if defined(FASTGAN_CUDA)
#define FASTGAN_RUN(name, args, tensor) \
  fastgan::check_launch(#name, fastgan_##name##_cuda(args, fastgan::current_stream(tensor)))
#else
#define FASTGAN_RUN(name, args, tensor) FASTGAN_SELECT(name)(args, fastgan::torch_threads())
#endif

// Guards memory; what a user can get wrong is refused in fastgan/nn/_functional/, with torch's exception
// types.
#define FASTGAN_CHECK(condition, ...)                                          \
  do {                                                                         \
    if (!(condition)) throw std::runtime_error(fastgan::message(__VA_ARGS__)); \
  } while (false)

namespace fastgan {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Not by a stream: a number written to one ended a process with torch 2.11 on CUDA. Why is not known.
template <class Part>
inline std::string text_of(const Part& part) {
  if constexpr (std::is_floating_point_v<Part>) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%g", double(part));
    return digits;
  } else if constexpr (std::is_integral_v<Part>) {
    return std::to_string(part);
  } else {
    return std::string(part);
  }
}
template <class... Parts>
inline std::string message(const Parts&... parts) {
  return (std::string() + ... + text_of(parts));
}

// torch's own thread pool; ranges never smaller than the grain, except the last.
inline const Threads& torch_threads() {
  static const Threads threads{[](int64_t count, int64_t grain, RangeBody body, void* context) {
    torch::stable::parallel_for(0, count, grain,
                                [&](int64_t begin, int64_t end) { body(begin, end, context); });
  }};
  return threads;
}

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      throw std::runtime_error("expected a tensor of float32, float64, bfloat16 or float16");
  }
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> out;
  for (int64_t d = 0; d < tensor.dim(); ++d) out.push_back(tensor.size(d));
  return out;
}

inline Tensor contiguous_as(const Tensor& tensor, ScalarType type) {
  return torch::stable::contiguous(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

// Numbers of Philox below this are dropped.
inline uint32_t dropout_threshold(double p) {
  const double threshold = p * 4294967296.0;
  return threshold >= 4294967295.0 ? 0xffffffffu : uint32_t(threshold);
}

// Sets what the contracts of dropout on the CPU ask for: seed, offset, threshold and scale.
template <class Args>
inline void set_dropout(Args& args, const Tensor& philox, double p) {
  FASTGAN_CHECK(
      philox.dim() == 1 && philox.size(0) == 2 && philox.scalar_type() == ScalarType::Long && philox.is_cpu(),
      "philox must be int64 of shape (2), on input's device");
  FASTGAN_CHECK(p >= 0.0 && p < 1.0, "p must be at least 0 and less than 1, got ", p);
  const auto* words = static_cast<const int64_t*>(philox.data_ptr());
  args.seed = uint64_t(words[0]);
  args.offset = uint32_t(uint64_t(words[philox.stride(0)]));
  args.threshold = dropout_threshold(p);
  args.scale = 1.0 / (1.0 - p);
}

// float32 for the half-precision types, the type itself otherwise: what sums and statistics are kept in.
inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline torch::headeronly::MemoryFormat format_of(const std::vector<int64_t>& sizes, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  if (!channels_last) return MemoryFormat::Contiguous;
  return sizes.size() < 5 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

#if defined(FASTGAN_CUDA)
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::empty(sizes, type);
}
inline void check_launch(const char* kernel, const char* error) {
  FASTGAN_CHECK(!error, kernel, ": ", error);
}
#else
// Uninitialised, on the CPU, large ones in memory of the pool (common/pool.h).
Tensor new_output(const std::vector<int64_t>& sizes, ScalarType type, bool channels_last);
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
  return new_output(sizes, type, false);
}
#endif

#if defined(FASTGAN_CUDA) && !defined(FASTGAN_EMULATED)
// Makes the tensor's device the current one while it lives. Hidden, as torch's guard is.
struct __attribute__((visibility("hidden"))) DeviceScope {
  explicit DeviceScope(const Tensor& tensor) : guard(tensor.get_device_index()) {}
  torch::stable::accelerator::DeviceGuard guard;
};
inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}
inline std::optional<torch::stable::Device> device_of(const Tensor& tensor) { return tensor.device(); }
inline bool is_here(const Tensor& tensor, const Tensor& beside) { return tensor.device() == beside.device(); }
#else
struct DeviceScope {
  explicit DeviceScope(const Tensor&) {}
};
inline void* current_stream(const Tensor&) { return nullptr; }
inline std::optional<torch::stable::Device> device_of(const Tensor&) { return std::nullopt; }
inline bool is_here(const Tensor& tensor, const Tensor&) { return tensor.is_cpu(); }
#endif

// On the device of `beside`.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, [[maybe_unused]] const Tensor& beside,
                    bool channels_last = false) {
#if defined(FASTGAN_CUDA)
  return torch::stable::empty(sizes, type, std::nullopt, device_of(beside), std::nullopt,
                              format_of(sizes, channels_last));
#else
  return new_output(sizes, type, channels_last);
#endif
}

}  // namespace fastgan
