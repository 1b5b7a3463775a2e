// fastgan::dropout for PyTorch, on the CPU; see fastgan/ops/dropout.py for the schema in words.
#include "dropout/dropout.h"

#include "common/tensor.h"

namespace {

using fastgan::ScalarType;
using fastgan::Tensor;

Tensor dropout(Tensor input, Tensor philox, double p) {
  FASTGAN_CHECK(
      philox.dim() == 1 && philox.size(0) == 2 && philox.scalar_type() == ScalarType::Long && philox.is_cpu(),
      "philox must be int64 of shape (2), on input's device");
  FASTGAN_CHECK(p >= 0.0 && p < 1.0, "p must be at least 0 and less than 1, got ", p);
  fastgan::DropoutArgs args{};
  args.dtype = fastgan::dtype_of(input);
  Tensor from = torch::stable::contiguous(input);
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < input.dim(); ++d) sizes.push_back(input.size(d));
  Tensor output = fastgan::empty(sizes, input.scalar_type(), input);
  const auto* words = static_cast<const int64_t*>(philox.data_ptr());
  args.count = from.numel();
  args.seed = uint64_t(words[0]);
  args.offset = uint32_t(uint64_t(words[philox.stride(0)]));
  double threshold = p * 4294967296.0;
  args.threshold = threshold >= 4294967295.0 ? 0xffffffffu : uint32_t(threshold);
  args.scale = 1.0 / (1.0 - p);
  args.input = from.data_ptr();
  args.output = output.data_ptr();
  FASTGAN_RUN(dropout_forward, args, input);
  return output;
}

}  // namespace

FASTGAN_LIBRARY_IMPL(m) { m.impl("dropout", TORCH_BOX(&dropout)); }
