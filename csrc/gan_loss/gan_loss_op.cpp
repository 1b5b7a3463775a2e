// conv_gan_loss and its backward, on the CPU and on CUDA: memory-guarding checks, outputs, and the contract
// filled in.
#include "common/tensor.h"
#include "gan_loss/gan_loss.h"

namespace {

using fastgan::GanLossArgs;
using fastgan::ScalarType;
using fastgan::Strided;
using fastgan::Tensor;

Strided strided(const Tensor& tensor) {
  Strided out{tensor.data_ptr(), {}};
  for (int i = 0; i < 4; ++i) out.stride[i] = tensor.stride(i);
  return out;
}

// A tensor of the accumulate type, broadcast to the logits (N, K, H', W').
Strided broadcast(const char* name, const std::optional<Tensor>& tensor, const GanLossArgs& a,
                  ScalarType type, const Tensor& input) {
  if (!tensor) return {nullptr, {}};
  const int64_t shape[4] = {a.batch, a.outputs, a.out_height, a.out_width};
  FASTGAN_CHECK(fastgan::is_here(*tensor, input) && tensor->scalar_type() == type && tensor->dim() <= 4, name,
                " must be on input's device, of the accumulate type and at most four-dimensional");
  Strided out{tensor->data_ptr(), {}};
  int missing = 4 - int(tensor->dim());
  for (int i = missing; i < 4; ++i) {
    int64_t size = tensor->size(i - missing);
    FASTGAN_CHECK(size == 1 || size == shape[i], name, " must be broadcastable to the logits: dimension ",
                  i - missing, " has ", size, ", the logits have ", shape[i]);
    out.stride[i] = size == 1 ? 0 : tensor->stride(i - missing);
  }
  return out;
}

GanLossArgs arguments(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& target, double target_value,
                      const std::optional<Tensor>& sample_weight, const std::optional<Tensor>& pos_weight,
                      int64_t loss, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                      double label_smoothing, int64_t reduction) {
  FASTGAN_CHECK(input.dim() == 4 && weight.dim() == 4, "input and weight must have four dimensions, got ",
                input.dim(), " and ", weight.dim());
  FASTGAN_CHECK(fastgan::is_here(input, input) && fastgan::is_here(weight, input) &&
                    (!bias || fastgan::is_here(*bias, input)),
                "tensors must be on one device");
  FASTGAN_CHECK(
      input.scalar_type() == weight.scalar_type() && (!bias || bias->scalar_type() == input.scalar_type()),
      "input, weight and bias must have one dtype");
  FASTGAN_CHECK(input.size(1) == weight.size(1), "input has ", input.size(1), " channels, weight ",
                weight.size(1));
  FASTGAN_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), "bias must have shape (",
                weight.size(0), ",)");
  FASTGAN_CHECK(stride.size() == 2 && padding.size() == 2 && stride[0] > 0 && stride[1] > 0 &&
                    padding[0] >= 0 && padding[1] >= 0,
                "stride must be two positive and padding two non-negative integers");
  FASTGAN_CHECK(loss >= 0 && loss < 4, "loss must be 0 to 3, got ", loss);
  FASTGAN_CHECK(reduction >= 0 && reduction < 3, "reduction must be 0 to 2, got ", reduction);
  GanLossArgs a{};
  a.dtype = fastgan::dtype_of(input);
  a.loss = fastgan::GanLoss(loss);
  a.reduction = fastgan::Reduction(reduction);
  a.label_smoothing = label_smoothing;
  a.target_value = target_value;
  a.batch = input.size(0), a.channels = input.size(1), a.height = input.size(2), a.width = input.size(3);
  a.outputs = weight.size(0), a.kernel_height = weight.size(2), a.kernel_width = weight.size(3);
  for (int i = 0; i < 2; ++i) a.stride[i] = stride[i], a.padding[i] = padding[i];
  int64_t above = a.height + 2 * padding[0] - a.kernel_height,
          beside = a.width + 2 * padding[1] - a.kernel_width;
  FASTGAN_CHECK(a.kernel_height > 0 && a.kernel_width > 0 && above >= 0 && beside >= 0,
                "the kernel must not be larger than the padded input");
  a.out_height = above / stride[0] + 1, a.out_width = beside / stride[1] + 1;
  a.input = strided(input), a.weight = strided(weight);
  if (bias) a.bias = bias->data_ptr(), a.bias_stride = bias->stride(0);
  ScalarType type = fastgan::accumulate_type(input.scalar_type());
  a.target = broadcast("target", target, a, type, input);
  a.sample_weight = broadcast("sample_weight", sample_weight, a, type, input);
  a.pos_weight = broadcast("pos_weight", pos_weight, a, type, input);
  return a;
}

Tensor workspace_of(const GanLossArgs& a, bool is_backward, ScalarType accumulate, const Tensor& input) {
#if defined(FASTGAN_CUDA)
  int64_t size = fastgan_gan_loss_workspace_cuda(a, is_backward);
#else
  int64_t size = fastgan::gan_loss_workspace(a);
  static_cast<void>(is_backward);
#endif
  return fastgan::empty({size}, accumulate, input);
}

std::tuple<Tensor, Tensor> conv_gan_loss(Tensor input, Tensor weight, std::optional<Tensor> bias,
                                         std::optional<Tensor> target, double target_value,
                                         std::optional<Tensor> sample_weight,
                                         std::optional<Tensor> pos_weight, int64_t loss,
                                         std::vector<int64_t> stride, std::vector<int64_t> padding,
                                         double label_smoothing, int64_t reduction, bool float32_loss) {
  GanLossArgs a = arguments(input, weight, bias, target, target_value, sample_weight, pos_weight, loss,
                            stride, padding, label_smoothing, reduction);
  fastgan::DeviceScope scope(input);
  ScalarType type = input.scalar_type(), accumulate = fastgan::accumulate_type(type);
  std::vector<int64_t> shape{a.batch, a.outputs, a.out_height, a.out_width};
  Tensor logits = fastgan::empty(shape, type, input);
  Tensor value = fastgan::empty(a.reduction == fastgan::Reduction::none ? shape : std::vector<int64_t>{},
                                float32_loss ? accumulate : type, input);
  Tensor workspace = workspace_of(a, false, accumulate, input);
  Tensor partial = fastgan::empty({a.batch * a.out_height}, ScalarType::Double, input);
  int32_t bad_target = 0;
  a.logits = logits.data_ptr(), a.loss_value = value.data_ptr(), a.loss_accumulates = float32_loss;
  a.workspace = workspace.data_ptr(), a.partial_sums = static_cast<double*>(partial.data_ptr());
  bool out_of_memory = false;
  a.bad_target = &bad_target, a.out_of_memory = &out_of_memory;
  FASTGAN_RUN(gan_loss_forward, a, input);
  FASTGAN_CHECK(!out_of_memory, "conv_gan_loss: no memory left for scratch");
  FASTGAN_CHECK(!bad_target, "target must be in [0, 1] for this loss, got values outside");
  return {value, logits};
}

bool is_dense(const Tensor& tensor, bool channels_last) {
  int64_t expected = 1;
  const int order[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
  for (int dimension : order[channels_last]) {
    if (tensor.size(dimension) != 1 && tensor.stride(dimension) != expected) return false;
    expected *= tensor.size(dimension);
  }
  return true;
}

std::tuple<Tensor, Tensor, Tensor> conv_gan_loss_backward(
    std::optional<Tensor> grad_loss, std::optional<Tensor> grad_logits, Tensor input, Tensor weight,
    std::optional<Tensor> bias, Tensor logits, std::optional<Tensor> target, double target_value,
    std::optional<Tensor> sample_weight, std::optional<Tensor> pos_weight, int64_t loss,
    std::vector<int64_t> stride, std::vector<int64_t> padding, double label_smoothing, int64_t reduction,
    std::vector<bool> needs) {
  GanLossArgs a = arguments(input, weight, bias, target, target_value, sample_weight, pos_weight, loss,
                            stride, padding, label_smoothing, reduction);
  fastgan::DeviceScope scope(input);
  ScalarType type = input.scalar_type(), accumulate = fastgan::accumulate_type(type);
  FASTGAN_CHECK(needs.size() == 3, "needs must have three entries");
  const int64_t shape[4] = {a.batch, a.outputs, a.out_height, a.out_width};
  for (const Tensor* each : {&logits, grad_logits ? &*grad_logits : nullptr}) {
    if (!each) continue;
    FASTGAN_CHECK(fastgan::is_here(*each, input) && each->dim() == 4 && each->scalar_type() == type,
                  "logits and grad_logits must be four-dimensional and of input's dtype");
    for (int i = 0; i < 4; ++i)
      FASTGAN_CHECK(each->size(i) == shape[i], "logits or grad_logits of another shape");
  }
  Tensor dense_logits = logits.is_contiguous() ? logits : torch::stable::contiguous(logits);
  if (grad_loss) {
    a.grad_loss = broadcast("grad_loss", grad_loss, a, accumulate, input);
    FASTGAN_CHECK(grad_loss->dim() == (a.reduction == fastgan::Reduction::none ? 4 : 0),
                  "grad_loss of another shape");
  }
  if (grad_logits) a.grad_logits = strided(*grad_logits);
  Tensor grad_input = fastgan::empty({0}, type, input), grad_weight = fastgan::empty({0}, type, input),
         grad_bias = fastgan::empty({0}, type, input);
  if (needs[0]) {
    // In the input's own layout, so that what comes before reads it as it wrote.
    if (input.numel() > 0 && !is_dense(input, false) && is_dense(input, true)) {
      Tensor last = fastgan::empty({a.batch, a.height, a.width, a.channels}, type, input);
      grad_input = torch::stable::transpose(torch::stable::transpose(last, 1, 3), 2, 3);
    } else {
      grad_input = fastgan::empty({a.batch, a.channels, a.height, a.width}, type, input);
    }
    a.grad_input = grad_input.data_ptr();
    for (int i = 0; i < 4; ++i) a.grad_input_stride[i] = grad_input.stride(i);
  }
  if (needs[1]) {
    grad_weight = fastgan::empty({a.outputs, a.channels, a.kernel_height, a.kernel_width}, type, input);
    a.grad_weight = grad_weight.data_ptr();
    for (int i = 0; i < 4; ++i) a.grad_weight_stride[i] = grad_weight.stride(i);
  }
  if (needs[2]) {
    grad_bias = fastgan::empty({a.outputs}, type, input);
    a.grad_bias = grad_bias.data_ptr();
  }
  Tensor workspace = workspace_of(a, true, accumulate, input);
  a.logits = dense_logits.data_ptr(), a.workspace = workspace.data_ptr();
  bool out_of_memory = false;
  a.out_of_memory = &out_of_memory;
  FASTGAN_RUN(gan_loss_backward, a, input);
  FASTGAN_CHECK(!out_of_memory, "conv_gan_loss_backward: no memory left for scratch");
  return {grad_input, grad_weight, grad_bias};
}

FASTGAN_LIBRARY_IMPL(m) {
  m.impl("conv_gan_loss", TORCH_BOX(&conv_gan_loss));
  m.impl("conv_gan_loss_backward", TORCH_BOX(&conv_gan_loss_backward));
}

}  // namespace
