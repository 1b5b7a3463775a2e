// fastgan::norm_act, norm_act_eval and their backwards for PyTorch, on the CPU and on CUDA; see
// fastgan/ops/norm_act.py for the schemas in words.
#include <string>
#include <tuple>

#include "common/tensor.h"
#include "norm_act/norm_act.h"

namespace {

using fastgan::Activation;
using fastgan::contiguous_as;
using fastgan::NormActArgs;
using fastgan::ScalarType;
using fastgan::sizes_of;
using fastgan::Tensor;
using torch::headeronly::MemoryFormat;
using OptionalTensor = std::optional<Tensor>;

Activation activation(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  FASTGAN_CHECK(name == "leaky_relu", "act must be 'none', 'relu' or 'leaky_relu', got '", name, "'");
  return Activation::leaky_relu;
}

bool is_channels_last(const Tensor& x) {
  int64_t expected = x.size(1);
  if (x.size(1) != 1 && x.stride(1) != 1) return false;
  for (int64_t d = x.dim() - 1; d >= 2; expected *= x.size(d--))
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
  return x.size(0) == 1 || x.stride(0) == expected;
}

// The layouts that are walked in place are torch's; everything else is made contiguous. As _memory_format in
// Python.
MemoryFormat memory_format(const Tensor& x) {
  if (x.is_contiguous() || x.dim() < 4 || x.dim() > 5 || !is_channels_last(x))
    return MemoryFormat::Contiguous;
  return x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

Tensor empty_like(const Tensor& x, MemoryFormat format) {
  return fastgan::empty(sizes_of(x), x.scalar_type(), x, format != MemoryFormat::Contiguous);
}

// Arguments and the tensors that they point into.
struct Call {
  fastgan::DeviceScope scope;
  NormActArgs args{};
  MemoryFormat format;
  Tensor input;
  Tensor mean, var;
  OptionalTensor weight, bias;
  Tensor scratch;

  Call(const Tensor& x, const OptionalTensor& w, const OptionalTensor& b, double eps, const std::string& act,
       double negative_slope, int64_t groups)
      : scope(x) {
    FASTGAN_CHECK(x.dim() >= 2, "input must have at least 2 dimensions, got ", x.dim());
    FASTGAN_CHECK(groups >= 1 && x.size(0) % groups == 0, "groups must divide the batch, got groups=", groups,
                  " and a batch of ", x.size(0));
    format = memory_format(x);
    input = torch::stable::contiguous(x, format);
    args.dtype = fastgan::dtype_of(x);
    args.act = activation(act);
    args.batch = x.size(0);
    args.channels = x.size(1);
    args.spatial = args.batch * args.channels == 0 ? 0 : x.numel() / (args.batch * args.channels);
    // Without spatial dimensions the two layouts are the same memory, and vectors go across channels.
    args.channels_last = format != MemoryFormat::Contiguous || args.spatial == 1;
    args.groups = groups;
    args.eps = eps;
    args.negative_slope = negative_slope;
    args.input = input.data_ptr();
    weight = parameter(w, "weight", &args.weight);
    bias = parameter(b, "bias", &args.bias);
  }

  OptionalTensor parameter(const OptionalTensor& tensor, const char* name, const void** pointer) {
    if (!tensor.has_value()) return std::nullopt;
    FASTGAN_CHECK(fastgan::is_here(*tensor, input), name, " must be on input's device");
    FASTGAN_CHECK(tensor->numel() == args.channels, name, " must have ", args.channels, " elements, got ",
                  tensor->numel());
    Tensor out = contiguous_as(*tensor, fastgan::accumulate_type(input.scalar_type()));
    *pointer = out.data_ptr();
    return out;
  }

  void statistics(const Tensor& m, const Tensor& v) {
    FASTGAN_CHECK(m.numel() == args.groups * args.channels && v.numel() == m.numel(),
                  "mean and var must have ", args.groups * args.channels, " elements, got ", m.numel(),
                  " and ", v.numel());
    FASTGAN_CHECK(fastgan::is_here(m, input) && fastgan::is_here(v, input),
                  "mean and var must be on input's device");
    mean = contiguous_as(m, ScalarType::Double);
    var = contiguous_as(v, ScalarType::Double);
    args.mean = static_cast<double*>(mean.data_ptr());
    args.var = static_cast<double*>(var.data_ptr());
  }

  bool is_empty() const { return input.numel() == 0; }

  void make_scratch() {
#if defined(FASTGAN_CUDA)
    int64_t size = fastgan_norm_act_scratch_cuda(args);
#else
    int64_t size = fastgan::norm_act_scratch(args);
#endif
    scratch = fastgan::empty({size}, ScalarType::Double, input);
    args.scratch = static_cast<double*>(scratch.data_ptr());
  }

  Tensor forward() {
    Tensor output = empty_like(input, format);
    if (is_empty()) return output;
    args.output = output.data_ptr();
    make_scratch();
    FASTGAN_RUN(norm_act_forward, args, input);
    return output;
  }

  std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const OptionalTensor& w,
                                              const OptionalTensor& b, const std::vector<bool>& needs) {
    FASTGAN_CHECK(needs.size() == 3, "needs must have 3 elements, got ", needs.size());
    FASTGAN_CHECK(
        grad_output.scalar_type() == input.scalar_type() && sizes_of(grad_output) == sizes_of(input),
        "grad_output must have input's shape and dtype");
    FASTGAN_CHECK(fastgan::is_here(grad_output, input), "grad_output must be on input's device");
    FASTGAN_CHECK((!needs[1] || w.has_value()) && (!needs[2] || b.has_value()),
                  "needs asks for an absent parameter's");
    ScalarType type = input.scalar_type(), sums = fastgan::accumulate_type(type);
    Tensor grad = torch::stable::contiguous(grad_output, format);
    Tensor grad_input = needs[0] ? empty_like(input, format) : fastgan::empty({0}, type, input);
    Tensor grad_weight = fastgan::empty({needs[1] ? args.channels : 0}, sums, input);
    Tensor grad_bias = fastgan::empty({needs[2] ? args.channels : 0}, sums, input);
    if (is_empty()) {
      torch::stable::zero_(grad_weight);
      torch::stable::zero_(grad_bias);
    } else {
      args.grad_output = grad.data_ptr();
      args.grad_input = needs[0] ? grad_input.data_ptr() : nullptr;
      args.grad_weight = needs[1] ? grad_weight.data_ptr() : nullptr;
      args.grad_bias = needs[2] ? grad_bias.data_ptr() : nullptr;
      make_scratch();
      FASTGAN_RUN(norm_act_backward, args, input);
    }
    ScalarType weight_type = needs[1] ? w->scalar_type() : type,
               bias_type = needs[2] ? b->scalar_type() : type;
    return {grad_input, contiguous_as(grad_weight, weight_type), contiguous_as(grad_bias, bias_type)};
  }
};

std::tuple<Tensor, Tensor, Tensor> norm_act(Tensor input, OptionalTensor weight, OptionalTensor bias,
                                            double eps, std::string act, double negative_slope,
                                            int64_t groups) {
  Call call(input, weight, bias, eps, act, negative_slope, groups);
  call.args.batch_statistics = true;
  Tensor mean = fastgan::empty({groups, call.args.channels}, ScalarType::Double, input);
  Tensor var = fastgan::empty({groups, call.args.channels}, ScalarType::Double, input);
  call.statistics(mean, var);
  if (call.is_empty()) {
    torch::stable::zero_(mean);
    torch::stable::zero_(var);
  }
  return {call.forward(), mean, var};
}

std::tuple<Tensor, Tensor, Tensor> norm_act_backward(Tensor grad_output, Tensor input, OptionalTensor weight,
                                                     OptionalTensor bias, Tensor mean, Tensor var, double eps,
                                                     std::string act, double negative_slope, int64_t groups,
                                                     std::vector<bool> needs) {
  Call call(input, weight, bias, eps, act, negative_slope, groups);
  call.args.batch_statistics = true;
  call.statistics(mean, var);
  return call.backward(grad_output, weight, bias, needs);
}

Tensor norm_act_eval(Tensor input, Tensor running_mean, Tensor running_var, OptionalTensor weight,
                     OptionalTensor bias, double eps, std::string act, double negative_slope) {
  Call call(input, weight, bias, eps, act, negative_slope, 1);
  call.statistics(running_mean, running_var);
  return call.forward();
}

std::tuple<Tensor, Tensor, Tensor> norm_act_eval_backward(Tensor grad_output, Tensor input,
                                                          Tensor running_mean, Tensor running_var,
                                                          OptionalTensor weight, OptionalTensor bias,
                                                          double eps, std::string act, double negative_slope,
                                                          std::vector<bool> needs) {
  Call call(input, weight, bias, eps, act, negative_slope, 1);
  call.statistics(running_mean, running_var);
  return call.backward(grad_output, weight, bias, needs);
}

#if !defined(FASTGAN_CUDA)
// running = (1 - momentum) * running + momentum * statistic for each group in turn, rounded once a group.
template <class S>
void move(const Tensor& running, const Tensor& statistic, double momentum, double factor) {
  S* to = static_cast<S*>(running.data_ptr());
  const double* from = static_cast<const double*>(statistic.data_ptr());
  int64_t stride = running.stride(0), channels = statistic.size(1);
  for (int64_t g = 0; g < statistic.size(0); ++g)
    for (int64_t c = 0; c < channels; ++c) {
      double now = double(to[c * stride]);
      to[c * stride] = S(now * (1 - momentum) + from[g * channels + c] * (factor * momentum));
    }
}
#endif

// The one operator that changes its arguments: for a small layer, PyTorch's four calls and their conversions
// take longer than the layer. factor turns the biased variance into the unbiased one.
void norm_act_move(Tensor running_mean, Tensor running_var, Tensor mean, Tensor var, double momentum,
                   double factor) {
  ScalarType type = running_mean.scalar_type();
  FASTGAN_CHECK(
      running_var.scalar_type() == type && (type == ScalarType::Float || type == ScalarType::Double),
      "running statistics must both be float32 or both float64");
  for (const Tensor* running : {&running_mean, &running_var}) {
    const Tensor& statistic = running == &running_mean ? mean : var;
    FASTGAN_CHECK(
        running->dim() == 1 && statistic.dim() == 2 && running->size(0) == statistic.size(1) &&
            running->size(0) == running_mean.size(0) && statistic.size(0) == mean.size(0) &&
            statistic.is_contiguous() && statistic.scalar_type() == ScalarType::Double &&
            fastgan::is_here(*running, running_mean) && fastgan::is_here(statistic, running_mean),
        "running statistics must be (C,), the batch's contiguous float64 (groups, C), on one device");
  }
#if defined(FASTGAN_CUDA)
  fastgan::DeviceScope scope(running_mean);
  fastgan::NormActMoveArgs args{};
  args.dtype = fastgan::dtype_of(running_mean);
  args.channels = mean.size(1), args.groups = mean.size(0);
  args.momentum = momentum, args.factor = factor;
  args.running[0] = running_mean.data_ptr(), args.running[1] = running_var.data_ptr();
  args.stride[0] = running_mean.stride(0), args.stride[1] = running_var.stride(0);
  args.statistic[0] = static_cast<const double*>(mean.data_ptr());
  args.statistic[1] = static_cast<const double*>(var.data_ptr());
  FASTGAN_RUN(norm_act_move, args, running_mean);
#else
  for (const Tensor* running : {&running_mean, &running_var}) {
    const Tensor& statistic = running == &running_mean ? mean : var;
    double scale = running == &running_mean ? 1.0 : factor;
    if (type == ScalarType::Float)
      move<float>(*running, statistic, momentum, scale);
    else
      move<double>(*running, statistic, momentum, scale);
  }
#endif
}

}  // namespace

FASTGAN_LIBRARY_IMPL(m) {
  m.impl("norm_act", TORCH_BOX(&norm_act));
  m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward));
  m.impl("norm_act_move", TORCH_BOX(&norm_act_move));
  m.impl("norm_act_eval", TORCH_BOX(&norm_act_eval));
  m.impl("norm_act_eval_backward", TORCH_BOX(&norm_act_eval_backward));
}
