// Dropout, residual and layer norm in one pass: the contract between fastgan::dropout_add_layer_norm and the
// kernel.
//
//   sum[r, i]    = residual[r, i] + (kept ? input[r, i] * scale : 0)      kept as in dropout/dropout.h, of
//                  element r * width + i of the whole; without dropout all are
//   output[r, i] = (sum[r, i] - mean[r]) * rstd[r] * weight[i] + bias[i]
//   mean, rstd   = of the row's sums as they are stored; rstd = 1 / sqrt(biased variance + eps)
//
// and the gradients of output (grad_output) and of sum (grad_sum) carried back:
//
//   grad_residual = grad_sum + rstd * (g - average(g) - x * average(g * x))   g = grad_output * weight,
//   grad_input    = kept ? grad_residual * scale : 0                          x = (sum - mean) * rstd
//   grad_weight   = sum over r of grad_output * x,   grad_bias = sum over r of grad_output
//
// Valid: any rows and width; everything contiguous; rows * width up to 2^34 with dropout. The same bits for
// every number of threads. A row's statistics are taken in two passes and mended for what the mean was
// rounded by, so that a mean of 1e4 beside a deviation of 1 costs nothing.
#pragma once
#include <cstdint>

#include "common/capability.h"
#include "common/columns.h"
#include "common/threads.h"
#include "common/types.h"

namespace fastgan {

struct LayerNormArgs {
  Dtype dtype;  // of all tensors but the statistics, weight, bias and their gradients
  int64_t rows, width;
  double eps;
  bool drops;
  uint64_t seed;
  uint32_t offset, threshold;
  double scale;
  const void* input;  // (rows, width), as the next two
  const void* residual;
  void* sum;
  const void *weight, *bias;  // (width), float32 beside half precision, else of the dtype
  void* output;               // (rows, width)
  double *mean, *rstd;        // (rows)
  // backward
  const void *grad_output, *grad_sum;  // (rows, width); grad_sum may be null
  void* grad_residual;                 // (rows, width)
  void* grad_input;                    // the same, where drops
  void *grad_weight, *grad_bias;       // as weight, or both null
  double* scratch;                     // layer_norm_scratch(args) doubles
};

// Of doubles, for gradients of weight and bias.
static inline int64_t layer_norm_scratch(const LayerNormArgs& args) {
  return row_blocks(args.rows) * 2 * args.width;
}

}  // namespace fastgan

FASTGAN_DECLARE_KERNEL(layer_norm_forward, fastgan::LayerNormArgs)
FASTGAN_DECLARE_KERNEL(layer_norm_backward, fastgan::LayerNormArgs)
