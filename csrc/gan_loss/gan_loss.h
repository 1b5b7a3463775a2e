// The contract of the gan_loss kernels: a convolution with few output channels whose logits go into a GAN
// loss.
//
//   logits[n, k, oh, ow] = bias[k] + sum over c, i, j of input[n, c, oh*sh + i - ph, ow*sw + j - pw] *
//   weight[k, c, i, j] loss = reduction over all logits x of sample_weight * each(x, target), see
//   fastgan/ops/gan_loss.py for `each`
//
// Every tensor comes as a pointer with strides in elements. input, weight, bias, logits, grad_logits and the
// gradients have the storage type `dtype`; target, sample_weight, pos_weight and grad_loss its accumulate
// type (double for float64, float otherwise), stride 0 where they are broadcast. Null: absent.
#pragma once
#include "common/capability.h"
#include "common/types.h"

namespace fastgan {

enum class GanLoss : int32_t { bce, hinge, lsgan, wasserstein };
enum class Reduction : int32_t { none, mean, sum };

struct Strided {
  const void* data;
  int64_t stride[4];
};

struct GanLossArgs {
  Dtype dtype;
  GanLoss loss;
  Reduction reduction;
  double label_smoothing, target_value;
  int64_t batch, channels, height, width;        // input
  int64_t outputs, kernel_height, kernel_width;  // weight; outputs is K
  int64_t out_height, out_width;                 // logits
  int64_t stride[2], padding[2];
  Strided input, weight;
  const void* bias;
  int64_t bias_stride;
  Strided target, sample_weight, pos_weight;
  void* logits;  // (N, K, out_height, out_width), contiguous: written by forward, read by backward
  // gan_loss_workspace() elements of the accumulate type; on CUDA fastgan_gan_loss_workspace_cuda()
  void* workspace;
  bool* out_of_memory;  // set if a thread found none for its scratch: the results are then worth nothing

  // forward
  void* loss_value;       // a scalar, or of the logits' shape for Reduction::none, contiguous
  bool loss_accumulates;  // loss_value has the accumulate type, not the storage type
  double* partial_sums;   // one for each image and output row
  int32_t* bad_target;    // set to 1 if a target outside [0, 1] is met where the loss wants it inside (CPU)

  // backward; a null gradient is not wanted
  Strided grad_loss;  // stride 0 for a scalar
  Strided grad_logits;
  void *grad_input, *grad_weight, *grad_bias;
  int64_t grad_input_stride[4], grad_weight_stride[4];
};

// Elements of the accumulate type for packed weights and the gradients of the logits, for every instruction
// set.
inline int64_t gan_loss_workspace(const GanLossArgs& a) {
  int64_t padded = (a.channels + 31) / 32 * 32;
  return a.outputs * a.kernel_height * a.kernel_width * padded +
         a.batch * a.outputs * a.out_height * a.out_width + 16;
}

}  // namespace fastgan

FASTGAN_DECLARE_KERNEL(gan_loss_forward, fastgan::GanLossArgs)
FASTGAN_DECLARE_KERNEL(gan_loss_backward, fastgan::GanLossArgs)
FASTGAN_DECLARE_CUDA_KERNEL(gan_loss_forward, fastgan::GanLossArgs)
FASTGAN_DECLARE_CUDA_KERNEL(gan_loss_backward, fastgan::GanLossArgs)
extern "C" int64_t fastgan_gan_loss_workspace_cuda(const fastgan::GanLossArgs&, bool is_backward);
