// The element types of a contract struct, and the two 16-bit storage types with their exact conversions.
#pragma once
#include <cstdint>
#include <cstring>

namespace fastgan {

enum class Dtype : int32_t { float32, float64, bfloat16, float16 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// A float that CUDA's tensor cores multiply, in terms of 11 bits each (cuda_tensor_core.h).
struct tf32 {
  float value;
};

// What sums are kept in for each storage type.
template <class Storage>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class Storage>
using Accumulate = typename AccumulateOf<Storage>::type;

namespace {  // as in threads.h: no symbol is shared between instruction sets

// body(S{}) for the storage type of a dtype.
template <class Body>
inline void with_storage(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32:
      return body(float{});
    case Dtype::float64:
      return body(double{});
    case Dtype::bfloat16:
      return body(bfloat16{});
    case Dtype::float16:
      return body(float16{});
  }
}

}  // namespace

}  // namespace fastgan
