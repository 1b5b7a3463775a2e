// fastgan::dropout_add_layer_norm and its backward for PyTorch, on the CPU; see fastgan/ops/layer_norm.py for
// the schemas in words.
#include <tuple>

#include "common/tensor.h"
#include "layer_norm/layer_norm.h"

namespace {

using fastgan::LayerNormArgs;
using fastgan::ScalarType;
using fastgan::sizes_of;
using fastgan::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::vector<int64_t> rows(const Tensor& x) {
  std::vector<int64_t> out = sizes_of(x);
  out.pop_back();
  return out;
}

// Arguments and the tensors that they point into.
struct Call {
  LayerNormArgs args{};
  Tensor like;
  std::vector<Tensor> kept;

  Call(const Tensor& x, const OptionalTensor& philox, double p, double eps) : like(x) {
    FASTGAN_CHECK(x.dim() >= 1, "input must have at least 1 dimension");
    args.dtype = fastgan::dtype_of(x);
    args.width = x.size(x.dim() - 1);
    args.rows = args.width ? x.numel() / args.width : 0;
    args.eps = eps;
    if (!philox.has_value()) return;
    fastgan::set_dropout(args, *philox, p);
    args.drops = true;
    FASTGAN_CHECK(x.numel() <= int64_t(1) << 34, "input must have at most 2^34 elements with dropout");
  }

  const void* same(const Tensor& tensor, const char* name) {
    FASTGAN_CHECK(
        tensor.scalar_type() == like.scalar_type() && sizes_of(tensor) == sizes_of(like) && tensor.is_cpu(),
        name, " must have input's shape, dtype and device");
    kept.push_back(torch::stable::contiguous(tensor));
    return kept.back().data_ptr();
  }

  const void* parameter(const Tensor& tensor, const char* name) {
    FASTGAN_CHECK(tensor.dim() == 1 && tensor.size(0) == args.width && tensor.is_cpu(), name, " must have ",
                  args.width, " elements, on input's device");
    ScalarType type = fastgan::accumulate_type(like.scalar_type());
    kept.push_back(
        torch::stable::contiguous(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type)));
    return kept.back().data_ptr();
  }

  double* statistics(const Tensor& tensor, const char* name) {
    FASTGAN_CHECK(
        tensor.numel() == args.rows && tensor.scalar_type() == ScalarType::Double && tensor.is_cpu(), name,
        " must be float64 with ", args.rows, " elements");
    kept.push_back(torch::stable::contiguous(tensor));
    return static_cast<double*>(kept.back().data_ptr());
  }

  // malloc's, like the activations around it: in the pool they drive out what is asked for once a step.
  Tensor output() const { return torch::stable::empty(sizes_of(like), like.scalar_type()); }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor input, Tensor residual, Tensor weight, Tensor bias,
                                                   OptionalTensor philox, double p, double eps) {
  Call call(input, philox, p, eps);
  LayerNormArgs& args = call.args;
  args.input = call.same(input, "input");
  args.residual = call.same(residual, "residual");
  args.weight = call.parameter(weight, "weight");
  args.bias = call.parameter(bias, "bias");
  Tensor output = call.output(), sum = call.output();
  Tensor mean = fastgan::empty(rows(input), ScalarType::Double, input);
  Tensor rstd = fastgan::empty(rows(input), ScalarType::Double, input);
  args.output = output.data_ptr();
  args.sum = sum.data_ptr();
  args.mean = static_cast<double*>(mean.data_ptr());
  args.rstd = static_cast<double*>(rstd.data_ptr());
  FASTGAN_CHECK(args.width > 0 || mean.numel() == 0, "input must have a last dimension that is not empty");
  FASTGAN_RUN(layer_norm_forward, args, input);
  return {output, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_output, OptionalTensor grad_sum, Tensor sum,
                                                    Tensor mean, Tensor rstd, Tensor weight,
                                                    OptionalTensor philox, double p, double eps,
                                                    bool parameters) {
  Call call(sum, philox, p, eps);
  LayerNormArgs& args = call.args;
  args.sum = const_cast<void*>(call.same(sum, "sum"));
  args.grad_output = call.same(grad_output, "grad_output");
  if (grad_sum.has_value()) args.grad_sum = call.same(*grad_sum, "grad_sum");
  args.mean = call.statistics(mean, "mean");
  args.rstd = call.statistics(rstd, "rstd");
  args.weight = call.parameter(weight, "weight");
  Tensor grad_residual = call.output();
  Tensor grad_input = args.drops ? call.output() : fastgan::empty({0}, sum.scalar_type(), sum);
  ScalarType type = fastgan::accumulate_type(sum.scalar_type());
  Tensor grad_weight = fastgan::empty({parameters ? args.width : 0}, type, sum);
  Tensor grad_bias = fastgan::empty({parameters ? args.width : 0}, type, sum);
  Tensor scratch =
      fastgan::empty({parameters ? fastgan::layer_norm_scratch(args) : 0}, ScalarType::Double, sum);
  args.grad_residual = grad_residual.data_ptr();
  args.grad_input = grad_input.data_ptr();
  if (parameters) {
    args.grad_weight = grad_weight.data_ptr();
    args.grad_bias = grad_bias.data_ptr();
    args.scratch = static_cast<double*>(scratch.data_ptr());
  }
  FASTGAN_RUN(layer_norm_backward, args, sum);
  return {grad_residual, grad_input, grad_weight, grad_bias};
}

}  // namespace

FASTGAN_LIBRARY_IMPL(m) {
  m.impl("dropout_add_layer_norm", TORCH_BOX(&forward));
  m.impl("dropout_add_layer_norm_backward", TORCH_BOX(&backward));
}
