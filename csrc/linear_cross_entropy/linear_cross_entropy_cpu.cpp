// Cross-entropy of rows of logits, in place: the loss, and the gradient of the logits where the logits were.
//
// A row is read twice, and stays in the second-level cache in between (50,257 floats are 200 KB). The first
// reading goes block by block: the block's maximum, with the bias added; then e = exp(x - m), m the largest
// entry so far, which is stored over x and summed. When a later block raises m, the sum is rescaled, the
// entries are not: each block's own m is remembered, and the second reading multiplies by exp(m_block - lse),
// so that each entry costs one exponential where softmax and its backward cost two. What underflows in e has
// m_block at most the row's maximum, so it underflows in the softmax too.
//
// A block's sum is kept in the lanes of one vector and folded into a double, as is everything that there is
// one of a row: for a confident token lse - x[target] is a small difference of large numbers. A block of
// nothing but -inf has no maximum to subtract (-inf minus -inf is NaN): it becomes zeros. A NaN is lost by
// the maximum, but not by the sum. Rows are whole pieces of work: the same bits for every number of threads.
#include "linear_cross_entropy/linear_cross_entropy.h"

#include "common/vector.h"

namespace fastgan {
namespace {

constexpr int64_t kMostBlocks = 256;  // a row's maxima, on the stack
constexpr int64_t kLeastBlock = 1024;

template <class T>
struct Row {
  T* x;
  int64_t classes;
  const T* bias;
};

// Adds the bias, and gives the block's maximum (NaN counts as nothing) and, for label smoothing, its sum.
template <class T>
FASTGAN_INLINE T block_maximum(const Row<T>& row, int64_t begin, int64_t end, double* total) {
  constexpr int64_t n = lanes<T>;
  const T kLowest = -T(INFINITY);
  Vec<T> high = splat<T>(kLowest), sums = splat<T>(0);
  int64_t i = begin;
  for (; i + n <= end; i += n) {
    Vec<T> x = load<T>(row.x + i);
    if (row.bias) {
      x += load<T>(row.bias + i);
      store(row.x + i, x);
    }
    high = max(x, high);
    if (total) sums += x;
  }
  T out = maximum<T>(high);
  if (total) *total += double(sum<T>(sums));
  for (; i < end; ++i) {
    T x = row.x[i];
    if (row.bias) row.x[i] = x += row.bias[i];
    out = x > out ? x : out;
    if (total) *total += double(x);
  }
  return out;
}

// Sum of exp(x - high), which are stored over x if they will be needed.
template <class T>
FASTGAN_INLINE double block_exponentials(const Row<T>& row, int64_t begin, int64_t end, T high, bool keep) {
  constexpr int64_t n = lanes<T>;
  const Vec<T> shift = splat<T>(high);
  Vec<T> sums = splat<T>(0);
  int64_t i = begin;
  if (keep) {
    for (; i + n <= end; i += n) {
      Vec<T> e = exp(load<T>(row.x + i) - shift);
      store(row.x + i, e);
      sums += e;
    }
  } else {
    for (; i + n <= end; i += n) sums += exp(load<T>(row.x + i) - shift);
  }
  if (i < end) {
    // the lanes beyond the end must not count
    T rest[lanes<T>];
    store(rest, exp(load_partial<T>(row.x + i, int(end - i)) - shift));
    double total = double(sum<T>(sums));
    for (int64_t j = 0; i + j < end; ++j) {
      total += double(rest[j]);
      if (keep) row.x[i + j] = rest[j];
    }
    return total;
  }
  return double(sum<T>(sums));
}

template <class T>
FASTGAN_INLINE void block_gradient(const Row<T>& row, int64_t begin, int64_t end, T scale, T offset) {
  constexpr int64_t n = lanes<T>;
  int64_t i = begin;
  for (; i + n <= end; i += n) store(row.x + i, load<T>(row.x + i) * scale - offset);
  for (; i < end; ++i) row.x[i] = row.x[i] * scale - offset;
}

template <class T>
void one_row(const LinearCrossEntropyRows& a, int64_t r) {
  const Row<T> row{static_cast<T*>(a.logits) + r * a.stride, a.classes, static_cast<const T*>(a.bias)};
  const int64_t target = a.target[r];
  if (a.margin) row.x[target] -= static_cast<const T*>(a.margin)[r];
  const double at_target = double(row.x[target] + (row.bias ? row.bias[target] : T(0)));

  const int64_t even = ((a.classes + kMostBlocks - 1) / kMostBlocks + 63) / 64 * 64;
  const int64_t block = even > kLeastBlock ? even : kLeastBlock;
  T maxima[kMostBlocks];
  T high = -T(INFINITY);
  double exponentials = 0, total = 0;
  for (int64_t begin = 0, b = 0; begin < a.classes; begin += block, ++b) {
    const int64_t end = begin + block < a.classes ? begin + block : a.classes;
    const T here = block_maximum(row, begin, end, a.smoothing != 0 ? &total : nullptr);
    if (here > high) {
      exponentials *= std::exp(double(high) - double(here));  // at first 0 * exp(-inf)
      high = here;
    }
    // Only -inf (or NaN) so far: exp(x - 0) is 0 (or NaN), whatever comes after.
    maxima[b] = high == -T(INFINITY) ? T(0) : high;
    exponentials += block_exponentials(row, begin, end, maxima[b], a.gradient != nullptr);
  }
  const double lse = double(high) + std::log(exponentials);
  if (a.loss) {
    double loss = lse - at_target;
    if (a.smoothing != 0) loss = (1 - a.smoothing) * loss + a.smoothing * (lse - total / double(a.classes));
    static_cast<T*>(a.loss)[r] = T(loss + (a.z != 0 ? a.z * lse * lse : 0.0));
  }
  if (!a.gradient) return;
  const double gradient = double(static_cast<const T*>(a.gradient)[r]);
  const double factor = gradient * (1 + (a.z != 0 ? 2 * a.z * lse : 0.0));
  const T offset = T(gradient * a.smoothing / double(a.classes));
  for (int64_t begin = 0, b = 0; begin < a.classes; begin += block, ++b) {
    const int64_t end = begin + block < a.classes ? begin + block : a.classes;
    block_gradient(row, begin, end, T(factor * std::exp(double(maxima[b]) - lse)), offset);
  }
  row.x[target] -= T(gradient * (1 - a.smoothing));
}

}  // namespace
}  // namespace fastgan

extern "C" void FASTGAN_KERNEL(linear_cross_entropy_rows)(const fastgan::LinearCrossEntropyRows& a,
                                                          const fastgan::Threads& threads) {
  fastgan::parallel_for(threads, a.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (a.dtype == fastgan::Dtype::float64)
        fastgan::one_row<double>(a, r);
      else
        fastgan::one_row<float>(a, r);
    }
  });
}
