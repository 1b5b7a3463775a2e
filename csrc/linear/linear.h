// A linear layer on few rows, as generation has them, a row a sequence: the contract between fastgan::linear
// and the kernel.
//
//   output[r, n] = sum over k of input[r, k] * weight(n, k)  (+ bias[n])
//
// Valid: at most kLinearMostRows rows, other sizes any, zero included; input and output contiguous; one of
// the weight's dimensions contiguous. Error: that of chains of depth / lanes roundings, or depth / 8 where
// the weight is by depth: below that of one chain over depth. A row's result does not depend on the other
// rows.
#pragma once
#include <cstdint>

#include "common/capability.h"
#include "common/threads.h"
#include "common/types.h"

namespace fastgan {

constexpr int64_t kLinearMostRows = 32;  // MOST_ROWS in fastgan/ops/linear.py

struct LinearArgs {
  Dtype dtype;  // float32 or float64, of all
  int64_t rows, depth, outputs;
  bool by_outputs;        // the weight is (outputs, depth), as torch's Linear; else (depth, outputs)
  int64_t weight_stride;  // from a row of the weight to the next
  const void* input;      // (rows, depth)
  const void* weight;
  const void* bias;  // (outputs), or null
  void* output;      // (rows, outputs)
};

}  // namespace fastgan

FASTGAN_DECLARE_KERNEL(linear_forward, fastgan::LinearArgs)
