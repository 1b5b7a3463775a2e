// fastgan::conv_pass: one of the three passes of a convolution; fastgan/ops/conv.py makes operators with
// derivatives of it.
#include "conv/conv.h"

#include <unistd.h>

#include <tuple>
#include <utility>

#include "common/pool.h"
#include "common/tensor.h"

namespace fastgan {
namespace {

// In pages of the pool, which are large ones: the points of a tile are written kilobytes apart, each into a
// page of its own otherwise.
struct Workspace {
  Block block;
  explicit Workspace(int64_t size) : block(take_scratch(size)) {
    FASTGAN_CHECK(block.data, "conv: no memory for a workspace of ", size, " bytes");
  }
  ~Workspace() { give_scratch(block); }
};

ConvTensor view(const Tensor& tensor) {
  ConvTensor out{};
  out.data = const_cast<void*>(tensor.const_data_ptr());
  for (int i = 0; i < 4; ++i) out.strides[i] = tensor.stride(i);
  return out;
}

// A plain convolution from many channels to few is the transpose of one from few to many, its weights read
// from the end: so it becomes one that the direct kernels take. Returns the pass that it then is.
int64_t turn(ConvArgs& a, int64_t which) {
  FASTGAN_CHECK(!a.mask, "conv_pass takes no mask over ", a.outputs, " channels");
  const int64_t size = a.dtype == Dtype::float32 ? 4 : 2;
  std::swap(a.x, a.y), std::swap(a.channels, a.outputs);
  std::swap(a.height, a.out_height), std::swap(a.width, a.out_width);
  std::swap(a.w.strides[0], a.w.strides[1]);
  for (int i = 2; i < 4; ++i) {
    a.w.data = static_cast<char*>(a.w.data) + (a.kernel - 1) * a.w.strides[i] * size;
    a.w.strides[i] = -a.w.strides[i];
  }
  a.pad_height = a.kernel - 1 - a.pad_height, a.pad_width = a.kernel - 1 - a.pad_width;
  return which == 2 ? 2 : 1 - which;
}

// Sixteen channels are transformed at a time: of few, most of that would be for none.
constexpr int64_t kFew = 8;

decltype(FASTGAN_SELECT(conv_forward)) kernel_for(ConvArgs& a, int64_t which) {
  const bool whole = a.out_height == a.height + 2 * a.pad_height - a.kernel + 1 &&
                     a.out_width == a.width + 2 * a.pad_width - a.kernel + 1;
  if (a.stride == 1 && a.outputs <= kFew && a.outputs < a.channels && whole && a.pad_height < a.kernel &&
      a.pad_width < a.kernel)
    which = turn(a, which);
  if (a.channels <= kFew)
    return which == 0   ? FASTGAN_SELECT(conv_direct_forward)
           : which == 1 ? FASTGAN_SELECT(conv_direct_input_gradient)
                        : FASTGAN_SELECT(conv_direct_weight_gradient);
  return which == 0   ? FASTGAN_SELECT(conv_forward)
         : which == 1 ? FASTGAN_SELECT(conv_input_gradient)
                      : FASTGAN_SELECT(conv_weight_gradient);
}

// Asked once: the answer comes from an instruction that a virtual machine's host has to emulate.
int64_t second_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return size;
#else
  return 0;
#endif
}

// which: 0, from x and w to y; 1, from y and w to x; 2, from x and y to w. The result, of `size`, and whether
// all that was computed is finite.
std::tuple<Tensor, bool> conv_pass(int64_t which, Tensor first, Tensor second, std::vector<int64_t> size,
                                   bool channels_last, std::optional<Tensor> bias, double slope,
                                   std::optional<Tensor> mask, double mask_slope, int64_t stride,
                                   int64_t pad_height, int64_t pad_width) {
  FASTGAN_CHECK(which >= 0 && which <= 2, "conv_pass: which must be 0, 1 or 2");
  FASTGAN_CHECK(size.size() == 4, "conv_pass: size must have 4 elements, got ", size.size());
  Tensor out = empty(size, first.scalar_type(), first, channels_last);
  const Tensor &x = which == 1 ? out : first, &w = which == 2 ? out : second;
  const Tensor& y = which == 0 ? out : which == 1 ? first : second;
  FASTGAN_CHECK(x.dim() == 4 && w.dim() == 4 && y.dim() == 4, "conv_pass takes tensors of 4 dimensions");
  const ScalarType type = x.scalar_type();
  FASTGAN_CHECK(type == w.scalar_type() && type == y.scalar_type() && type != ScalarType::Double,
                "conv_pass takes tensors of one dtype, float32, bfloat16 or float16");
  ConvArgs a{};
  a.dtype = dtype_of(x);
  a.kernel = int32_t(w.size(2)), a.stride = int32_t(stride);
  a.batch = x.size(0), a.channels = x.size(1), a.height = x.size(2), a.width = x.size(3);
  a.outputs = y.size(1), a.out_height = y.size(2), a.out_width = y.size(3);
  a.pad_height = pad_height, a.pad_width = pad_width;
  FASTGAN_CHECK(w.size(2) == w.size(3) && ((a.kernel == 4 && stride == 2) || (a.kernel == 3 && stride == 1)),
                "conv_pass takes kernel 4 with stride 2 or kernel 3 with stride 1");
  FASTGAN_CHECK(y.size(0) == a.batch && w.size(0) == a.outputs && w.size(1) == a.channels,
                "conv_pass: batch or channels do not fit");
  FASTGAN_CHECK(a.batch > 0 && a.channels > 0 && a.outputs > 0 && a.height > 0 && a.width > 0 &&
                    a.out_height > 0 && a.out_width > 0 && pad_height >= 0 && pad_width >= 0,
                "conv_pass takes no empty tensors");
  FASTGAN_CHECK((a.out_height - 1) * stride + a.kernel <= a.height + 2 * pad_height &&
                    (a.out_width - 1) * stride + a.kernel <= a.width + 2 * pad_width,
                "conv_pass: y is too large for x");
  if (bias) {
    FASTGAN_CHECK(bias->scalar_type() == ScalarType::Float && bias->dim() == 1 && bias->is_contiguous() &&
                      bias->size(0) == (which == 0 ? a.outputs : a.channels) && which < 2,
                  "conv_pass: bias must be contiguous, float32 and one number a channel of the output");
    a.bias = static_cast<const float*>(bias->const_data_ptr());
  }
  FASTGAN_CHECK(slope == 1 || which < 2, "conv_pass: no activation of a weight gradient");
  a.slope = float(slope);
  if (mask) {
    FASTGAN_CHECK(which > 0 && mask->scalar_type() == type && sizes_of(*mask) == sizes_of(y),
                  "conv_pass: a mask is of y's shape and dtype, and for the gradients alone");
    for (int i = 0; i < 4; ++i)
      FASTGAN_CHECK(mask->size(i) == 1 || mask->stride(i) == y.stride(i),
                    "conv_pass: a mask has y's strides");
    a.mask = mask->const_data_ptr(), a.mask_slope = float(mask_slope);
  }
  a.x = view(x), a.w = view(w), a.y = view(y);
  int32_t nonfinite = 0;
  int64_t workspace_size = 0;
  a.nonfinite = &nonfinite, a.workspace_size = &workspace_size;
  a.threads = int32_t(torch::stable::get_num_threads());
  a.second_cache = second_cache();
  const auto kernel = kernel_for(a, which);
  kernel(a, torch_threads());
  const Workspace workspace(workspace_size);
  a.workspace = workspace.block.data;
  kernel(a, torch_threads());
  return {out, nonfinite == 0};
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, m) { m.impl("conv_pass", TORCH_BOX(&fastgan::conv_pass)); }
