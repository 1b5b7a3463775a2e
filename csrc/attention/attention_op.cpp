// torch.ops.fastgan.attention, attention_backward, attention_weights, attention_jvp and
// attention_double_backward: tensors to the contract of attention.h and back.
#include <atomic>

#include "attention/attention_op.h"

namespace fastgan {
namespace {

// (batch, heads, rows, width), in memory (batch, rows, heads, width) if `like` is: ops/attention.py's
// _empty_like.
Tensor empty_in_layout_of(const Tensor& like, int64_t width) {
  int64_t batch = like.size(0), heads = like.size(1), rows = like.size(2);
  if (0 < like.stride(1) && like.stride(1) < like.stride(2))
    return torch::stable::transpose(empty({batch, rows, heads, width}, like.scalar_type(), like), 1, 2);
  return empty({batch, heads, rows, width}, like.scalar_type(), like);
}

AttentionArgs arguments(const Tensor& query, const Tensor& key, const Tensor& value,
                        const std::optional<Tensor>& mask, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& philox, double dropout_p, bool is_causal, double scale) {
  FASTGAN_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                "attention: query, key and value must have four dimensions, got ", query.dim(), ", ",
                key.dim(), ", ", value.dim());
  AttentionArgs args;
  args.dtype = args.bias_dtype = dtype_of(query);
  args.batch = query.size(0), args.heads = query.size(1), args.rows = query.size(2),
  args.width = query.size(3);
  args.kv_heads = key.size(1), args.columns = key.size(2), args.value_width = value.size(3);
  FASTGAN_CHECK(args.kv_heads == 0 ? args.heads == 0 : args.heads % args.kv_heads == 0,
                "attention: ", args.heads, " query heads cannot be shared among ", args.kv_heads,
                " key heads");
  check_sizes("query", query, query, {args.batch, args.heads, args.rows, args.width});
  check_sizes("key", key, query, {args.batch, args.kv_heads, args.columns, args.width});
  check_sizes("value", value, query, {args.batch, args.kv_heads, args.columns, args.value_width});
  FASTGAN_CHECK(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(),
                "attention: query, key and value must have one dtype");
  args.query = input(query), args.key = input(key), args.value = input(value);
  if (mask) {
    check_sizes("mask", *mask, query, {args.batch, args.heads, args.rows, args.columns}, true);
    FASTGAN_CHECK(mask->scalar_type() == ScalarType::Bool, "attention: mask must be boolean");
    args.mask = input(*mask);
  }
  if (bias) {
    check_sizes("bias", *bias, query, {args.batch, args.heads, args.rows, args.columns}, true);
    bool half = query.scalar_type() == ScalarType::BFloat16 || query.scalar_type() == ScalarType::Half;
    FASTGAN_CHECK(
        bias->scalar_type() == query.scalar_type() || (half && bias->scalar_type() == ScalarType::Float),
        "attention: bias must be of query's dtype, or float32 beside half precision");
    args.bias = input(*bias);
    args.bias_dtype = dtype_of(*bias);
    for (int i = 0; i < 4; ++i) args.bias_size[i] = bias->size(i);
  }
  args.scale = scale;
  args.is_causal = is_causal;
  add_dropout(args, query, philox, dropout_p);
  add_products(args);
  return args;
}

Tensor empty_bias_gradient(const Tensor& query, const std::optional<Tensor>& bias, bool wanted) {
  if (!wanted) return empty({0}, query.scalar_type(), query);
  return empty({bias->size(0), bias->size(1), bias->size(2), bias->size(3)}, bias->scalar_type(), query);
}

std::tuple<Tensor, Tensor> attention(Tensor query, Tensor key, Tensor value, std::optional<Tensor> mask,
                                     std::optional<Tensor> bias, std::optional<Tensor> philox,
                                     double dropout_p, bool is_causal, double scale) {
  DeviceScope scope(query);
  AttentionArgs args = arguments(query, key, value, mask, bias, philox, dropout_p, is_causal, scale);
  Tensor output = empty_in_layout_of(query, args.value_width);
  Tensor logsumexp = empty({args.batch, args.heads, args.rows}, ScalarType::Double, query);
  args.output = result(output);
  args.logsumexp = static_cast<double*>(logsumexp.data_ptr());
#if defined(FASTGAN_CUDA)
  Tensor workspace = workspace_of(args, query, false);
  args.workspace = workspace.data_ptr();
#endif
  bool out_of_memory = false;
  args.out_of_memory = &out_of_memory;
  FASTGAN_RUN(attention_forward, args, query);
  FASTGAN_CHECK(!out_of_memory, "attention: no memory left for scratch");
  return {output, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, std::optional<Tensor> mask,
    std::optional<Tensor> bias, std::optional<Tensor> philox, Tensor output, Tensor logsumexp,
    double dropout_p, bool is_causal, double scale, bool bias_gradient) {
  DeviceScope scope(query);
  AttentionArgs args = arguments(query, key, value, mask, bias, philox, dropout_p, is_causal, scale);
  std::vector<int64_t> sizes{args.batch, args.heads, args.rows, args.value_width};
  check_sizes("grad_output", grad_output, query, sizes);
  check_sizes("output", output, query, sizes);
  check_sizes("logsumexp", logsumexp, query, {args.batch, args.heads, args.rows});
  FASTGAN_CHECK(grad_output.scalar_type() == query.scalar_type() &&
                    output.scalar_type() == query.scalar_type() &&
                    logsumexp.scalar_type() == ScalarType::Double,
                "attention_backward: grad_output and output must be of query's dtype, logsumexp of float64");
  if (!logsumexp.is_contiguous()) logsumexp = torch::stable::contiguous(logsumexp);
  Tensor grad_query = empty_in_layout_of(query, args.width), grad_key = empty_in_layout_of(key, args.width),
         grad_value = empty_in_layout_of(value, args.value_width);
  bool wanted = bias && bias_gradient;
  Tensor grad_bias = empty_bias_gradient(query, bias, wanted);
  if (wanted) args.grad_bias = grad_bias.data_ptr();
  args.grad_output = input(grad_output);
  args.saved_output = input(output);
  Tensor workspace = workspace_of(args, query, true);
  args.logsumexp = static_cast<double*>(logsumexp.data_ptr());
  args.grad_query = result(grad_query), args.grad_key = result(grad_key),
  args.grad_value = result(grad_value);
  args.workspace = workspace.numel() ? workspace.data_ptr() : nullptr;
  bool out_of_memory = false;
  args.out_of_memory = &out_of_memory;
  FASTGAN_RUN(attention_backward, args, query);
  FASTGAN_CHECK(!out_of_memory, "attention_backward: no memory left for scratch");
  return {grad_query, grad_key, grad_value, grad_bias};
}

// (B, H, L, S), or their mean over the heads, (B, L, S).
Tensor attention_weights(Tensor query, Tensor key, std::optional<Tensor> mask, std::optional<Tensor> bias,
                         Tensor logsumexp, bool is_causal, double scale, bool average) {
  DeviceScope scope(query);
  AttentionArgs args = arguments(query, key, key, mask, bias, std::nullopt, 0, is_causal, scale);
  check_sizes("logsumexp", logsumexp, query, {args.batch, args.heads, args.rows});
  FASTGAN_CHECK(logsumexp.scalar_type() == ScalarType::Double,
                "attention_weights: logsumexp must be of float64");
  if (!logsumexp.is_contiguous()) logsumexp = torch::stable::contiguous(logsumexp);
  args.logsumexp = static_cast<double*>(logsumexp.data_ptr());
  args.average_weights = average;
  const int64_t each = args.rows * args.columns;
  Tensor weights = average
                       ? empty({args.batch, args.rows, args.columns}, query.scalar_type(), query)
                       : empty({args.batch, args.heads, args.rows, args.columns}, query.scalar_type(), query);
  args.weights.data = weights.data_ptr();
  args.weights.stride[0] = average ? each : each * args.heads;
  args.weights.stride[1] = average ? 0 : each;
  args.weights.stride[2] = args.columns, args.weights.stride[3] = 1;
#if defined(FASTGAN_CUDA)
  Tensor workspace = workspace_of(args, query, false);
  args.workspace = workspace.data_ptr();
#endif
  bool out_of_memory = false;
  args.out_of_memory = &out_of_memory;
  FASTGAN_RUN(attention_weights, args, query);
  FASTGAN_CHECK(!out_of_memory, "attention_weights: no memory left for scratch");
  return weights;
}

// What the two operators of second order have in common: the forward's results, and the direction.
void add_direction(AttentionArgs& args, const char* name, const Tensor& query, const Tensor& key,
                   const Tensor& value, const std::optional<Tensor>& bias, const Tensor& output,
                   Tensor& logsumexp, const std::optional<Tensor>& tangent_query,
                   const std::optional<Tensor>& tangent_key, const std::optional<Tensor>& tangent_value,
                   const std::optional<Tensor>& tangent_bias) {
  check_sizes("output", output, query, {args.batch, args.heads, args.rows, args.value_width});
  check_sizes("logsumexp", logsumexp, query, {args.batch, args.heads, args.rows});
  FASTGAN_CHECK(output.scalar_type() == query.scalar_type() && logsumexp.scalar_type() == ScalarType::Double,
                name, ": output must be of query's dtype, logsumexp of float64");
  if (!logsumexp.is_contiguous()) logsumexp = torch::stable::contiguous(logsumexp);
  args.saved_output = input(output);
  args.logsumexp = static_cast<double*>(logsumexp.data_ptr());
  FASTGAN_CHECK(!tangent_bias || bias, name, ": tangent_bias without a bias");
  auto tangent = [&](const char* of, const std::optional<Tensor>& along, const Tensor& like) {
    if (!along) return AttentionInput{};
    check_sizes(of, *along, query, {like.size(0), like.size(1), like.size(2), like.size(3)});
    FASTGAN_CHECK(along->scalar_type() == like.scalar_type(), name, ": ", of,
                  " must have the dtype of what it belongs to");
    return input(*along);
  };
  args.tangent_query = tangent("tangent_query", tangent_query, query);
  args.tangent_key = tangent("tangent_key", tangent_key, key);
  args.tangent_value = tangent("tangent_value", tangent_value, value);
  if (bias) args.tangent_bias = tangent("tangent_bias", tangent_bias, *bias);
}

Tensor attention_jvp(Tensor query, Tensor key, Tensor value, std::optional<Tensor> mask,
                     std::optional<Tensor> bias, std::optional<Tensor> philox, Tensor output,
                     Tensor logsumexp, std::optional<Tensor> tangent_query, std::optional<Tensor> tangent_key,
                     std::optional<Tensor> tangent_value, std::optional<Tensor> tangent_bias,
                     double dropout_p, bool is_causal, double scale) {
  DeviceScope scope(query);
  AttentionArgs args = arguments(query, key, value, mask, bias, philox, dropout_p, is_causal, scale);
  add_direction(args, "attention_jvp", query, key, value, bias, output, logsumexp, tangent_query, tangent_key,
                tangent_value, tangent_bias);
  Tensor tangent_output = empty_in_layout_of(query, args.value_width);
  args.tangent_output = result(tangent_output);
#if defined(FASTGAN_CUDA)
  Tensor workspace = workspace_of(args, query, false);
  args.workspace = workspace.data_ptr();
#endif
  bool out_of_memory = false;
  args.out_of_memory = &out_of_memory;
  FASTGAN_RUN(attention_jvp, args, query);
  FASTGAN_CHECK(!out_of_memory, "attention_jvp: no memory left for scratch");
  return tangent_output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_double_backward(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, std::optional<Tensor> mask,
    std::optional<Tensor> bias, std::optional<Tensor> philox, Tensor output, Tensor logsumexp,
    std::optional<Tensor> tangent_query, std::optional<Tensor> tangent_key,
    std::optional<Tensor> tangent_value, std::optional<Tensor> tangent_bias, double dropout_p, bool is_causal,
    double scale, bool bias_gradient) {
  DeviceScope scope(query);
  AttentionArgs args = arguments(query, key, value, mask, bias, philox, dropout_p, is_causal, scale);
  add_direction(args, "attention_double_backward", query, key, value, bias, output, logsumexp, tangent_query,
                tangent_key, tangent_value, tangent_bias);
  check_sizes("grad_output", grad_output, query, {args.batch, args.heads, args.rows, args.value_width});
  FASTGAN_CHECK(grad_output.scalar_type() == query.scalar_type(),
                "attention_double_backward: grad_output must be of query's dtype");
  args.grad_output = input(grad_output);
  Tensor tangent_output = empty_in_layout_of(query, args.value_width);
  Tensor row_sums =
      empty({3, args.batch, args.heads, args.rows}, accumulate_type(query.scalar_type()), query);
  args.tangent_output = result(tangent_output);
  args.row_sums = row_sums.data_ptr();
  Tensor grad_query = empty_in_layout_of(query, args.width), grad_key = empty_in_layout_of(key, args.width),
         grad_value = empty_in_layout_of(value, args.value_width);
  bool wanted = bias && bias_gradient;
  Tensor grad_bias = empty_bias_gradient(query, bias, wanted);
  if (wanted) args.grad_bias = grad_bias.data_ptr();
  Tensor workspace = workspace_of(args, query, true);
  args.grad_query = result(grad_query), args.grad_key = result(grad_key),
  args.grad_value = result(grad_value);
  args.workspace = workspace.numel() ? workspace.data_ptr() : nullptr;
  bool out_of_memory = false;
  args.out_of_memory = &out_of_memory;
  FASTGAN_RUN(attention_jvp, args, query);
  FASTGAN_RUN(attention_double_backward, args, query);
  FASTGAN_CHECK(!out_of_memory, "attention_double_backward: no memory left for scratch");
  return {tangent_output, grad_query, grad_key, grad_value, grad_bias};
}

#if defined(FASTGAN_CUDA)
std::atomic<Float32Products> float32_products{Float32Products::three_terms};

void attention_products(Tensor beside, int64_t products) {
  (void)beside;
  FASTGAN_CHECK(products >= 0 && products <= int64_t(Float32Products::three_terms),
                "attention_products: products must be 0 to 2, got ", products);
  float32_products = Float32Products(products);
}
#endif

}  // namespace

#if defined(FASTGAN_CUDA)
Float32Products attention_float32_products() { return float32_products; }
#endif

}  // namespace fastgan

FASTGAN_LIBRARY_IMPL(m) {
  m.impl("attention", TORCH_BOX(&fastgan::attention));
  m.impl("attention_backward", TORCH_BOX(&fastgan::attention_backward));
  m.impl("attention_jvp", TORCH_BOX(&fastgan::attention_jvp));
  m.impl("attention_double_backward", TORCH_BOX(&fastgan::attention_double_backward));
  m.impl("attention_weights", TORCH_BOX(&fastgan::attention_weights));
#if defined(FASTGAN_CUDA)
  m.impl("attention_products", TORCH_BOX(&fastgan::attention_products));
#endif
}
