// The contract of the row kernel of linear_cross_entropy: no PyTorch in it.
#pragma once
#include "common/capability.h"
#include "common/types.h"

namespace fastgan {

// Logits (rows, classes) of type float32 or float64, rows `stride` elements apart. With x a row of them plus
// `bias`, its target's entry lowered by `margin`, and lse = log sum exp x:
//   loss = (1 - smoothing) (lse - x[target]) + smoothing (lse - mean x) + z lse²
// Where `gradient` is given, one number a row, the logits become gradient times the loss's derivative with
// respect to them; else they are left undefined. Pointers that are null are not there; every target is in [0,
// classes) (on CUDA another one makes its row NaN).
struct LinearCrossEntropyRows {
  Dtype dtype;
  void* logits;
  int64_t rows, classes, stride;
  const int64_t* target;
  const void* bias;
  const void* margin;
  const void* gradient;
  void* loss;
  double smoothing, z;
};

}  // namespace fastgan

FASTGAN_DECLARE_KERNEL(linear_cross_entropy_rows, fastgan::LinearCrossEntropyRows)
FASTGAN_DECLARE_CUDA_KERNEL(linear_cross_entropy_rows, fastgan::LinearCrossEntropyRows)
