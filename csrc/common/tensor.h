// What the *_op.cpp files share: the only bridge between kernels and PyTorch, on the LibTorch stable ABI.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "common/threads.h"
#include "common/types.h"

// Guards memory; what a user can get wrong is refused in fastgan/nn/functional.py, with torch's exception
// types.
#define FASTGAN_CHECK(condition, ...)                                          \
  do {                                                                         \
    if (!(condition)) throw std::runtime_error(fastgan::message(__VA_ARGS__)); \
  } while (false)

namespace fastgan {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
inline std::string message(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
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

// float32 for the half-precision types, the type itself otherwise: what sums and statistics are kept in.
inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty(std::vector<int64_t> sizes, ScalarType type) { return torch::stable::empty(sizes, type); }

}  // namespace fastgan
