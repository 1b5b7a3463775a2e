// A linear layer on few rows against the plain double loop: both layouts, tails, padded weights, 1 and 3
// threads.
#include "linear/linear.h"

#include "harness.h"

using fastgan::LinearArgs;

namespace {

struct Case {
  int64_t rows, depth, outputs, padding;
};

template <class T>
void run(const Case& shape, bool by_outputs, bool with_bias, int threads, fastgan::Dtype dtype,
         double tolerance) {
  int64_t R = shape.rows, K = shape.depth, N = shape.outputs;
  int64_t stride = (by_outputs ? K : N) + shape.padding, length = by_outputs ? N : K;
  auto input = harness::normal<T>(R * K), bias = harness::normal<T>(N);
  // exactly what is read: the last row is not padded
  auto weight = harness::normal<T>(length ? (length - 1) * stride + (by_outputs ? K : N) : 0);
  harness::Buffer<T> output(R * N);
  LinearArgs args{};
  args.dtype = dtype, args.rows = R, args.depth = K, args.outputs = N, args.by_outputs = by_outputs;
  args.weight_stride = stride, args.input = input.get(), args.weight = weight.get();
  args.bias = with_bias ? bias.get() : nullptr, args.output = output.get();
  FASTGAN_KERNEL(linear_forward)(args, harness::threads(threads));
  for (int64_t r = 0; r < R; ++r)
    for (int64_t n = 0; n < N; ++n) {
      double exact = with_bias ? double(bias[n]) : 0, size = 1;
      for (int64_t k = 0; k < K; ++k) {
        double term = double(input[r * K + k]) * double(weight[by_outputs ? n * stride + k : k * stride + n]);
        exact += term, size += std::fabs(term);
      }
      harness::expect_close(double(output[r * N + n]) / size, exact / size, tolerance, "output");
    }
}

}  // namespace

int main() {
  const Case cases[] = {{1, 770, 131, 0}, {2, 1, 1, 3},    {3, 0, 5, 0},    {4, 9, 0, 0},
                        {5, 33, 64, 2},   {8, 17, 515, 0}, {9, 40, 127, 0}, {17, 7, 300, 5},
                        {32, 775, 70, 1}, {31, 16, 129, 0}};
  for (const Case& shape : cases)
    for (bool by_outputs : {false, true})
      for (bool with_bias : {false, true})
        for (int threads : {1, 3}) {
          if (!harness::is_chosen()) continue;
          run<float>(shape, by_outputs, with_bias, threads, fastgan::Dtype::float32, 1e-6);
          run<double>(shape, by_outputs, with_bias, threads, fastgan::Dtype::float64, 1e-15);
        }
  return harness::result();
}
