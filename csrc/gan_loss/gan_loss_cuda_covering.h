// One logit a picture, whose taps cover it (DCGAN's last convolution): pictures and weights in the same order
// of memory, dense, are vectors of one length. A logit is a dot product, grad_input an outer product, and the
// weights' gradient a sum over the pictures. The backward finds the logits' gradients where it needs them.
//
// A picture of 16 KB is read in one go by a block: what is waited for is memory's latency, once.
#pragma once
#include "gan_loss/gan_loss_cuda_losses.h"

namespace fastgan {
namespace {

template <class S>
constexpr int kVector = 16 / int(sizeof(S));
// Of a block, on the weights' gradient: vectors beside each other, and slices of the pictures.
constexpr int kVectorLanes = 16, kPictureSlices = kThreads / kVectorLanes;

inline int64_t length_of(const Args& a) { return a.channels * a.height * a.width; }

// Host: whether a call is of this kind.
template <class S>
bool covers(const Args& a) {
  constexpr int64_t bytes = 16;
  const int64_t channels_first[3] = {a.height * a.width, a.width, 1},
                channels_last[3] = {1, a.width * a.channels, a.channels};
  auto is = [](const int64_t* stride, const int64_t (&order)[3]) {
    return stride[1] == order[0] && stride[2] == order[1] && stride[3] == order[2];
  };
  auto all = [&](const int64_t (&order)[3]) {
    return is(a.input.stride, order) && is(a.weight.stride, order) &&
           (!a.grad_input || is(a.grad_input_stride, order));
  };
  return a.outputs == 1 && !a.padding[0] && !a.padding[1] && a.kernel_height == a.height &&
         a.kernel_width == a.width && (all(channels_first) || all(channels_last)) &&
         length_of(a) % kVector<S> == 0 && a.input.stride[0] % kVector<S> == 0 &&
         (!a.grad_input || a.grad_input_stride[0] % kVector<S> == 0) && is_aligned(a.input.data, bytes) &&
         is_aligned(a.weight.data, bytes) && is_aligned(a.grad_input, bytes);
}

// A block for each picture.
template <class S, class Loss>
__global__ void __launch_bounds__(kThreads, 2) covering_logits_kernel(Args a, int64_t length) {
  using T = Accumulate<S>;
  constexpr int V = kVector<S>;
  SharedMemory shared;
  T* memory = shared.take<T>(kWarps);
  const int64_t n = blockIdx.x;
  const S *x = static_cast<const S*>(a.input.data) + n * a.input.stride[0],
          *w = static_cast<const S*>(a.weight.data);
  T sum = 0;
#pragma unroll 4
  for (int64_t first = int64_t(threadIdx.x) * V; first < length; first += kThreads * V) {
    T values[V], weights[V];
    load_vector<V>(x + first, values);
    load_vector<V>(w + first, weights);
#pragma unroll
    for (int e = 0; e < V; ++e) sum = fma(values[e], weights[e], sum);
  }
  sum = sum_of_block(sum, memory);
  if (threadIdx.x == 0) finish<S, Loss>(a, place_of(a, n), n, sum);
}

// Blocks in the order of these.
struct CoveringTasks {
  int64_t weight_blocks, bias_blocks, picture_blocks;  // the last: of each picture
  int64_t length;
};

// A thread sums a vector over a slice of the pictures.
template <class S, class Loss>
FASTGAN_DEVICE void covering_weight_gradient(const Args& a, int64_t block, int64_t length,
                                             Accumulate<S>* memory) {
  using T = Accumulate<S>;
  constexpr int V = kVector<S>;
  const int thread = int(threadIdx.x), lane = thread % kVectorLanes, slice = thread / kVectorLanes;
  const int64_t first = (block * kVectorLanes + lane) * V;
  const S* x = static_cast<const S*>(a.input.data) + first;
  T sums[V] = {};
  for (int64_t n0 = 0; n0 < a.batch; n0 += kThreads) {
    block_sync();  // the former gradients may still be read
    if (n0 + thread < a.batch) memory[thread] = gradient_of<S, Loss>(a, n0 + thread, a.batch);
    block_sync();
    const int pictures = a.batch - n0 < kThreads ? int(a.batch - n0) : kThreads;
#pragma unroll 8
    for (int n = slice; n < pictures; n += kPictureSlices) {
      if (first >= length) break;
      T values[V];
      load_vector<V>(x + (n0 + n) * a.input.stride[0], values);
#pragma unroll
      for (int e = 0; e < V; ++e) sums[e] = fma(memory[n], values[e], sums[e]);
    }
  }
  block_sync();
#pragma unroll
  for (int e = 0; e < V; ++e) memory[(slice * kVectorLanes + lane) * V + e] = sums[e];
  block_sync();
  const int64_t at = block * kVectorLanes * V + thread;
  if (thread >= kVectorLanes * V || at >= length) return;
  T sum = 0;
#pragma unroll
  for (int s = 0; s < kPictureSlices; ++s) sum += memory[s * kVectorLanes * V + thread];
  store_weight_gradient<S>(a, tap_of(a, at), sum);  // it may lie in another order
}

template <class S, class Loss>
FASTGAN_DEVICE void covering_bias_gradient(const Args& a, double* memory) {
  double sum = 0;
  for (int64_t n = threadIdx.x; n < a.batch; n += kThreads)
    sum += double(gradient_of<S, Loss>(a, n, a.batch));
  sum = sum_of_block(sum, memory);
  if (threadIdx.x == 0) narrow(*static_cast<S*>(a.grad_bias), Accumulate<S>(sum));
}

template <class S, class Loss>
FASTGAN_DEVICE void covering_input_gradient(const Args& a, int64_t n, int64_t part, int64_t length) {
  using T = Accumulate<S>;
  constexpr int V = kVector<S>;
  const int64_t first = (part * kThreads + threadIdx.x) * V;
  if (first >= length) return;
  const T gradient = gradient_of<S, Loss>(a, n, a.batch);
  T values[V];
  load_vector<V>(static_cast<const S*>(a.weight.data) + first, values);
#pragma unroll
  for (int e = 0; e < V; ++e) values[e] *= gradient;
  store_global<V>(static_cast<S*>(a.grad_input) + n * a.grad_input_stride[0] + first, values);
}

template <class S>
constexpr int kCoveringMemory = kThreads * kVector<S>;

template <class S, class Loss>
__global__ void __launch_bounds__(kThreads, 2) covering_backward_kernel(Args a, CoveringTasks tasks) {
  SharedMemory shared;
  auto* memory = shared.take<Accumulate<S>>(kCoveringMemory<S>);
  double* of_warps = shared.take<double>(kWarps);
  int64_t block = blockIdx.x;
  if (block < tasks.weight_blocks) return covering_weight_gradient<S, Loss>(a, block, tasks.length, memory);
  block -= tasks.weight_blocks;
  if (block < tasks.bias_blocks) return covering_bias_gradient<S, Loss>(a, of_warps);
  int64_t part, n = split(block - tasks.bias_blocks, tasks.picture_blocks, part);
  covering_input_gradient<S, Loss>(a, n, part, tasks.length);
}

template <class S, class Loss>
const char* covering_backward(const Args& a, void* stream) {
  CoveringTasks tasks{};
  tasks.length = length_of(a);
  if (a.grad_weight) tasks.weight_blocks = ceil_div(tasks.length, kVectorLanes * kVector<S>);
  if (a.grad_bias) tasks.bias_blocks = 1;
  if (a.grad_input) tasks.picture_blocks = ceil_div(tasks.length, kThreads * kVector<S>);
  const size_t shared =
      SharedMemory::bytes<Accumulate<S>>(kCoveringMemory<S>) + SharedMemory::bytes<double>(kWarps);
  return launch(covering_backward_kernel<S, Loss>,
                tasks.weight_blocks + tasks.bias_blocks + a.batch * tasks.picture_blocks, kThreads, shared,
                stream, a, tasks);
}

}  // namespace
}  // namespace fastgan
