// Cross-entropy of rows of logits on CUDA, in place: the loss, and the gradient of the logits where the
// logits were. Registers: at most 64, no spills (nvcc 13: sm_80, sm_90a, sm_100).
//
// A block has a row. It reads the row twice and writes it once; in between the row stays in the second-level
// cache (132 blocks of 50,257 floats are 27 MB, of the 50 MB that an H100 has), so that memory sees one
// reading and one writing, and cuBLAS's product before it may have left the row there. Each thread keeps the
// largest entry that it has seen and the sum of exponentials below it, rescaled when a larger one comes
// (Milakov and Gimelshein, Online normalizer calculation for softmax, 2018); the block folds these in double,
// as is everything that there is one of a row: for a confident token lse - x[target] is a small difference of
// large numbers. No atomics: the bits are the same in every run.
//
// A target outside the classes is not looked for on the host, which would wait for the device: its loss is
// NaN, and so is its row's gradient.
#include "common/cuda_block.h"
#include "common/cuda_types.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace fastgan {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr double kLog2e = 1.4426950408889634074;

using Args = LinearCrossEntropyRows;

template <class T>
struct Partial {
  T high, sum;  // of exp(x - high)
};

// exp(x - shift) in the precision of T; 0 for x = -inf, NaN for NaN.
template <class T>
FASTGAN_DEVICE T exp_below(T x, T shift) {
  return quick_exp2((x - shift) * T(kLog2e));
}

// A row's entry: the bias added, and the target's lowered.
template <class T>
struct Entries {
  const T* x;
  const T* bias;
  int64_t target;
  T margin;
  FASTGAN_DEVICE T operator()(int64_t i) const {
    T value = x[i];
    if (i == target) value -= margin;
    return bias ? value + bias[i] : value;
  }
};

template <class T>
FASTGAN_DEVICE void add(Partial<T>& to, T x) {
  if (x > to.high) {
    to.sum = to.sum * exp_below(to.high, x) + T(1);  // at first 0 exp(-inf)
    to.high = x;
  } else if (x <= to.high) {
    if (x != -T(INFINITY)) to.sum += exp_below(x, to.high);
  } else {
    to.sum += x;  // NaN, which the maximum has lost
  }
}

// Sums and maxima of the whole block, in all threads.
template <bool kMaximum>
FASTGAN_DEVICE double fold(double value, double* memory) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    double other = shuffle_xor(value, mask);
    value = kMaximum ? (other > value ? other : value) : value + other;
  }
  block_sync();  // the last fold's numbers have been read
  if (int(threadIdx.x) % kWarp == 0) memory[int(threadIdx.x) / kWarp] = value;
  block_sync();
  double out = memory[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) out = kMaximum ? (memory[i] > out ? memory[i] : out) : out + memory[i];
  return out;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) rows_kernel(Args a) {
  SharedMemory shared;
  double* memory = shared.take<double>(kWarps);
  const int64_t row = blockIdx.x;
  T* x = static_cast<T*>(a.logits) + row * a.stride;
  const int64_t target = a.target[row];
  const bool exists = target >= 0 && target < a.classes;
  const Entries<T> entries{x, static_cast<const T*>(a.bias), target,
                           a.margin ? static_cast<const T*>(a.margin)[row] : T(0)};
  Partial<T> mine{-T(INFINITY), T(0)};
  double total = 0;
  T part = 0;
  int count = 0;
  for (int64_t i = threadIdx.x; i < a.classes; i += kThreads) {
    T value = entries(i);
    add(mine, value);
    if (a.smoothing != 0) {
      part += value;
      if (++count % 64 == 0) total += double(part), part = 0;  // chains of 64 additions in T
    }
  }
  total += double(part);
  const double at_target = exists ? double(entries(target)) : 0;
  const double high = fold<true>(double(mine.high), memory);
  // Of a thread that saw nothing but -inf the sum is 0, or NaN.
  const double scale = mine.high == -T(INFINITY) ? 1.0 : exp2((double(mine.high) - high) * kLog2e);
  double sum = fold<false>(double(mine.sum) * scale, memory);
  if (high == double(INFINITY)) sum = double(NAN);  // as inf - inf is
  if (a.smoothing != 0) total = fold<false>(total, memory);
  const double nan = double(NAN), lse = exists ? high + log(sum) : nan;
  if (a.loss && threadIdx.x == 0) {
    double loss = lse - at_target;
    if (a.smoothing != 0) loss = (1 - a.smoothing) * loss + a.smoothing * (lse - total / double(a.classes));
    static_cast<T*>(a.loss)[row] = T(loss + (a.z != 0 ? a.z * lse * lse : 0.0));
  }
  if (!a.gradient) return;
  block_sync();  // all have read the target's entry
  const double gradient = double(static_cast<const T*>(a.gradient)[row]);
  // About the row's maximum, whose exponential is 1: of the sum only a factor remains.
  const T factor = T(gradient * (1 + (a.z != 0 ? 2 * a.z * lse : 0.0)) * (exists ? 1 / sum : nan));
  const T shift = high == -double(INFINITY) ? T(0) : T(high),
          offset = T(gradient * a.smoothing / double(a.classes)), whole = T(gradient * (1 - a.smoothing));
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < a.classes; i += kThreads) {
    T out = exp_below(entries(i), shift) * factor - offset;
    x[i] = i == target ? out - whole : out;
  }
}

}  // namespace
}  // namespace fastgan

extern "C" const char* fastgan_linear_cross_entropy_rows_cuda(const fastgan::LinearCrossEntropyRows& args,
                                                              void* stream) {
  using namespace fastgan;
  const size_t shared = SharedMemory::bytes<double>(kWarps);
  if (args.classes == 0) return nullptr;
  if (args.dtype == Dtype::float64)
    return launch(rows_kernel<double>, args.rows, kThreads, shared, stream, args);
  return launch(rows_kernel<float>, args.rows, kThreads, shared, stream, args);
}
