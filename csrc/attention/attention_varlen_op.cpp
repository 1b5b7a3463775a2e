// torch.ops.fastgan.varlen_attention and its derivatives: sequences of varied length, packed one after the
// other, each a strided view of its tensors.
#include <algorithm>
#include <utility>

#include "attention/attention_op.h"

namespace fastgan {
namespace {

// (rows, heads, width), or none, as (batch, heads, rows, width) whose batches begin at the same place.
template <class X>
X packed(const Tensor& tensor) {
  X out;
  out.data = tensor.data_ptr();
  out.stride[1] = tensor.stride(1), out.stride[2] = tensor.stride(0), out.stride[3] = tensor.stride(2);
  return out;
}

void check_packed(const char* name, const Tensor& tensor, const Tensor& query, int64_t rows, int64_t heads,
                  int64_t width) {
  check_sizes(name, tensor, query, {rows, heads, width});
  FASTGAN_CHECK(tensor.scalar_type() == query.scalar_type(), "varlen_attention: ", name,
                " must be of query's dtype");
}

bool is_int32(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Int; }

void check_offsets(const char* name, const Tensor& tensor, const Tensor& query) {
  FASTGAN_CHECK(tensor.dim() == 1 && tensor.size(0) > 0 &&
                    (is_int32(tensor) || tensor.scalar_type() == ScalarType::Long),
                "varlen_attention: ", name, " must be int32 or int64, of shape (sequences + 1,)");
  FASTGAN_CHECK(is_here(tensor, query), "varlen_attention: ", name, " must be on query's device");
}

#if defined(FASTGAN_CUDA)
using Offsets = Tensor;

// On the device, where the kernels read them; nobody waits for it to check the numbers.
Offsets offsets_of(const char* name, const Tensor& tensor, const Tensor& query, int64_t, const char*,
                   int64_t&) {
  check_offsets(name, tensor, query);
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

const int64_t* numbers(const Offsets& offsets) { return static_cast<const int64_t*>(offsets.data_ptr()); }
#else
using Offsets = std::vector<int64_t>;

template <class Integer>
void copy_offsets(const Tensor& from, Offsets& to) {
  const auto* at = static_cast<const Integer*>(from.data_ptr());
  for (size_t i = 0; i < to.size(); ++i) to[i] = int64_t(at[int64_t(i) * from.stride(0)]);
}

// On the host: the last is `rows`. `most` becomes the longest length.
Offsets offsets_of(const char* name, const Tensor& tensor, const Tensor& query, int64_t rows,
                   const char* most_name, int64_t& most) {
  check_offsets(name, tensor, query);
  Offsets out(size_t(tensor.size(0)));
  if (is_int32(tensor))
    copy_offsets<int32_t>(tensor, out);
  else
    copy_offsets<int64_t>(tensor, out);
  FASTGAN_CHECK(out.front() == 0, "varlen_attention: ", name, " must begin with 0, got ", out.front());
  int64_t longest = 0;
  for (size_t i = 1; i < out.size(); ++i) {
    FASTGAN_CHECK(out[i] >= out[i - 1], "varlen_attention: ", name, " must not decrease, got ", out[i],
                  " after ", out[i - 1], " at index ", i);
    longest = std::max(longest, out[i] - out[i - 1]);
  }
  FASTGAN_CHECK(out.back() == rows, "varlen_attention: ", name, " must end with the number of rows, ", rows,
                ", got ", out.back());
  FASTGAN_CHECK(longest <= most, "varlen_attention: ", most_name,
                " must be the length of the longest sequence or more, got ", most, " and a sequence of ",
                longest, " in ", name);
  most = longest;
  return out;
}

const int64_t* numbers(const Offsets& offsets) { return offsets.data(); }
#endif

// The call's arguments, and the offsets that they point to.
struct Packed {
  AttentionArgs args;
  Offsets rows, columns;
};

Packed arguments(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seq_q,
                 const Tensor& cu_seq_k, const std::optional<Tensor>& philox, int64_t max_q, int64_t max_k,
                 double dropout_p, bool is_causal, double scale) {
  FASTGAN_CHECK(query.dim() == 3 && key.dim() == 3 && value.dim() == 3,
                "varlen_attention: query, key and value must have three dimensions, got ", query.dim(), ", ",
                key.dim(), ", ", value.dim());
  AttentionArgs args;
  args.dtype = dtype_of(query);
  args.packed_rows = query.size(0), args.heads = query.size(1), args.width = query.size(2);
  args.kv_heads = key.size(1), args.value_width = value.size(2);
  FASTGAN_CHECK(args.kv_heads == 0 ? args.heads == 0 : args.heads % args.kv_heads == 0,
                "varlen_attention: ", args.heads, " query heads cannot be shared among ", args.kv_heads,
                " key heads");
  check_packed("query", query, query, args.packed_rows, args.heads, args.width);
  check_packed("key", key, query, key.size(0), args.kv_heads, args.width);
  check_packed("value", value, query, key.size(0), args.kv_heads, args.value_width);
  args.query = packed<AttentionInput>(query), args.key = packed<AttentionInput>(key),
  args.value = packed<AttentionInput>(value);
  FASTGAN_CHECK(cu_seq_q.numel() == cu_seq_k.numel(), "varlen_attention: cu_seq_q and cu_seq_k must be of ",
                "equal length, got ", cu_seq_q.numel(), " and ", cu_seq_k.numel());
#if defined(FASTGAN_CUDA)
  FASTGAN_CHECK(cu_seq_q.scalar_type() == cu_seq_k.scalar_type(),
                "varlen_attention: cu_seq_q and cu_seq_k must have one dtype");
  args.offsets_are_int32 = is_int32(cu_seq_q);
#endif
  Offsets rows = offsets_of("cu_seq_q", cu_seq_q, query, query.size(0), "max_q", max_q);
  Offsets columns = offsets_of("cu_seq_k", cu_seq_k, query, key.size(0), "max_k", max_k);
  args.batch = cu_seq_q.numel() - 1;
  args.packed_columns = key.size(0);
  args.rows = std::min(max_q, args.packed_rows), args.columns = std::min(max_k, args.packed_columns);
  args.scale = scale;
  args.is_causal = is_causal;
  add_dropout(args, query, philox, dropout_p);
  add_products(args);
  Packed out{args, std::move(rows), std::move(columns)};
  out.args.row_offset = numbers(out.rows), out.args.column_offset = numbers(out.columns);
  return out;
}

// The forward's results, for the derivatives.
void add_saved(AttentionArgs& args, const Tensor& query, const Tensor& output, Tensor& logsumexp) {
  check_packed("output", output, query, args.packed_rows, args.heads, args.value_width);
  check_sizes("logsumexp", logsumexp, query, {args.heads, args.packed_rows});
  FASTGAN_CHECK(logsumexp.scalar_type() == ScalarType::Double,
                "varlen_attention: logsumexp must be of float64");
  if (!logsumexp.is_contiguous()) logsumexp = torch::stable::contiguous(logsumexp);
  args.saved_output = packed<AttentionInput>(output);
  args.logsumexp = static_cast<double*>(logsumexp.data_ptr());
}

void add_direction(AttentionArgs& args, const Tensor& query, const Tensor& key, const Tensor& value,
                   const std::optional<Tensor>& tangent_query, const std::optional<Tensor>& tangent_key,
                   const std::optional<Tensor>& tangent_value) {
  auto tangent = [&](const char* name, const std::optional<Tensor>& along, const Tensor& like) {
    if (!along) return AttentionInput{};
    check_packed(name, *along, query, like.size(0), like.size(1), like.size(2));
    return packed<AttentionInput>(*along);
  };
  args.tangent_query = tangent("tangent_query", tangent_query, query);
  args.tangent_key = tangent("tangent_key", tangent_key, key);
  args.tangent_value = tangent("tangent_value", tangent_value, value);
}

void add_grad_output(AttentionArgs& args, const Tensor& query, const Tensor& grad_output) {
  check_packed("grad_output", grad_output, query, args.packed_rows, args.heads, args.value_width);
  args.grad_output = packed<AttentionInput>(grad_output);
}

// A result: contiguous, (rows, heads, width) of `like`, but for the width.
Tensor new_result(AttentionOutput& out, const Tensor& like, int64_t width) {
  Tensor tensor = empty({like.size(0), like.size(1), width}, like.scalar_type(), like);
  out = packed<AttentionOutput>(tensor);
  return tensor;
}

std::tuple<Tensor, Tensor> varlen_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seq_q,
                                            Tensor cu_seq_k, std::optional<Tensor> philox, int64_t max_q,
                                            int64_t max_k, double dropout_p, bool is_causal, double scale) {
  DeviceScope scope(query);
  Packed call =
      arguments(query, key, value, cu_seq_q, cu_seq_k, philox, max_q, max_k, dropout_p, is_causal, scale);
  AttentionArgs& args = call.args;
  Tensor output = new_result(args.output, query, args.value_width);
  Tensor logsumexp = empty({args.heads, args.packed_rows}, ScalarType::Double, query);
  args.logsumexp = static_cast<double*>(logsumexp.data_ptr());
#if defined(FASTGAN_CUDA)
  Tensor workspace = workspace_of(args, query, false);
  args.workspace = workspace.data_ptr();
#endif
  bool out_of_memory = false;
  args.out_of_memory = &out_of_memory;
  FASTGAN_RUN(attention_forward, args, query);
  FASTGAN_CHECK(!out_of_memory, "varlen_attention: no memory left for scratch");
  return {output, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_backward(Tensor grad_output, Tensor query, Tensor key,
                                                             Tensor value, Tensor cu_seq_q, Tensor cu_seq_k,
                                                             std::optional<Tensor> philox, Tensor output,
                                                             Tensor logsumexp, int64_t max_q, int64_t max_k,
                                                             double dropout_p, bool is_causal, double scale) {
  DeviceScope scope(query);
  Packed call =
      arguments(query, key, value, cu_seq_q, cu_seq_k, philox, max_q, max_k, dropout_p, is_causal, scale);
  AttentionArgs& args = call.args;
  add_saved(args, query, output, logsumexp);
  add_grad_output(args, query, grad_output);
  Tensor grad_query = new_result(args.grad_query, query, args.width),
         grad_key = new_result(args.grad_key, key, args.width),
         grad_value = new_result(args.grad_value, value, args.value_width);
  Tensor workspace = workspace_of(args, query, true);
  args.workspace = workspace.numel() ? workspace.data_ptr() : nullptr;
  bool out_of_memory = false;
  args.out_of_memory = &out_of_memory;
  FASTGAN_RUN(attention_backward, args, query);
  FASTGAN_CHECK(!out_of_memory, "varlen_attention_backward: no memory left for scratch");
  return {grad_query, grad_key, grad_value};
}

Tensor varlen_attention_jvp(Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor cu_seq_k,
                            std::optional<Tensor> philox, Tensor output, Tensor logsumexp,
                            std::optional<Tensor> tangent_query, std::optional<Tensor> tangent_key,
                            std::optional<Tensor> tangent_value, int64_t max_q, int64_t max_k,
                            double dropout_p, bool is_causal, double scale) {
  DeviceScope scope(query);
  Packed call =
      arguments(query, key, value, cu_seq_q, cu_seq_k, philox, max_q, max_k, dropout_p, is_causal, scale);
  AttentionArgs& args = call.args;
  add_saved(args, query, output, logsumexp);
  add_direction(args, query, key, value, tangent_query, tangent_key, tangent_value);
  Tensor tangent_output = new_result(args.tangent_output, query, args.value_width);
  bool out_of_memory = false;
  args.out_of_memory = &out_of_memory;
  FASTGAN_RUN(attention_jvp, args, query);
  FASTGAN_CHECK(!out_of_memory, "varlen_attention_jvp: no memory left for scratch");
  return tangent_output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> varlen_attention_double_backward(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor cu_seq_k,
    std::optional<Tensor> philox, Tensor output, Tensor logsumexp, std::optional<Tensor> tangent_query,
    std::optional<Tensor> tangent_key, std::optional<Tensor> tangent_value, int64_t max_q, int64_t max_k,
    double dropout_p, bool is_causal, double scale) {
  DeviceScope scope(query);
  Packed call =
      arguments(query, key, value, cu_seq_q, cu_seq_k, philox, max_q, max_k, dropout_p, is_causal, scale);
  AttentionArgs& args = call.args;
  add_saved(args, query, output, logsumexp);
  add_grad_output(args, query, grad_output);
  add_direction(args, query, key, value, tangent_query, tangent_key, tangent_value);
  Tensor tangent_output = new_result(args.tangent_output, query, args.value_width),
         grad_query = new_result(args.grad_query, query, args.width),
         grad_key = new_result(args.grad_key, key, args.width),
         grad_value = new_result(args.grad_value, value, args.value_width);
  Tensor row_sums = empty({3, row_count(args)}, accumulate_type(query.scalar_type()), query);
  args.row_sums = row_sums.data_ptr();
  Tensor workspace = workspace_of(args, query, true);
  args.workspace = workspace.numel() ? workspace.data_ptr() : nullptr;
  bool out_of_memory = false;
  args.out_of_memory = &out_of_memory;
  FASTGAN_RUN(attention_jvp, args, query);
  FASTGAN_RUN(attention_double_backward, args, query);
  FASTGAN_CHECK(!out_of_memory, "varlen_attention_double_backward: no memory left for scratch");
  return {tangent_output, grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace fastgan

FASTGAN_LIBRARY_IMPL(m) {
  m.impl("varlen_attention", TORCH_BOX(&fastgan::varlen_attention));
  m.impl("varlen_attention_backward", TORCH_BOX(&fastgan::varlen_attention_backward));
  m.impl("varlen_attention_jvp", TORCH_BOX(&fastgan::varlen_attention_jvp));
  m.impl("varlen_attention_double_backward", TORCH_BOX(&fastgan::varlen_attention_double_backward));
}
