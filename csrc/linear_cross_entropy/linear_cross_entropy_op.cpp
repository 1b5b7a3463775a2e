// linear_cross_entropy_rows: the part of linear_cross_entropy that is not a matrix product. The products, and
// the cut into chunks, are in fastgan/ops/linear_cross_entropy.py.
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

void linear_cross_entropy_rows(Tensor logits, Tensor target, std::optional<Tensor> bias,
                               std::optional<Tensor> margin, std::optional<Tensor> gradient,
                               std::optional<Tensor> loss, double smoothing, double z) {
  DeviceScope scope(logits);
  const ScalarType type = logits.scalar_type();
  FASTGAN_CHECK(type == ScalarType::Float || type == ScalarType::Double, "logits must be float32 or float64");
  FASTGAN_CHECK(logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1),
                "logits must have two dimensions, and rows without gaps");
  const int64_t rows = logits.size(0), classes = logits.size(1);
  FASTGAN_CHECK(target.scalar_type() == ScalarType::Long && target.dim() == 1 && target.size(0) == rows &&
                    target.is_contiguous() && is_here(target, logits),
                "target must be contiguous, int64, on the logits' device and of ", rows, " elements");
  const int64_t* classes_of = static_cast<const int64_t*>(target.const_data_ptr());
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

}  // namespace
}  // namespace fastgan

FASTGAN_LIBRARY_IMPL(m) {
  m.impl("linear_cross_entropy_rows", TORCH_BOX(&fastgan::linear_cross_entropy_rows));
}
