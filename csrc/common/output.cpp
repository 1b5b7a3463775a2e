// Results on the CPU whose memory comes from the pool: fastgan::empty of tensor.h, and the operator
// fastgan::new_output for the operators that are written in Python.
#include "common/pool.h"
#include "common/tensor.h"

// Since torch 2.11; before that large results are torch's own.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
torch_from_blob(void* data, int64_t dimensions, const int64_t* sizes, const int64_t* strides,
                int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                AtenTensorHandle* out, int32_t layout, const uint8_t* metadata, int64_t metadata_size,
                void (*deleter)(void* data, void* context), void* context);

namespace fastgan {
namespace {

int64_t size_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      return 0;  // none of ours
  }
}

// Contiguous in the order of the memory format.
std::vector<int64_t> strides_of(const std::vector<int64_t>& sizes, bool channels_last) {
  const size_t dimensions = sizes.size();
  std::vector<int64_t> strides(dimensions);
  int64_t next = 1;
  auto put = [&](size_t d) { strides[d] = next, next *= sizes[d] > 1 ? sizes[d] : 1; };
  if (channels_last) put(1);
  for (size_t d = dimensions; d-- > 0;)
    if (!channels_last || d != 1) put(d);
  return strides;
}

}  // namespace

Tensor new_output(const std::vector<int64_t>& sizes, ScalarType type, bool channels_last) {
  int64_t bytes = size_of(type);
  for (int64_t size : sizes) bytes *= size;
  const Block block = torch_from_blob && bytes >= kPooled ? take_from_pool(bytes) : Block{};
  if (!block.data) {
    return torch::stable::empty(sizes, type, std::nullopt, std::nullopt, std::nullopt,
                                format_of(sizes, channels_last));
  }
  const std::vector<int64_t> strides = strides_of(sizes, channels_last);
  AtenTensorHandle handle;
  const AOTITorchError error = torch_from_blob(
      block.data, int64_t(sizes.size()), sizes.data(), strides.data(), 0,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), aoti_torch_device_type_cpu(), -1,
      &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void* data, void* context) {
        // The context is the size.
        give_to_pool({data, int64_t(reinterpret_cast<uintptr_t>(context))});
      },
      reinterpret_cast<void*>(uintptr_t(block.size)));
  if (error) give_to_pool(block);
  TORCH_ERROR_CODE_CHECK(error);
  return Tensor(handle);
}

}  // namespace fastgan

namespace {

// Of the dtype of `beside` unless one is given.
fastgan::Tensor new_output(fastgan::Tensor beside, std::vector<int64_t> sizes,
                           std::optional<fastgan::ScalarType> dtype, bool channels_last) {
  return fastgan::new_output(sizes, dtype.value_or(beside.scalar_type()), channels_last);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, m) { m.impl("new_output", TORCH_BOX(&new_output)); }
