// Bias and GELU: the contract between fastgan::bias_gelu and the kernel.
//
//   x = input[r, i] (+ bias[i])
//   output[r, i]     = x * Phi(x)          Phi: the normal distribution's; or, by tanh,
//                      x / (1 + exp(-2 u))  u = sqrt(2 / pi) * (x + 0.044715 x^3)
//   grad_input[r, i] = grad_output[r, i] * the derivative at x
//   grad_bias[i]     = sum over r of grad_input[r, i]
//
// Valid: any rows and width, one row where there is no bias; everything contiguous. Error against float64,
// float32 on [-10, 10]: 5e-7 of |output| above -2, below it, where the output goes to 0, 1e-6 + x^2 2e-7 of
// it (Phi there has no 1 - 1); the derivative 5e-7 absolute.
#pragma once
#include <cstdint>

#include "common/capability.h"
#include "common/columns.h"
#include "common/threads.h"
#include "common/types.h"

namespace fastgan {

struct GeluArgs {
  Dtype dtype;  // of all tensors but bias and its gradient
  int64_t rows, width;
  bool by_tanh;
  const void* input;        // (rows, width)
  const void* bias;         // (width), float32 beside half precision, else of the dtype; or null
  void* output;             // (rows, width)
  const void* grad_output;  // (rows, width)
  void* grad_input;         // (rows, width)
  void* grad_bias;          // as bias, or null
  double* scratch;          // gelu_scratch(args) doubles, where there is grad_bias
};

static inline int64_t gelu_scratch(const GeluArgs& args) { return row_blocks(args.rows) * args.width; }

}  // namespace fastgan

FASTGAN_DECLARE_KERNEL(gelu_forward, fastgan::GeluArgs)
FASTGAN_DECLARE_KERNEL(gelu_backward, fastgan::GeluArgs)
