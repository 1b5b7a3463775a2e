// What the operators of attention share: tensors to the contract of attention.h, and the checks that guard
// memory.
#pragma once
#include "attention/attention.h"
#include "common/tensor.h"

namespace fastgan {

// What torch.ops.fastgan.attention_products was told last, for the calls to come.
Float32Products attention_float32_products();

namespace {

inline AttentionInput input(const Tensor& tensor) {
  AttentionInput out;
  out.data = tensor.data_ptr();
  for (int i = 0; i < 4; ++i) out.stride[i] = tensor.size(i) == 1 ? 0 : tensor.stride(i);
  return out;
}

inline AttentionOutput result(const Tensor& tensor) {
  AttentionOutput out;
  out.data = tensor.data_ptr();
  for (int i = 0; i < 4; ++i) out.stride[i] = tensor.stride(i);
  return out;
}

// `beside`: the query, whose device all others are on.
inline void check_sizes(const char* name, const Tensor& tensor, const Tensor& beside,
                        std::vector<int64_t> sizes, bool broadcasts = false) {
  bool fits = tensor.dim() == int64_t(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i)
    fits = tensor.size(i) == sizes[i] || (broadcasts && tensor.size(i) == 1);
  FASTGAN_CHECK(fits, "attention: ", name, " has sizes that do not fit query, key and value");
  FASTGAN_CHECK(is_here(tensor, beside), "attention: ", name, " must be on query's device");
}

// Dropout as fastgan/ops/attention.py says; none without `philox`.
inline void add_dropout(AttentionArgs& args, const Tensor& query, const std::optional<Tensor>& philox,
                        double dropout_p) {
  if (!philox) return;
  check_sizes("philox", *philox, query, {2});
  FASTGAN_CHECK(philox->scalar_type() == ScalarType::Long, "attention: philox must be int64");
  FASTGAN_CHECK(dropout_p >= 0 && dropout_p <= 1, "attention: dropout_p must be in [0, 1], got ", dropout_p);
  const auto* words = static_cast<const int64_t*>(philox->data_ptr());
  args.has_dropout = true;
#if defined(FASTGAN_CUDA)
  args.philox = words, args.philox_stride = philox->stride(0);
#else
  args.seed = uint64_t(words[0]);
  args.offset = uint32_t(uint64_t(words[philox->stride(0)]));
#endif
  args.threshold = dropout_threshold(dropout_p);
  args.kept_scale = dropout_p >= 1 ? 0.0 : 1 / (1 - dropout_p);
}

inline void add_products(AttentionArgs& args) {
#if defined(FASTGAN_CUDA)
  args.products = attention_float32_products();
#else
  (void)args;
#endif
}

// What a kernel needs beside its arguments; lives until it has been started.
inline Tensor workspace_of(const AttentionArgs& args, const Tensor& query, bool backward) {
#if defined(FASTGAN_CUDA)
  return empty({fastgan_attention_workspace_cuda(args, backward)}, ScalarType::Byte, query);
#else
  return empty({backward ? attention_workspace(args) : 0}, accumulate_type(query.scalar_type()), query);
#endif
}

}  // namespace
}  // namespace fastgan
