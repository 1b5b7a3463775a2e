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

// doubles of a row in `state`
constexpr int kLinearCrossEntropyState = 4;

// The same for float32 logits (rows, columns) of the classes [begin, begin + columns) of `classes`, on CUDA,
// where a 16-bit vocabulary goes through in blocks. First the statistics of every block, in order from 0:
// they are kept in `state` (rows, kLinearCrossEntropyState), and the last block leaves the losses and there
// what the gradients need. Then, in any order, a block's gradient from its logits made anew: to `out`, rows
// `out_stride` elements apart, which may be the logits themselves or, of 16 bits, the front half of each of
// their rows; the target's entry of it goes to a row's last number in `state` as well. `bias` is of all
// classes.
struct LinearCrossEntropyBlock {
  void* logits;
  int64_t rows, columns, stride, begin, classes;
  const int64_t* target;
  const void* bias;
  const void* margin;
  double* state;
  void* loss;  // for the statistics, may be null
  const void* gradient;
  Dtype out_dtype;
  void* out;
  int64_t out_stride;
  double smoothing, z;
};

}  // namespace fastgan

FASTGAN_DECLARE_KERNEL(linear_cross_entropy_rows, fastgan::LinearCrossEntropyRows)
FASTGAN_DECLARE_CUDA_KERNEL(linear_cross_entropy_rows, fastgan::LinearCrossEntropyRows)
FASTGAN_DECLARE_CUDA_KERNEL(linear_cross_entropy_statistics, fastgan::LinearCrossEntropyBlock)
FASTGAN_DECLARE_CUDA_KERNEL(linear_cross_entropy_gradient, fastgan::LinearCrossEntropyBlock)
