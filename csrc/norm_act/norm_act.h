// Batch norm and activation: the contract between fastgan::norm_act* and the kernels.
//
//   z = (x - mean) * weight / sqrt(var + eps) + bias      per channel
//   y = z, max(z, 0), or z > 0 ? z : negative_slope * z
//
// Valid: any sizes with at least one element; batch divisible by groups. Memory is (batch, channels,
// spatial), or (batch, spatial, channels) if channels_last. weight and bias are in the accumulate type
// (double for float64, else float). Statistics are float64 (groups, channels), biased variance. Error:
// statistics are within a few float ulp of exact for any mean (sums are taken about a running mean); the
// output is within 2 ulp of z plus the rounding of the coefficients.
#pragma once
#include <cstdint>

#include "common/capability.h"
#include "common/threads.h"
#include "common/types.h"

namespace fastgan {

enum class Activation : int32_t { none, relu, leaky_relu };

struct NormActArgs {
  Dtype dtype;
  Activation act;
  bool channels_last;
  bool batch_statistics;  // forward: compute mean and var; backward: they depend on the input
  int64_t batch, channels, spatial, groups;
  double eps, negative_slope;
  const void* input;
  const void* weight;  // null: ones
  const void* bias;    // null: zeros
  double* mean;        // written by a forward with batch_statistics, read otherwise
  double* var;
  void* output;             // forward
  const void* grad_output;  // backward, as are the following; laid out as the input is
  void* grad_input;         // null: not wanted
  void* grad_weight;        // (channels), in the accumulate type; null: not wanted
  void* grad_bias;
  double* scratch;  // norm_act_scratch(args) of them; on CUDA fastgan_norm_act_scratch_cuda(args)
};

// channels_last: rows are cut into blocks of 64 KB or more that never cross a group; this many rows each.
static inline int64_t norm_act_block_rows(const NormActArgs& args) {
  int64_t rows = 16384 / args.channels;
  return rows < 128 ? 128 : rows;
}

static inline int64_t norm_act_blocks(const NormActArgs& args) {
  int64_t rows = args.batch / args.groups * args.spatial, block = norm_act_block_rows(args);
  return (rows + block - 1) / block;
}

// Five coefficients and two sums for each channel of each group, and for channels_last two sums of each
// block.
static inline int64_t norm_act_scratch(const NormActArgs& args) {
  int64_t padded = args.channels + 16;
  return args.groups * padded * (7 + (args.channels_last ? 2 * norm_act_blocks(args) : 0));
}

// running = (1 - momentum) * running + momentum * statistic for each group in turn, rounded once a group;
// mean and var are 0 and 1. On CUDA; the CPU does it in norm_act_op.cpp.
struct NormActMoveArgs {
  Dtype dtype;  // of the running statistics: float32 or float64
  int64_t channels, groups;
  void* running[2];
  int64_t stride[2];           // of running, in elements
  const double* statistic[2];  // (groups, channels)
  double momentum, factor;     // factor: for the variance
};

}  // namespace fastgan

FASTGAN_DECLARE_KERNEL(norm_act_forward, fastgan::NormActArgs)
FASTGAN_DECLARE_KERNEL(norm_act_backward, fastgan::NormActArgs)
FASTGAN_DECLARE_CUDA_KERNEL(norm_act_forward, fastgan::NormActArgs)
FASTGAN_DECLARE_CUDA_KERNEL(norm_act_backward, fastgan::NormActArgs)
FASTGAN_DECLARE_CUDA_KERNEL(norm_act_move, fastgan::NormActMoveArgs)
extern "C" int64_t fastgan_norm_act_scratch_cuda(const fastgan::NormActArgs&);
