// The part of linear_cross_entropy that is not a matrix product: linear_cross_entropy_rows, and for CUDA
// linear_cross_entropy_statistics and _gradient of blocks of classes. The products, and the cut into chunks
// and blocks, are in fastgan/ops/linear_cross_entropy.py.
#include "common/tensor.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace fastgan {
namespace {

const void* numbers(const std::optional<Tensor>& tensor, const char* name, ScalarType type, int64_t count,
                    const Tensor& beside) {
  if (!tensor) return nullptr;
  FASTGAN_CHECK(is_here(*tensor, beside), name, " must be on the logits' device");
  FASTGAN_CHECK(tensor->scalar_type() == type && tensor->dim() == 1 && tensor->size(0) == count &&
                    tensor->is_contiguous(),
                name, " must be contiguous, of the logits' dtype and of ", count, " elements");
  return tensor->const_data_ptr();
}

const int64_t* targets(const Tensor& target, const Tensor& logits) {
  FASTGAN_CHECK(target.scalar_type() == ScalarType::Long && target.dim() == 1 &&
                    target.size(0) == logits.size(0) && target.is_contiguous() && is_here(target, logits),
                "target must be contiguous, int64, on the logits' device and of ", logits.size(0),
                " elements");
  return static_cast<const int64_t*>(target.const_data_ptr());
}

void linear_cross_entropy_rows(Tensor logits, Tensor target, std::optional<Tensor> bias,
                               std::optional<Tensor> margin, std::optional<Tensor> gradient,
                               std::optional<Tensor> loss, double smoothing, double z) {
  DeviceScope scope(logits);
  const ScalarType type = logits.scalar_type();
  FASTGAN_CHECK(type == ScalarType::Float || type == ScalarType::Double, "logits must be float32 or float64");
  FASTGAN_CHECK(logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1),
                "logits must have two dimensions, and rows without gaps");
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const int64_t* classes_of = targets(target, logits);
#if !defined(FASTGAN_CUDA)
  for (int64_t r = 0; r < rows; ++r)
    FASTGAN_CHECK(classes_of[r] >= 0 && classes_of[r] < classes, "target ", classes_of[r],
                  " is out of bounds");
#endif
  LinearCrossEntropyRows arguments{};
  arguments.dtype = dtype_of(logits);
  arguments.logits = logits.mutable_data_ptr();
  arguments.rows = rows;
  arguments.classes = classes;
  arguments.stride = logits.stride(0);
  arguments.target = classes_of;
  arguments.bias = numbers(bias, "bias", type, classes, logits);
  arguments.margin = numbers(margin, "margin", type, rows, logits);
  arguments.gradient = numbers(gradient, "gradient", type, rows, logits);
  arguments.loss = const_cast<void*>(numbers(loss, "loss", type, rows, logits));
  arguments.smoothing = smoothing;
  arguments.z = z;
  FASTGAN_RUN(linear_cross_entropy_rows, arguments, logits);
}

#if defined(FASTGAN_CUDA)
LinearCrossEntropyBlock block_of(const Tensor& logits, int64_t begin, int64_t classes, const Tensor& target,
                                 const std::optional<Tensor>& bias, const std::optional<Tensor>& margin,
                                 const Tensor& state, double smoothing, double z) {
  FASTGAN_CHECK(logits.scalar_type() == ScalarType::Float && logits.dim() == 2 &&
                    (logits.size(1) <= 1 || logits.stride(1) == 1),
                "logits must be float32 with two dimensions, and rows without gaps");
  const int64_t rows = logits.size(0), columns = logits.size(1);
  FASTGAN_CHECK(begin >= 0 && columns > 0 && begin <= classes - columns, columns, " columns from ", begin,
                " on are not among ", classes, " classes");
  FASTGAN_CHECK(state.scalar_type() == ScalarType::Double && state.dim() == 2 && state.size(0) == rows &&
                    state.size(1) == kLinearCrossEntropyState && state.is_contiguous() &&
                    is_here(state, logits),
                "state must be contiguous, float64, on the logits' device and of shape (", rows, ", ",
                kLinearCrossEntropyState, ")");
  LinearCrossEntropyBlock arguments{};
  arguments.logits = logits.mutable_data_ptr();
  arguments.rows = rows;
  arguments.columns = columns;
  arguments.stride = logits.stride(0);
  arguments.begin = begin;
  arguments.classes = classes;
  arguments.target = targets(target, logits);
  arguments.bias = numbers(bias, "bias", ScalarType::Float, classes, logits);
  arguments.margin = numbers(margin, "margin", ScalarType::Float, rows, logits);
  arguments.state = static_cast<double*>(state.mutable_data_ptr());
  arguments.smoothing = smoothing;
  arguments.z = z;
  return arguments;
}

void linear_cross_entropy_statistics(Tensor logits, int64_t begin, int64_t classes, Tensor target,
                                     std::optional<Tensor> bias, std::optional<Tensor> margin, Tensor state,
                                     std::optional<Tensor> loss, double smoothing, double z) {
  DeviceScope scope(logits);
  LinearCrossEntropyBlock arguments =
      block_of(logits, begin, classes, target, bias, margin, state, smoothing, z);
  arguments.loss = const_cast<void*>(numbers(loss, "loss", ScalarType::Float, arguments.rows, logits));
  FASTGAN_RUN(linear_cross_entropy_statistics, arguments, logits);
}

void linear_cross_entropy_gradient(Tensor logits, int64_t begin, int64_t classes, Tensor target,
                                   std::optional<Tensor> bias, std::optional<Tensor> margin, Tensor state,
                                   Tensor gradient, Tensor out, double smoothing) {
  DeviceScope scope(logits);
  LinearCrossEntropyBlock arguments =
      block_of(logits, begin, classes, target, bias, margin, state, smoothing, 0.0);
  arguments.gradient = numbers(gradient, "gradient", ScalarType::Float, arguments.rows, logits);
  FASTGAN_CHECK(out.scalar_type() != ScalarType::Double && out.dim() == 2 && is_here(out, logits) &&
                    out.size(0) == arguments.rows && out.size(1) == arguments.columns &&
                    (out.size(1) <= 1 || out.stride(1) == 1),
                "out must be float32, bfloat16 or float16 of the logits' shape, on their device, and rows "
                "without gaps");
  arguments.out = out.mutable_data_ptr();
  arguments.out_dtype = dtype_of(out);
  arguments.out_stride = out.stride(0);
  FASTGAN_RUN(linear_cross_entropy_gradient, arguments, logits);
}
#endif

}  // namespace
}  // namespace fastgan

FASTGAN_LIBRARY_IMPL(m) {
  m.impl("linear_cross_entropy_rows", TORCH_BOX(&fastgan::linear_cross_entropy_rows));
#if defined(FASTGAN_CUDA)
  m.impl("linear_cross_entropy_statistics", TORCH_BOX(&fastgan::linear_cross_entropy_statistics));
  m.impl("linear_cross_entropy_gradient", TORCH_BOX(&fastgan::linear_cross_entropy_gradient));
#endif
}
