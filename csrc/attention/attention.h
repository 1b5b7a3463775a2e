// The contract of the attention kernels: softmax(query keyᵀ · scale + bias) value, its log-sum-exp, the
// gradients, and the derivatives of output and gradients along a direction. What each argument means, and the
// mathematics, is in fastgan/ops/attention.py. Strides count elements; a broadcast dimension has stride 0.
// Nothing of PyTorch here.
#pragma once
#include "common/capability.h"
#include "common/types.h"

namespace fastgan {

// On CUDA, how products of float32 are made: by fused multiply-adds, or on tensor cores of one or three terms
// (attention_cuda_tf32.h).
enum class Float32Products : int32_t { exact, one_term, three_terms };

struct AttentionInput {
  const void* data = nullptr;  // null: absent (mask and bias only)
  int64_t stride[4] = {};      // batch, head, row, column
};

struct AttentionOutput {
  void* data = nullptr;
  int64_t stride[4] = {};  // the last is 1
};

struct AttentionArgs {
  Dtype dtype = Dtype::float32, bias_dtype = Dtype::float32;  // of bias: dtype, or float32
  Float32Products products = Float32Products::three_terms;
  int64_t batch = 0, heads = 0, kv_heads = 0;                 // kv_heads divides heads
  int64_t rows = 0, columns = 0, width = 0, value_width = 0;  // L, S, E, V
  AttentionInput query, key, value;
  AttentionInput mask;  // bytes, zero: takes no part
  AttentionInput bias;
  double scale = 1;
  bool is_causal = false;
  int64_t diagonal =
      0;  // is_causal: row i sees columns up to i + diagonal; packed, it is set by sequence_of()
  // Packed: `batch` sequences of their own lengths, one after the other in dimension "row" of all tensors.
  // The n-th has rows row_offset[n] to row_offset[n + 1], and columns likewise; batch + 1 numbers each.
  // Strides of batches are 0, `rows` and `columns` the longest's, packed_rows all; neither mask nor bias.
  // is_causal is of each sequence's lower right corner.
  const int64_t *row_offset = nullptr, *column_offset = nullptr;
  int64_t packed_rows = 0, packed_columns = 0;
  // On CUDA the offsets stay on the device, and are int32 there if this says so; `first_row` is set where a
  // block goes over to its own sequence.
  bool offsets_are_int32 = false;
  int64_t first_row = 0;
  bool has_dropout = false;
  uint64_t seed = 0;
  uint32_t offset = 0;
  uint32_t threshold = 0;  // a word below is dropped
  double kept_scale = 1;   // 0 drops all
  // On CUDA seed and offset stay on the device, where the kernels read them: two numbers, this far apart.
  const int64_t* philox = nullptr;
  int64_t philox_stride = 0;

  // forward
  AttentionOutput output;
  // (batch, heads, rows), packed (heads, packed_rows), contiguous; read by the backward. In double: at scores
  // of 100 a float's step is 1e-5, which would be the relative error of every probability of the row, 1
  // included.
  double* logsumexp = nullptr;

  // backward
  AttentionInput grad_output, saved_output;
  AttentionOutput grad_query, grad_key, grad_value;
  void* grad_bias = nullptr;  // contiguous; null: not asked for
  int64_t bias_size[4] = {};  // each 1 or the scores' own
  // attention_workspace() numbers of the accumulation type; on CUDA, of the forward as well,
  // fastgan_attention_workspace_cuda() bytes, asked for once all else is here
  void* workspace = nullptr;

  // Second order: the derivative of output (attention_jvp), and of the four gradients for a constant
  // grad_output (attention_double_backward, written to grad_*), along the direction `tangent_*`, each of
  // which may be absent. Both read saved_output and logsumexp.
  AttentionInput tangent_query, tangent_key, tangent_value;
  AttentionInput tangent_bias;  // of bias's dtype
  AttentionOutput tangent_output;
  // Three numbers of the accumulation type for each row, (3, row_count()): the mean of the tangent of
  // its scores, grad_output · output, grad_output · tangent_output. Written by attention_jvp if not null (it
  // then needs grad_output), read by attention_double_backward.
  void* row_sums = nullptr;

  // attention_weights: (batch, heads or 1, rows, columns), from logsumexp; no value, no dropout
  AttentionOutput weights;
  bool average_weights = false;  // over the heads

  bool* out_of_memory = nullptr;  // set if scratch could not be had
};

// Where a row's number is among those that are kept of every row, and how many there are.
static inline int64_t row_index(const AttentionArgs& a, int64_t batch, int64_t head, int64_t row) {
  return a.row_offset ? head * a.packed_rows + a.row_offset[batch] + row
                      : (batch * a.heads + head) * a.rows + row;
}
static inline int64_t row_count(const AttentionArgs& a) {
  return a.heads * (a.row_offset ? a.packed_rows : a.batch * a.rows);
}

// A key range of its own for each piece of work, where batch × kv_heads alone would not keep many threads
// busy: then each has its own partial gradient of query, and they are added up in order afterwards. A
// function of the shape alone.
constexpr int64_t kAttentionKeyBlock = 128;

static inline int64_t attention_key_chunks(const AttentionArgs& a) {
  // A bias that all batches share joins them to one piece (attention_by_keys.h).
  int64_t pairs = (a.grad_bias && a.bias_size[0] == 1 ? (a.batch > 0) : a.batch) * a.kv_heads,
          blocks = (a.columns + kAttentionKeyBlock - 1) / kAttentionKeyBlock;
  if (pairs == 0 || pairs >= 8 || blocks <= 1) return 1;
  int64_t wanted = (8 + pairs - 1) / pairs;
  return wanted < blocks ? wanted : blocks;
}

// Numbers of the accumulation type that the backward needs to sum up the gradient of query; 0: it does so in
// place.
static inline int64_t attention_workspace(const AttentionArgs& a) {
  int64_t chunks = attention_key_chunks(a);
  bool in_place = chunks == 1 && (a.dtype == Dtype::float32 || a.dtype == Dtype::float64);
  return in_place ? 0 : chunks * row_count(a) * a.width;
}

}  // namespace fastgan

FASTGAN_DECLARE_AMX_KERNEL(attention_forward, fastgan::AttentionArgs)
FASTGAN_DECLARE_AMX_KERNEL(attention_backward, fastgan::AttentionArgs)
FASTGAN_DECLARE_KERNEL(attention_weights, fastgan::AttentionArgs)
FASTGAN_DECLARE_KERNEL(attention_jvp, fastgan::AttentionArgs)
FASTGAN_DECLARE_KERNEL(attention_double_backward, fastgan::AttentionArgs)
FASTGAN_DECLARE_CUDA_KERNEL(attention_forward, fastgan::AttentionArgs)
FASTGAN_DECLARE_CUDA_KERNEL(attention_backward, fastgan::AttentionArgs)
FASTGAN_DECLARE_CUDA_KERNEL(attention_weights, fastgan::AttentionArgs)
FASTGAN_DECLARE_CUDA_KERNEL(attention_jvp, fastgan::AttentionArgs)
FASTGAN_DECLARE_CUDA_KERNEL(attention_double_backward, fastgan::AttentionArgs)
extern "C" int64_t fastgan_attention_workspace_cuda(const fastgan::AttentionArgs&, bool backward);
