// The row kernel of linear_cross_entropy against its definition in double, without PyTorch: every size around
// the vector width and the block, with and without each of the optional pointers, padded rows, one and
// several threads.
#include "linear_cross_entropy/linear_cross_entropy.h"

#include <type_traits>

#include "harness.h"

namespace {

using harness::Buffer;

template <class T>
void check(int64_t rows, int64_t classes, int64_t gap, bool bias, bool margin, bool gradient,
           double smoothing, double z, bool masked) {
  const double tolerance = std::is_same_v<T, double> ? 1e-12 : 2e-5;
  const int64_t stride = classes + gap;
  Buffer<T> logits = harness::normal<T>((rows - 1) * stride + classes);  // nothing after the last row
  Buffer<T> offset = harness::normal<T>(classes), lowered = harness::normal<T>(rows),
            upstream = harness::normal<T>(rows);
  Buffer<int64_t> target(rows);
  for (int64_t r = 0; r < rows; ++r) target[r] = int64_t(harness::generator()() % uint32_t(classes));
  if (masked && classes > 2)  // -inf everywhere but at the target and the last class: whole blocks of it
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c + 1 < classes; ++c)
        if (c != target[r]) logits[r * stride + c] = T(-INFINITY);
  std::vector<double> x(static_cast<size_t>(rows * classes));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < classes; ++c)
      x[size_t(r * classes + c)] = double(logits[r * stride + c]) + (bias ? double(offset[c]) : 0) -
                                   (margin && c == target[r] ? double(lowered[r]) : 0);
  Buffer<T> before(logits.size), loss(rows), first(logits.size);
  for (int64_t i = 0; i < logits.size; ++i) before[i] = logits[i];

  for (int threads : {1, 3}) {
    for (int64_t i = 0; i < logits.size; ++i) logits[i] = before[i];
    fastgan::LinearCrossEntropyRows a{};
    a.dtype = std::is_same_v<T, double> ? fastgan::Dtype::float64 : fastgan::Dtype::float32;
    a.logits = logits.get();
    a.rows = rows, a.classes = classes, a.stride = stride;
    a.target = target.get();
    a.bias = bias ? offset.get() : nullptr;
    a.margin = margin ? lowered.get() : nullptr;
    a.gradient = gradient ? upstream.get() : nullptr;
    a.loss = loss.get();
    a.smoothing = smoothing, a.z = z;
    FASTGAN_KERNEL(linear_cross_entropy_rows)(a, harness::threads(threads));
    for (int64_t r = 0; r < rows; ++r) {
      const double* row = x.data() + r * classes;
      double high = -INFINITY, sum = 0, mean = 0;
      for (int64_t c = 0; c < classes; ++c) high = std::fmax(high, row[c]);
      for (int64_t c = 0; c < classes; ++c) sum += std::exp(row[c] - high), mean += row[c] / double(classes);
      const double lse = high + std::log(sum);
      double exact = lse - row[target[r]];
      if (smoothing != 0) exact = (1 - smoothing) * exact + smoothing * (lse - mean);
      harness::expect_close(double(loss[r]), exact + z * lse * lse, tolerance, "loss");
      for (int64_t c = 0; gradient && c < classes; ++c) {
        const double p = std::exp(row[c] - lse) * (1 + 2 * z * lse);
        const double want =
            double(upstream[r]) * (p - (1 - smoothing) * (c == target[r]) - smoothing / double(classes));
        harness::expect_close(double(logits[r * stride + c]), want, tolerance, "gradient");
      }
      for (int64_t c = classes; c < stride && r + 1 < rows; ++c)
        harness::expect(logits[r * stride + c] == before[r * stride + c], "between rows");
    }
    for (int64_t i = 0; i < logits.size; ++i) {
      if (threads == 1) first[i] = logits[i];
      harness::expect(first[i] == logits[i], "the same bits for every number of threads");
    }
  }
}

template <class T>
void all() {
  for (int64_t classes : {1, 2, 7, 8, 9, 31, 64, 1023, 1024, 1025, 2500})
    for (int options = 0; options < 8; ++options)
      check<T>(3, classes, options == 3 ? 5 : 0, options & 1, options & 2, options & 4, options & 1 ? 0.1 : 0,
               options & 2 ? 1e-2 : 0, false);
  check<T>(2, 300000, 0, true, true, true, 0.1, 1e-3, false);  // blocks larger than the least
  check<T>(2, 4000, 0, false, false, true, 0, 0, true);
}

}  // namespace

int main() {
  all<float>();
  all<double>();
  return harness::result();
}
