// Dropout: the contract between fastgan::dropout and the kernel.
//
//   output[i] = input[i] * scale   where word i % 4 of Philox4x32-10(counter = (offset, 0, i / 4 >> 32,
//               i / 4), key = seed) is at least threshold, else 0
//
// Valid: any count; both contiguous. Error: one rounding.
#pragma once
#include <cstdint>

#include "common/capability.h"
#include "common/threads.h"
#include "common/types.h"

namespace fastgan {

struct DropoutArgs {
  Dtype dtype;
  int64_t count;
  uint64_t seed;
  uint32_t offset, threshold;
  double scale;
  const void* input;
  void* output;
};

}  // namespace fastgan

FASTGAN_DECLARE_KERNEL(dropout_forward, fastgan::DropoutArgs)
