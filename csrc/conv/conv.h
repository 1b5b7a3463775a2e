// The contract of the fast convolution: no PyTorch in it.
#pragma once
#include "common/capability.h"
#include "common/types.h"

namespace fastgan {

struct ConvTensor {
  void* data;
  int64_t strides[4];  // in elements
};

// The three maps that belong to   y[n, k, i, j] = sum over c, r, s of x[n, c, stride i + r - pad, ...] w[k,
// c, r, s]:
//   conv_forward           y from x and w; `bias` (outputs) is added where it is not null
//   conv_input_gradient    x from y and w, the transpose of the above in x; `bias` (channels) is added
//   conv_weight_gradient   w from x and y
// x (batch, channels, height, width), y (batch, outputs, out_height, out_width) and w (outputs, channels,
// kernel, kernel) have any strides and one dtype, float32, bfloat16 or float16; bias is float32. Every size
// is positive, and out_height <= (height + 2 pad_height - kernel) / stride + 1, likewise the width. Kernel 4
// with stride 2, or kernel 3 with stride 1.
//
// The gradient of an activation needs no tensor of its own: with `mask`, the activation's results, of y's
// shape, strides and dtype, the last two read y times its derivative there, 1 or `mask_slope`.
//
// Called with workspace null, a kernel only says in *workspace_size how many bytes it needs, 64-byte aligned,
// for `threads` threads; more may come and will allocate. *nonfinite becomes 1 where something that was
// computed is infinite or NaN: the fast algorithm spreads those over a tile, so the caller then computes
// directly.
struct ConvArgs {
  Dtype dtype;
  int32_t kernel, stride;
  int64_t batch, channels, height, width, outputs, out_height, out_width, pad_height, pad_width;
  ConvTensor x, w, y;
  const float* bias;
  float slope =
      1;  // what is negative in the result is multiplied by it, after the bias; not in the weight gradient
  const void* mask;
  float mask_slope;
  void* workspace;
  int64_t* workspace_size;
  int32_t threads;
  int64_t second_cache;  // bytes that a core has of it, 0 if unknown; changes no bit of the results
  int32_t* nonfinite;
};

}  // namespace fastgan

FASTGAN_DECLARE_KERNEL(conv_forward, fastgan::ConvArgs)
FASTGAN_DECLARE_KERNEL(conv_input_gradient, fastgan::ConvArgs)
FASTGAN_DECLARE_KERNEL(conv_weight_gradient, fastgan::ConvArgs)

// The same three, multiplied directly, made for few channels; any kernel and stride with kernel >= stride.
FASTGAN_DECLARE_KERNEL(conv_direct_forward, fastgan::ConvArgs)
FASTGAN_DECLARE_KERNEL(conv_direct_input_gradient, fastgan::ConvArgs)
FASTGAN_DECLARE_KERNEL(conv_direct_weight_gradient, fastgan::ConvArgs)
