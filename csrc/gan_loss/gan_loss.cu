// A discriminator's last convolution with its loss on CUDA. Registers: at most 96, no spills (nvcc 13: sm_80,
// sm_90a, sm_100).
//
// Where there are many logits a picture (a PatchGAN's head), the convolution's part is in
// gan_loss_patches.cu. Otherwise there are few, and each is a long dot product (8,192 products for DCGAN's
// 4x4 over 512 channels), so that reading the input once is the time that it must take; the weights stay in
// the cache. DCGAN's own, one logit whose taps are the whole picture, goes by gan_loss_cuda_covering.h.
//
// Forward. A whole block shares a logit where there are few, a warp each where there are many. Lanes go along
// whatever is contiguous in the input: channels (channels_last) or taps. The logit goes through the loss as
// soon as it is summed; a second launch of one block adds the losses in double, in one order.
//
// Backward. First the gradients of all logits. Then one launch whose blocks have three tasks: a thread for
// each element of grad_input gathers over the outputs that saw it; 32 neighbouring weights, eight threads
// each, sum over images and outputs; a block for each bias.
//
// No atomics: the bits are the same in every run. The loss of the rounded logit is taken, the one that is
// returned. Targets outside [0, 1] are not looked for here: telling the host would make it wait for the
// device.
#include "gan_loss/gan_loss_cuda_covering.h"

namespace fastgan {
namespace {

constexpr int64_t kFewLogits = 4096;       // up to which a block has one logit
constexpr int kPatchLogits = 64;           // threads of a block, where each gathers a logit
constexpr int kSlices = kThreads / kWarp;  // of the sum of a weight's gradient

template <class S>
FASTGAN_DEVICE Accumulate<S> input_at(const Args& a, int64_t n, int64_t c, int64_t y, int64_t x) {
  if (y < 0 || y >= a.height || x < 0 || x >= a.width) return 0;
  const int64_t* s = a.input.stride;
  return widen(static_cast<const S*>(a.input.data)[n * s[0] + c * s[1] + y * s[2] + x * s[3]]);
}
template <class S>
FASTGAN_DEVICE Accumulate<S> weight_at(const Args& a, int64_t k, int64_t c, int64_t i, int64_t j) {
  const int64_t* s = a.weight.stride;
  return widen(static_cast<const S*>(a.weight.data)[k * s[0] + c * s[1] + i * s[2] + j * s[3]]);
}

// ---- forward ----

// The dot product of one logit, a lane's part: elements `first`, `first` + `step`, ... of (C, kh, kw) in the
// order that the input has in memory.
template <class S>
FASTGAN_DEVICE Accumulate<S> dot(const Args& a, const Place& p, int first, int step) {
  using T = Accumulate<S>;
  T sum = 0;
  int64_t y0 = p.y * a.stride[0] - a.padding[0], x0 = p.x * a.stride[1] - a.padding[1];
  if (a.input.stride[1] == 1 && a.channels > 1) {
    for (int64_t i = 0; i < a.kernel_height; ++i)
      for (int64_t j = 0; j < a.kernel_width; ++j)
#pragma unroll 4
        for (int64_t c = first; c < a.channels; c += step)
          sum = fma(input_at<S>(a, p.n, c, y0 + i, x0 + j), weight_at<S>(a, p.k, c, i, j), sum);
    return sum;
  }
  int64_t all = a.channels * a.kernel_height * a.kernel_width;
#pragma unroll 4
  for (int64_t t = first; t < all; t += step) {
    int64_t i, j, c = split(split(t, a.kernel_width, j), a.kernel_height, i);
    sum = fma(input_at<S>(a, p.n, c, y0 + i, x0 + j), weight_at<S>(a, p.k, c, i, j), sum);
  }
  return sum;
}

// W warps a logit: all of the block, or one.
template <class S, class Loss, int W>
__global__ void __launch_bounds__(kThreads, 2) logits_kernel(Args a, int64_t count) {
  using T = Accumulate<S>;
  SharedMemory shared;
  T* memory = W > 1 ? shared.take<T>(kWarps) : nullptr;
  int thread = int(threadIdx.x), part = thread % (W * kWarp);
  int64_t logit = int64_t(blockIdx.x) * (kWarps / W) + thread / (W * kWarp);
  bool is_inside = logit < count;
  Place p = place_of(a, is_inside ? logit : 0);
  T sum = is_inside ? dot<S>(a, p, part, W * kWarp) : T(0);
  sum = W > 1 ? sum_of_block(sum, memory) : sum_of_warp(sum);
  if (!is_inside || part != 0) return;
  finish<S, Loss>(a, p, logit, sum);
}

// The same from what patch_products left: a thread a logit, which gathers its taps' products.
template <class S, class Loss>
__global__ void __launch_bounds__(kPatchLogits) patch_logits_kernel(Args a, Patches patches, int64_t count) {
  using T = Accumulate<S>;
  int64_t logit = int64_t(blockIdx.x) * kPatchLogits + threadIdx.x;
  if (logit >= count) return;
  Place p = place_of(a, logit);
  const T* products = static_cast<const T*>(a.workspace) + patches.offset;
  int64_t y0 = p.y * a.stride[0] - a.padding[0], x0 = p.x * a.stride[1] - a.padding[1];
  int taps = int(a.kernel_height * a.kernel_width);
  T sum = 0;
  for (int64_t split_of = 0; split_of < patches.products.splits; ++split_of) {
    const T* from = products + (split_of * patches.columns + p.k * taps) * patches.pixels;
#pragma unroll 8
    for (int t = 0; t < taps; ++t) {
      int64_t j, i = split(t, a.kernel_width, j), y = y0 + i, x = x0 + j;
      bool is_inside = y >= 0 && y < a.height && x >= 0 && x < a.width;
      sum += is_inside ? from[t * patches.pixels + (p.n * a.height + y) * a.width + x] : T(0);
    }
  }
  finish<S, Loss>(a, p, logit, sum);
}

template <class S>
__global__ void __launch_bounds__(kThreads, 2) loss_kernel(Args a, int64_t count) {
  using T = Accumulate<S>;
  SharedMemory shared;
  double* memory = shared.take<double>(kWarps);
  double sum = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += kThreads)
    sum += double(static_cast<const T*>(a.workspace)[i]);
  sum = sum_of_block(sum, memory);
  if (threadIdx.x != 0) return;
  if (a.reduction == Reduction::mean) sum /= double(count);
  if (a.loss_accumulates)
    *static_cast<T*>(a.loss_value) = T(sum);
  else
    narrow(*static_cast<S*>(a.loss_value), T(sum));
}

// ---- backward ----

template <class S, class Loss>
__global__ void __launch_bounds__(kThreads, 2) gradient_kernel(Args a, int64_t count) {
  using T = Accumulate<S>;
  int64_t logit = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (logit >= count) return;
  static_cast<T*>(a.workspace)[logit] = gradient_of<S, Loss>(a, logit, count);
}

// How many blocks have which task; those of the biases come last.
struct Tasks {
  int64_t input_blocks, weight_blocks, bias_blocks;
};

template <class S>
FASTGAN_DEVICE void input_gradient(const Args& a, int64_t block) {
  using T = Accumulate<S>;
  const T* gradients = static_cast<const T*>(a.workspace);
  // A block has a part of one image.
  int64_t per_image = a.channels * a.height * a.width,
          blocks = (uint32_t(per_image) + kThreads - 1) / kThreads, part, n, c, y, x;
  n = split(block, blocks, part);
  int64_t index = part * kThreads + threadIdx.x;
  if (index >= per_image) return;
  const int64_t* s = a.grad_input_stride;
  if (s[1] == 1 && a.channels > 1)
    y = split(split(index, a.channels, c), a.width, x);
  else
    c = split(split(index, a.width, x), a.height, y);
  // Outputs that saw this pixel: row * stride + tap = y + padding with a tap inside the kernel.
  int64_t above = y + a.padding[0], left = x + a.padding[1], rest;
  int64_t last_row = split(above, a.stride[0], rest), last_column = split(left, a.stride[1], rest);
  if (last_row >= a.out_height) last_row = a.out_height - 1;
  if (last_column >= a.out_width) last_column = a.out_width - 1;
  T sum = 0;
  for (int64_t k = 0; k < a.outputs; ++k)
    for (int64_t row = last_row; row >= 0; --row) {
      int64_t i = above - row * a.stride[0];
      if (i >= a.kernel_height) break;
      for (int64_t column = last_column; column >= 0; --column) {
        int64_t j = left - column * a.stride[1];
        if (j >= a.kernel_width) break;
        T gradient = gradients[((n * a.outputs + k) * a.out_height + row) * a.out_width + column];
        sum = fma(gradient, weight_at<S>(a, k, c, i, j), sum);
      }
    }
  narrow(static_cast<S*>(a.grad_input)[n * s[0] + c * s[1] + y * s[2] + x * s[3]], sum);
}

template <class S>
FASTGAN_DEVICE void weight_gradient(const Args& a, int64_t block, Accumulate<S>* memory) {
  using T = Accumulate<S>;
  const T* gradients = static_cast<const T*>(a.workspace);
  int lane = int(threadIdx.x) % kWarp, slice = int(threadIdx.x) / kWarp;
  int64_t index = block * kWarp + lane;
  bool is_inside = index < a.outputs * a.channels * a.kernel_height * a.kernel_width;
  Tap t{};
  T sum = 0;
  if (is_inside) {
    t = tap_of(a, index);
    int64_t places = a.batch * a.out_height * a.out_width;
#pragma unroll 4
    for (int64_t place = slice; place < places; place += kSlices) {
      int64_t y, x, n = split(split(place, a.out_width, x), a.out_height, y);
      T gradient = gradients[((n * a.outputs + t.k) * a.out_height + y) * a.out_width + x];
      T value =
          input_at<S>(a, n, t.c, y * a.stride[0] + t.i - a.padding[0], x * a.stride[1] + t.j - a.padding[1]);
      sum = fma(gradient, value, sum);
    }
  }
  memory[threadIdx.x] = sum;
  block_sync();
  if (slice != 0 || !is_inside) return;
#pragma unroll
  for (int other = 1; other < kSlices; ++other) sum += memory[other * kWarp + lane];
  store_weight_gradient<S>(a, t, sum);
}

template <class S>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(Args a, Tasks tasks) {
  SharedMemory shared;
  Accumulate<S>* memory = shared.take<Accumulate<S>>(kThreads);
  double* of_warps = shared.take<double>(kWarps);
  int64_t block = blockIdx.x;
  if (block < tasks.input_blocks) return input_gradient<S>(a, block);
  block -= tasks.input_blocks;
  if (block < tasks.weight_blocks) return weight_gradient<S>(a, block, memory);
  bias_gradient<S>(a, block - tasks.weight_blocks, of_warps);
}

// ---- host ----

int64_t count_of(const Args& a) { return a.batch * a.outputs * a.out_height * a.out_width; }

bool too_large(const Args& a) {
  int64_t most = 0x7fffffff, weights = a.outputs * a.channels * a.kernel_height * a.kernel_width;
  int64_t image = a.channels * a.height * a.width;
  return weights > most || image > most || count_of(a) > most;
}

template <class S, class Loss>
Error forward(const Args& a, void* stream) {
  using T = Accumulate<S>;
  int64_t count = count_of(a);
  size_t shared = SharedMemory::bytes<T>(kWarps);
  const bool covering = covers<S>(a);
  Patches patches = patches_of(a);
  Error error = patches.is_chosen ? patch_products(a, patches, stream) : nullptr;
  if (error) return error;
  if (patches.is_chosen)
    error = launch(patch_logits_kernel<S, Loss>, ceil_div(count, kPatchLogits), kPatchLogits, 0, stream, a,
                   patches, count);
  else if (covering)
    error = launch(covering_logits_kernel<S, Loss>, count, kThreads, shared, stream, a, length_of(a));
  else if (count <= kFewLogits)
    error = launch(logits_kernel<S, Loss, kWarps>, count, kThreads, shared, stream, a, count);
  else
    error = launch(logits_kernel<S, Loss, 1>, ceil_div(count, kWarps), kThreads, 0, stream, a, count);
  if (error || a.reduction == Reduction::none) return error;
  return launch(loss_kernel<S>, 1, kThreads, SharedMemory::bytes<double>(kWarps), stream, a, count);
}

template <class S, class Loss>
Error backward(const Args& a, void* stream) {
  using T = Accumulate<S>;
  int64_t count = count_of(a);
  if (covers<S>(a)) return covering_backward<S, Loss>(a, stream);
  Error error = launch(gradient_kernel<S, Loss>, ceil_div(count, kThreads), kThreads, 0, stream, a, count);
  if (error) return error;
  Patches patches = patches_of(a);
  if (patches.is_chosen) return patch_gradients(a, patches, stream);
  Tasks tasks{};
  if (a.grad_input) tasks.input_blocks = a.batch * ceil_div(a.channels * a.height * a.width, kThreads);
  if (a.grad_weight)
    tasks.weight_blocks = ceil_div(a.outputs * a.channels * a.kernel_height * a.kernel_width, kWarp);
  if (a.grad_bias) tasks.bias_blocks = a.outputs;
  size_t shared = SharedMemory::bytes<T>(kThreads) + SharedMemory::bytes<double>(kWarps);
  return launch(backward_kernel<S>, tasks.input_blocks + tasks.weight_blocks + tasks.bias_blocks, kThreads,
                shared, stream, a, tasks);
}

template <class S, class Loss>
Error run(const Args& a, void* stream, bool is_backward) {
  return is_backward ? backward<S, Loss>(a, stream) : forward<S, Loss>(a, stream);
}

template <class S>
Error by_loss(const Args& a, void* stream, bool is_backward) {
  switch (a.loss) {
    case GanLoss::bce:
      return run<S, Bce>(a, stream, is_backward);
    case GanLoss::hinge:
      return run<S, Hinge>(a, stream, is_backward);
    case GanLoss::lsgan:
      return run<S, LeastSquares>(a, stream, is_backward);
    case GanLoss::wasserstein:
      return run<S, Wasserstein>(a, stream, is_backward);
  }
  return "no such loss";
}

Error by_dtype(const Args& a, void* stream, bool is_backward) {
  if (too_large(a)) return "an image, the weights and the logits must each have fewer than 2^31 elements";
  switch (a.dtype) {
    case Dtype::float32:
      return by_loss<float>(a, stream, is_backward);
    case Dtype::float64:
      return by_loss<double>(a, stream, is_backward);
    case Dtype::bfloat16:
      return by_loss<bfloat16>(a, stream, is_backward);
    case Dtype::float16:
      return by_loss<float16>(a, stream, is_backward);
  }
  return "no such dtype";
}

}  // namespace
}  // namespace fastgan

extern "C" const char* fastgan_gan_loss_forward_cuda(const fastgan::GanLossArgs& args, void* stream) {
  return fastgan::by_dtype(args, stream, false);
}

extern "C" int64_t fastgan_gan_loss_workspace_cuda(const fastgan::GanLossArgs& args, bool is_backward) {
  using namespace fastgan;
  int64_t count = count_of(args);
  Patches p = patches_of(args);
  if (!p.is_chosen) return count;
  int64_t sums = is_backward ? p.weights.splits * args.channels : p.products.splits * p.pixels;
  return p.offset + p.columns * sums;
}

extern "C" const char* fastgan_gan_loss_backward_cuda(const fastgan::GanLossArgs& args, void* stream) {
  return fastgan::by_dtype(args, stream, true);
}
