// A matrix product of bfloat16 with sums in float32: the contract between fastgan::product_into and the
// kernel, which is AMX's alone.
//
//   c[i, j] = sum over k of a[i, k] b[k, j] (+ c[i, j], if add)
//
// Valid: any sizes, zero included, and any strides of a and b; fast where one of each one's is 1. Error: that
// of sums in float32, in an order of the sizes alone, rounded once to c's type. Denormal numbers count as 0.
#pragma once
#include <cstdint>

#include "common/capability.h"
#include "common/threads.h"
#include "common/types.h"

namespace fastgan {

struct ProductArgs {
  int64_t rows, columns, depth;
  const bfloat16* a;
  int64_t a_stride[2];
  const bfloat16* b;
  int64_t b_stride[2];
  void* c;  // float32, or bfloat16 if c_is_bfloat16; numbers of a row side by side
  int64_t c_stride;
  bool c_is_bfloat16, add;
  bool* out_of_memory;
};

}  // namespace fastgan

#if defined(__x86_64__)
extern "C" void fastgan_product_amx(const fastgan::ProductArgs&, const fastgan::Threads&);
#endif
