// fastgan::bias_gelu and its backward for PyTorch, on the CPU; see fastgan/ops/gelu.py for the schemas in
// words.
#include <tuple>

#include "common/tensor.h"
#include "gelu/gelu.h"

namespace {

using fastgan::GeluArgs;
using fastgan::ScalarType;
using fastgan::sizes_of;
using fastgan::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Arguments and the tensors that they point into.
struct Call {
  GeluArgs args{};
  Tensor input;
  OptionalTensor bias;

  Call(const Tensor& x, const OptionalTensor& b, bool by_tanh) : input(torch::stable::contiguous(x)) {
    args.dtype = fastgan::dtype_of(x);
    args.by_tanh = by_tanh;
    args.input = input.data_ptr();
    args.rows = 1;
    args.width = x.numel();
    if (!b.has_value()) return;
    FASTGAN_CHECK(x.dim() >= 1 && b->dim() == 1 && b->size(0) == x.size(x.dim() - 1) && b->is_cpu(),
                  "bias must have as many elements as input's last dimension, on its device");
    bias = fastgan::contiguous_as(*b, fastgan::accumulate_type(x.scalar_type()));
    args.bias = bias->data_ptr();
    args.width = bias->size(0);
    args.rows = args.width ? x.numel() / args.width : 0;
  }
};

// Results are malloc's, like the activations around them: in the pool they drive out what is asked for once a
// step.
Tensor forward(Tensor input, OptionalTensor bias, bool by_tanh) {
  Call call(input, bias, by_tanh);
  Tensor output = torch::stable::empty(sizes_of(input), input.scalar_type());
  call.args.output = output.data_ptr();
  FASTGAN_RUN(gelu_forward, call.args, input);
  return output;
}

std::tuple<Tensor, Tensor> backward(Tensor grad_output, Tensor input, OptionalTensor bias, bool by_tanh,
                                    bool wants_bias) {
  Call call(input, bias, by_tanh);
  FASTGAN_CHECK(grad_output.scalar_type() == input.scalar_type() &&
                    sizes_of(grad_output) == sizes_of(input) && grad_output.is_cpu(),
                "grad_output must have input's shape, dtype and device");
  FASTGAN_CHECK(!wants_bias || bias.has_value(), "wants_bias asks for an absent bias's gradient");
  Tensor grad = torch::stable::contiguous(grad_output);
  Tensor grad_input = torch::stable::empty(sizes_of(input), input.scalar_type());
  ScalarType type = fastgan::accumulate_type(input.scalar_type());
  Tensor grad_bias = fastgan::empty({wants_bias ? call.args.width : 0}, type, input);
  Tensor scratch =
      fastgan::empty({wants_bias ? fastgan::gelu_scratch(call.args) : 0}, ScalarType::Double, input);
  call.args.grad_output = grad.data_ptr();
  call.args.grad_input = grad_input.data_ptr();
  if (wants_bias) {
    call.args.grad_bias = grad_bias.data_ptr();
    call.args.scratch = static_cast<double*>(scratch.data_ptr());
  }
  FASTGAN_RUN(gelu_backward, call.args, input);
  return {grad_input, grad_bias};
}

}  // namespace

FASTGAN_LIBRARY_IMPL(m) {
  m.impl("bias_gelu", TORCH_BOX(&forward));
  m.impl("bias_gelu_backward", TORCH_BOX(&backward));
}
