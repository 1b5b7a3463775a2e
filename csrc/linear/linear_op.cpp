// fastgan::linear for PyTorch, on the CPU; see fastgan/ops/linear.py for the schema in words.
#include "linear/linear.h"

#include "common/tensor.h"

namespace {

using fastgan::ScalarType;
using fastgan::Tensor;

Tensor linear(Tensor input, Tensor weight, std::optional<Tensor> bias, bool by_depth) {
  FASTGAN_CHECK(input.dim() >= 1 && weight.dim() == 2, "input must have a dimension and weight two, got ",
                input.dim(), " and ", weight.dim());
  fastgan::LinearArgs args{};
  args.dtype = fastgan::dtype_of(input);
  args.depth = input.size(-1);
  args.outputs = weight.size(by_depth ? 1 : 0);
  FASTGAN_CHECK(weight.size(by_depth ? 0 : 1) == args.depth, "weight must fit input's last size ", args.depth,
                ", got ", weight.size(0), " x ", weight.size(1));
  std::vector<int64_t> sizes;
  args.rows = 1;
  for (int64_t d = 0; d + 1 < input.dim(); ++d) {
    sizes.push_back(input.size(d));
    args.rows *= input.size(d);
  }
  sizes.push_back(args.outputs);
  FASTGAN_CHECK(args.rows <= fastgan::kLinearMostRows, "input must have at most ", fastgan::kLinearMostRows,
                " rows, got ", args.rows);
  ScalarType type = input.scalar_type();
  FASTGAN_CHECK((type == ScalarType::Float || type == ScalarType::Double) && weight.scalar_type() == type,
                "input and weight must both be float32 or both float64");
  FASTGAN_CHECK(weight.is_cpu(), "weight must be on the CPU");
  Tensor rows = torch::stable::contiguous(input);
  Tensor of = weight.size(1) <= 1 || weight.stride(1) == 1 ? weight : torch::stable::contiguous(weight);
  std::optional<Tensor> added;
  if (bias.has_value()) {
    FASTGAN_CHECK(
        bias->dim() == 1 && bias->size(0) == args.outputs && bias->is_cpu() && bias->scalar_type() == type,
        "bias must have input's dtype and shape (", args.outputs, "), on the CPU");
    added = torch::stable::contiguous(*bias);
    args.bias = added->data_ptr();
  }
  Tensor output = fastgan::empty(sizes, type, input);
  args.by_outputs = !by_depth;
  args.weight_stride = of.stride(0);
  args.input = rows.data_ptr();
  args.weight = of.data_ptr();
  args.output = output.data_ptr();
  FASTGAN_RUN(linear_forward, args, input);
  return output;
}

}  // namespace

FASTGAN_LIBRARY_IMPL(m) { m.impl("linear", TORCH_BOX(&linear)); }
