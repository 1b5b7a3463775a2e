// Cross-entropy of rows of logits on CUDA, in place: the loss, and the gradient of the logits where the
// logits were. Registers: at most 64, no spills (nvcc 13: sm_80, sm_90a, sm_100).
//
// A block of threads has a row: all of its classes (rows_kernel), or those of one block of classes, whose
// statistics go on from block to block in `state` (statistics_kernel), and then its gradient
// (gradient_kernel). Bytes: whole rows of float32 are read twice, the second time from the second-level cache
// as long as the rows at work fit (264 of 30,522 classes are 32 MB, of the 50 MB that an H100 has), and
// written once; a block of classes is read for the statistics, read for the gradient, and its 2-byte gradient
// written. 64 bytes a thread, 64 KB a multiprocessor, are on their way at a time: what 4 TB/s at 700 ns ask
// for is 21 KB. So rows should lie on 16 bytes: where they do not, entries are read one by one.
//
// Each thread keeps the largest entry that it has seen and the sum of exponentials below it, rescaled when a
// larger one comes (Milakov and Gimelshein, Online normalizer calculation for softmax, 2018); the block folds
// these in double, as is everything that there is one of a row: for a confident token lse - x[target] is a
// small difference of large numbers. No atomics: the bits are the same in every run.
//
// A narrower gradient may lie in the front half of the very row that it is made from: all threads have read
// their entries of a stretch of the row before any writes its results, which lie where entries of this
// stretch and earlier ones were.
//
// A target outside the classes is not looked for on the host, which would wait for the device: its loss is
// NaN, and so is its row's gradient.
#include "common/cuda_block.h"
#include "common/cuda_types.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace fastgan {
namespace {

constexpr int kUnroll = 4;  // vectors of a thread on their way at a time
constexpr int kRowThreads = 512, kBlockThreads = 256;
constexpr double kLog2e = 1.4426950408889634074;

template <class T>
constexpr int kWide = 16 / int(sizeof(T));  // entries of one access

template <class T>
struct Partial {
  T high, sum;  // of exp(x - high), or of exp(x) where nothing but -inf was seen
  double total;
};

// exp(x - shift) in the precision of T; 0 for x = -inf, NaN for NaN.
template <class T>
FASTGAN_DEVICE T exp_below(T x, T shift) {
  return quick_exp2((x - shift) * T(kLog2e));
}

template <class T>
FASTGAN_DEVICE T finite_shift(T high) {
  return high == -T(INFINITY) ? T(0) : high;
}

// The entries of a row from `begin` on: the bias added, and the target's lowered.
template <class T>
struct Entries {
  T* x;
  const T* bias;
  int64_t count;
  int64_t target;  // among these, or elsewhere
  T margin;

  template <class Args>
  FASTGAN_DEVICE Entries(const Args& a, int64_t begin, int64_t columns)
      : x(static_cast<T*>(a.logits) + int64_t(blockIdx.x) * a.stride),
        bias(a.bias ? static_cast<const T*>(a.bias) + begin : nullptr),
        count(columns),
        target(a.target[blockIdx.x] - begin),
        margin(a.margin ? static_cast<const T*>(a.margin)[blockIdx.x] : T(0)) {}

  FASTGAN_DEVICE T one(int64_t i, T value) const {
    if (i == target) value -= margin;
    return bias ? value + bias[i] : value;
  }
  // V from the i-th on; -inf beyond the last.
  template <int V>
  FASTGAN_DEVICE void load(int64_t i, T (&out)[V]) const {
    if (i + V <= count) {
      load_vector<V>(x + i, out);
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) out[k] = i + k < count ? x[i + k] : -T(INFINITY);
    }
    if (bias || margin != T(0)) {
#pragma unroll
      for (int k = 0; k < V; ++k)
        if (i + k < count) out[k] = one(i + k, out[k]);
    }
  }
};

// Sums and maxima of the whole block, in all threads.
template <bool kMaximum, int kThreads>
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
  for (int i = 1; i < kThreads / kWarp; ++i)
    out = kMaximum ? (memory[i] > out ? memory[i] : out) : out + memory[i];
  return out;
}

// Of a row's entries, or some of them.
struct Statistics {
  double high, sum, total;  // sum of exp(x - high); total only where it is asked for
};

FASTGAN_DEVICE double exp_double(double x, double high) { return exp2((x - high) * kLog2e); }

// Of a part that saw nothing but -inf the sum is 0, or NaN.
FASTGAN_DEVICE double sum_below(double high, double sum, double new_high) {
  return high == -double(INFINITY) ? sum : sum * exp_double(high, new_high);
}

template <int V, int kThreads, class T>
FASTGAN_DEVICE Statistics statistics_of(const Entries<T>& entries, bool wants_total, double* memory) {
  Partial<T> mine{-T(INFINITY), T(0), 0.0};
  for (int64_t start = 0; start < entries.count; start += kUnroll * V * kThreads) {
    T x[kUnroll][V];
    const int64_t first = start + int64_t(threadIdx.x) * V;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) entries.template load<V>(first + u * V * kThreads, x[u]);
    T high = mine.high;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int k = 0; k < V; ++k) high = x[u][k] > high ? x[u][k] : high;  // NaN is lost here, not in the sum
    const T shift = finite_shift(high);
    T sum = mine.sum * exp_below(mine.high, shift);  // at first 0 exp(-inf)
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int k = 0; k < V; ++k) sum += exp_below(x[u][k], shift);
    mine.high = high, mine.sum = sum;
    if (wants_total) {
      T part = 0;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int k = 0; k < V; ++k)
          if (first + u * V * kThreads + k < entries.count) part += x[u][k];
      mine.total += double(part);
    }
  }
  Statistics out;
  out.high = fold<true, kThreads>(double(mine.high), memory);
  out.sum = fold<false, kThreads>(sum_below(double(mine.high), double(mine.sum), out.high), memory);
  out.total = wants_total ? fold<false, kThreads>(mine.total, memory) : 0;
  return out;
}

// What of a whole row's statistics the loss and the gradient need.
struct Finished {
  double loss;
  double factor;  // of exp(x - high) in the gradient
};

FASTGAN_DEVICE Finished finish(const Statistics& s, double at_target, bool exists, int64_t classes,
                               double smoothing, double z) {
  const double nan = double(NAN), sum = s.high == double(INFINITY) ? nan : s.sum;  // as inf - inf is
  const double lse = exists ? s.high + log(sum) : nan;
  double loss = lse - at_target;
  if (smoothing != 0) loss = (1 - smoothing) * loss + smoothing * (lse - s.total / double(classes));
  if (z != 0) loss += z * lse * lse;
  return {loss, (1 + (z != 0 ? 2 * z * lse : 0.0)) * (exists ? 1 / sum : nan)};
}

// gradient (exp(x - high) factor - smoothing / classes - [target] (1 - smoothing)) for all entries; the
// target's also to `at_target`, if it is given.
template <int V, int kThreads, class T, class S>
FASTGAN_DEVICE void write_gradient(const Entries<T>& entries, S* out, double high, double factor,
                                   double gradient, int64_t classes, double smoothing, double* at_target) {
  const T shift = finite_shift(T(high)), scale = T(gradient * factor),
          offset = T(gradient * smoothing / double(classes)), whole = T(gradient * (1 - smoothing));
  for (int64_t start = 0; start < entries.count; start += kUnroll * V * kThreads) {
    T x[kUnroll][V];
    const int64_t first = start + int64_t(threadIdx.x) * V;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) entries.template load<V>(first + u * V * kThreads, x[u]);
    if constexpr (sizeof(S) != sizeof(T)) block_sync();
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = first + u * V * kThreads;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        T value = exp_below(x[u][k], shift) * scale - offset;
        if (i + k == entries.target && i + k < entries.count) {
          value -= whole;
          if (at_target) *at_target = double(value);
        }
        x[u][k] = value;
      }
      if (i + V <= entries.count) {
        store_vector<V>(out + i, x[u]);
      } else {
#pragma unroll
        for (int k = 0; k < V; ++k)
          if (i + k < entries.count) narrow(out[i + k], x[u][k]);
      }
    }
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kRowThreads, 2) rows_kernel(LinearCrossEntropyRows a) {
  SharedMemory shared;
  double* memory = shared.take<double>(kRowThreads / kWarp);
  const int64_t row = blockIdx.x;
  const Entries<T> entries(a, 0, a.classes);
  const bool exists = entries.target >= 0 && entries.target < a.classes;
  const Statistics s = statistics_of<V, kRowThreads>(entries, a.smoothing != 0, memory);
  const double at_target = exists ? double(entries.one(entries.target, entries.x[entries.target])) : 0;
  const Finished finished = finish(s, at_target, exists, a.classes, a.smoothing, a.z);
  if (a.loss && threadIdx.x == 0) static_cast<T*>(a.loss)[row] = T(finished.loss);
  if (!a.gradient) return;
  block_sync();  // all have read the target's entry
  write_gradient<V, kRowThreads>(entries, entries.x, s.high, finished.factor,
                                 double(static_cast<const T*>(a.gradient)[row]), a.classes, a.smoothing,
                                 nullptr);
}

template <class T, int V>
__global__ void __launch_bounds__(kBlockThreads, 4) statistics_kernel(LinearCrossEntropyBlock a) {
  SharedMemory shared;
  double* memory = shared.take<double>(kBlockThreads / kWarp);
  const int64_t row = blockIdx.x;
  const Entries<T> entries(a, a.begin, a.columns);
  Statistics s = statistics_of<V, kBlockThreads>(entries, a.smoothing != 0, memory);
  if (threadIdx.x != 0) return;
  double* state = a.state + row * kLinearCrossEntropyState;
  double at_target = 0;
  if (entries.target >= 0 && entries.target < a.columns)
    at_target = double(entries.one(entries.target, entries.x[entries.target]));
  if (a.begin != 0) {
    const double high = state[0] > s.high ? state[0] : s.high;
    s.sum = sum_below(s.high, s.sum, high) + sum_below(state[0], state[1], high);
    s.high = high;
    s.total += state[2];
    at_target += state[3];
  }
  if (a.begin + a.columns == a.classes) {
    const int64_t target = a.target[row];
    const Finished finished =
        finish(s, at_target, target >= 0 && target < a.classes, a.classes, a.smoothing, a.z);
    if (a.loss) static_cast<T*>(a.loss)[row] = T(finished.loss);
    s.sum = finished.factor;
  }
  state[0] = s.high, state[1] = s.sum, state[2] = s.total, state[3] = at_target;
}

template <class T, class S, int V>
__global__ void __launch_bounds__(kBlockThreads, 4) gradient_kernel(LinearCrossEntropyBlock a) {
  const int64_t row = blockIdx.x;
  const Entries<T> entries(a, a.begin, a.columns);
  double* state = a.state + row * kLinearCrossEntropyState;
  write_gradient<V, kBlockThreads>(entries, static_cast<S*>(a.out) + row * a.out_stride, state[0], state[1],
                                   double(static_cast<const T*>(a.gradient)[row]), a.classes, a.smoothing,
                                   state + 3);
}

template <class T>
bool is_wide(const void* x, int64_t stride) {
  return is_aligned(x, 16) && stride % kWide<T> == 0;
}

template <class T>
Error launch_rows(const LinearCrossEntropyRows& a, void* stream) {
  auto kernel = is_wide<T>(a.logits, a.stride) ? rows_kernel<T, kWide<T>> : rows_kernel<T, 1>;
  return launch(kernel, a.rows, kRowThreads, SharedMemory::bytes<double>(kRowThreads / kWarp), stream, a);
}

template <class T>
Error launch_statistics(const LinearCrossEntropyBlock& a, void* stream) {
  auto kernel = is_wide<T>(a.logits, a.stride) ? statistics_kernel<T, kWide<T>> : statistics_kernel<T, 1>;
  return launch(kernel, a.rows, kBlockThreads, SharedMemory::bytes<double>(kBlockThreads / kWarp), stream, a);
}

template <class T, class S>
Error launch_gradient(const LinearCrossEntropyBlock& a, void* stream) {
  const bool wide = is_wide<T>(a.logits, a.stride) && is_aligned(a.out, int64_t(sizeof(S)) * kWide<T>) &&
                    a.out_stride % kWide<T> == 0;
  auto kernel = wide ? gradient_kernel<T, S, kWide<T>> : gradient_kernel<T, S, 1>;
  return launch(kernel, a.rows, kBlockThreads, 0, stream, a);
}

}  // namespace
}  // namespace fastgan

extern "C" const char* fastgan_linear_cross_entropy_rows_cuda(const fastgan::LinearCrossEntropyRows& args,
                                                              void* stream) {
  using namespace fastgan;
  if (args.classes == 0) return nullptr;
  return args.dtype == Dtype::float64 ? launch_rows<double>(args, stream) : launch_rows<float>(args, stream);
}

extern "C" const char* fastgan_linear_cross_entropy_statistics_cuda(
    const fastgan::LinearCrossEntropyBlock& args, void* stream) {
  return fastgan::launch_statistics<float>(args, stream);
}

extern "C" const char* fastgan_linear_cross_entropy_gradient_cuda(
    const fastgan::LinearCrossEntropyBlock& args, void* stream) {
  using namespace fastgan;
  if (args.out_dtype == Dtype::bfloat16) return launch_gradient<float, bfloat16>(args, stream);
  if (args.out_dtype == Dtype::float16) return launch_gradient<float, float16>(args, stream);
  return launch_gradient<float, float>(args, stream);
}
