// fastgan::dropout for PyTorch, on the CPU; see fastgan/ops/dropout.py for the schema in words.
#include "dropout/dropout.h"

#include "common/tensor.h"

namespace {

using fastgan::Tensor;

Tensor dropout(Tensor input, Tensor philox, double p) {
  fastgan::DropoutArgs args{};
  fastgan::set_dropout(args, philox, p);
  args.dtype = fastgan::dtype_of(input);
  Tensor from = torch::stable::contiguous(input);
  Tensor output = fastgan::empty(fastgan::sizes_of(input), input.scalar_type(), input);
  args.count = from.numel();
  args.input = from.data_ptr();
  args.output = output.data_ptr();
  FASTGAN_RUN(dropout_forward, args, input);
  return output;
}

}  // namespace

FASTGAN_LIBRARY_IMPL(m) { m.impl("dropout", TORCH_BOX(&dropout)); }
