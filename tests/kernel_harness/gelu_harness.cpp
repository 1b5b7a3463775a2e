// Bias and GELU forward and backward against double: widths around vectors, 1 and 3 threads.
#include "gelu/gelu.h"

#include "harness.h"

using fastgan::GeluArgs;

namespace {

double gelu(double x, bool by_tanh) {
  if (!by_tanh) return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

double slope(double x, bool by_tanh) {
  const double step = 1e-6;
  return (gelu(x + step, by_tanh) - gelu(x - step, by_tanh)) / (2 * step);
}

template <class T>
void run(int64_t rows, int64_t width, bool by_tanh, bool biased, int threads, fastgan::Dtype dtype,
         double tolerance) {
  if (!biased) width *= rows, rows = 1;
  const int64_t count = rows * width;
  auto input = harness::normal<T>(count), grad_output = harness::normal<T>(count);
  auto bias = harness::normal<T>(biased ? width : 0);
  harness::Buffer<T> output(count), grad_input(count), grad_bias(biased ? width : 0);
  GeluArgs args{};
  args.dtype = dtype, args.rows = rows, args.width = width, args.by_tanh = by_tanh, args.input = input.get();
  args.bias = biased ? bias.get() : nullptr, args.output = output.get();
  FASTGAN_KERNEL(gelu_forward)(args, harness::threads(threads));
  args.grad_output = grad_output.get(), args.grad_input = grad_input.get();
  args.grad_bias = biased ? grad_bias.get() : nullptr;
  harness::Buffer<double> scratch(biased ? fastgan::gelu_scratch(args) : 0);
  args.scratch = scratch.get();
  FASTGAN_KERNEL(gelu_backward)(args, harness::threads(threads));
  std::vector<double> sums(size_t(width), 0.0);
  for (int64_t at = 0; at < count; ++at) {
    const double x = double(input[at]) + (biased ? double(bias[at % width]) : 0.0);
    const double y = gelu(x, by_tanh), dx = double(grad_output[at]) * slope(x, by_tanh);
    harness::expect(std::abs(double(output[at]) - y) <= tolerance * (1 + std::abs(y)), "output",
                    double(output[at]));
    harness::expect(std::abs(double(grad_input[at]) - dx) <= 5 * tolerance * (1 + std::abs(dx)) + 1e-8,
                    "grad_input", double(grad_input[at]));
    sums[size_t(at % width)] += double(grad_input[at]);
  }
  for (int64_t i = 0; biased && i < width; ++i)
    harness::expect(std::abs(double(grad_bias[i]) - sums[size_t(i)]) <= tolerance * double(rows + 1),
                    "grad_bias", double(grad_bias[i]));
}

}  // namespace

int main() {
  for (int64_t width : {1, 3, 16, 31, 1027})
    for (int64_t rows : {0, 1, 5, 70})
      for (int threads : {1, 3})
        for (int what = 0; what < 4; ++what) {
          run<float>(rows, width, what & 1, what & 2, threads, fastgan::Dtype::float32, 2e-6);
          run<double>(rows, width, what & 1, what & 2, threads, fastgan::Dtype::float64, 1e-14);
        }
  return harness::result();
}
