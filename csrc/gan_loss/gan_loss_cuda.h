// What the two files of gan_loss's CUDA kernels share: gan_loss.cu, and gan_loss_patches.cu, which has the
// convolution's part where there are many logits a picture.
#pragma once
#include "common/cuda_block.h"
#include "common/cuda_types.h"
#include "gan_loss/gan_loss.h"

namespace fastgan {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a call is cut that goes by gan_loss_patches.cu; from shapes and dtype alone. A block has `lanes` of
// what its threads stand for and a split of what they sum over, in stages of kStage.
struct Patches {
  struct Cut {
    int64_t tiles, splits, rows;  // rows of a split; the last may have fewer
  };
  bool is_chosen;
  int64_t columns, pixels;  // outputs * taps; batch * height * width
  int64_t offset;           // in workspace, of what is summed for others; beyond a number for each logit
  Cut products, weights;    // forward; gradient of the weights
};

// Blocks of 256 threads that fit on a large GPU at once: more would each read less.
constexpr int64_t kPatchBlocks = 264;
constexpr int kStage = 64, kColumns = 16;
constexpr int patch_lanes(size_t accumulate_size) { return 32 * (16 / int(accumulate_size)); }

inline Patches::Cut patch_cut(int64_t lanes, int64_t rows, int lanes_of_block) {
  int64_t tiles = ceil_div(lanes, lanes_of_block), stages = ceil_div(rows, kStage);
  int64_t splits = kPatchBlocks / tiles < 1 ? 1 : kPatchBlocks / tiles;
  int64_t of_split = ceil_div(stages, splits);
  return {tiles, ceil_div(stages, of_split), of_split * kStage};
}

inline Patches patches_of(const GanLossArgs& a) {
  Patches p{};
  constexpr int64_t most = int64_t(1) << 30;  // 32 bits count pixels, and a stage beyond
  int64_t logits = a.out_height * a.out_width, image = a.height * a.width;
  int64_t last = 0;  // 32 bits are enough for every place in x too
  const int64_t size[4] = {a.batch, a.channels, a.height, a.width};
  for (int i = 0; i < 4; ++i) last += (size[i] - 1) * a.input.stride[i];
  p.columns = a.outputs * a.kernel_height * a.kernel_width, p.pixels = a.batch * image;
  // Products of all pixels with all taps: worth it where most are wanted, and are few beside the channels.
  // One or two logits a picture have gan_loss.cu's kernels, in which a block sums one.
  p.is_chosen = p.pixels > 0 && p.columns <= kColumns && a.channels >= 2 * p.columns && logits >= 16 &&
                4 * logits >= image && p.pixels <= most && a.channels <= most &&
                p.pixels * a.channels <= most && last <= most;
  if (!p.is_chosen) return p;
  p.offset = ceil_div(a.batch * a.outputs * logits, 16) * 16;
  int lanes = patch_lanes(a.dtype == Dtype::float64 ? 8 : 4);
  p.products = patch_cut(p.pixels, a.channels, lanes);
  p.weights = patch_cut(a.channels, p.pixels, lanes);
  return p;
}

// gan_loss_patches.cu. The forward's half leaves sums[split][column][pixel] in workspace, beyond the logits'
// own numbers; the backward's finds the gradients of the logits there.
const char* patch_products(const GanLossArgs& args, const Patches& patches, void* stream);
const char* patch_gradients(const GanLossArgs& args, const Patches& patches, void* stream);

namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// Quotient and remainder in 32 bits: 64 take several times as long, and a call. What is divided has been
// bounded on the host (too_large), but for the elements of the whole input.
FASTGAN_DEVICE int64_t split(int64_t index, int64_t size, int64_t& rest) {
  uint32_t quotient = uint32_t(index) / uint32_t(size);
  rest = int64_t(uint32_t(index) - quotient * uint32_t(size));
  return quotient;
}

template <class T>
FASTGAN_DEVICE T sum_of_warp(T value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// Of the whole block, in thread 0.
template <class T>
FASTGAN_DEVICE T sum_of_block(T value, T* memory) {
  int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  value = sum_of_warp(value);
  if (lane == 0) memory[warp] = value;
  block_sync();
  T sum = memory[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) sum += memory[i];
  return sum;
}

template <class S>
FASTGAN_DEVICE void bias_gradient(const GanLossArgs& a, int64_t k, double* memory) {
  using T = Accumulate<S>;
  const T* gradients = static_cast<const T*>(a.workspace);
  int64_t per_image = a.out_height * a.out_width;
  double sum = 0;
  for (int64_t place = threadIdx.x; place < a.batch * per_image; place += kThreads) {
    int64_t rest, n = split(place, per_image, rest);
    sum += double(gradients[(n * a.outputs + k) * per_image + rest]);
  }
  sum = sum_of_block(sum, memory);
  if (threadIdx.x == 0) narrow(static_cast<S*>(a.grad_bias)[k], T(sum));
}

}  // namespace
}  // namespace fastgan
