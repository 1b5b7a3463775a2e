// Dropout, residual and layer norm forward and backward against sums in double: widths around vectors and
// strips, 1 and 3 threads.
#include "layer_norm/layer_norm.h"

#include "harness.h"
#include "philox_word.h"

using fastgan::LayerNormArgs;

namespace {

template <class T>
void run(int64_t rows, int64_t width, bool drops, bool more, int threads, fastgan::Dtype dtype,
         double tolerance) {
  const int64_t count = rows * width;
  auto input = harness::normal<T>(count), residual = harness::normal<T>(count);
  auto weight = harness::normal<T>(width), bias = harness::normal<T>(width);
  auto grad_output = harness::normal<T>(count), grad_sum = harness::normal<T>(count);
  harness::Buffer<T> sum(count), output(count), grad_residual(count), grad_input(drops ? count : 0);
  harness::Buffer<T> grad_weight(width), grad_bias(width);
  harness::Buffer<double> mean(rows), rstd(rows);
  LayerNormArgs args{};
  args.dtype = dtype, args.rows = rows, args.width = width, args.eps = 1e-5, args.drops = drops;
  args.seed = 0x123456789abcdef0u, args.offset = 0xfffffff0u, args.threshold = 0x40000000u,
  args.scale = 4.0 / 3;
  args.input = input.get(), args.residual = residual.get(), args.sum = sum.get(), args.output = output.get();
  args.weight = weight.get(), args.bias = bias.get(), args.mean = mean.get(), args.rstd = rstd.get();
  FASTGAN_KERNEL(layer_norm_forward)(args, harness::threads(threads));
  args.grad_output = grad_output.get(), args.grad_sum = more ? grad_sum.get() : nullptr;
  args.grad_residual = grad_residual.get(), args.grad_input = drops ? grad_input.get() : nullptr;
  args.grad_weight = grad_weight.get(), args.grad_bias = grad_bias.get();
  harness::Buffer<double> scratch(fastgan::layer_norm_scratch(args));
  args.scratch = scratch.get();
  FASTGAN_KERNEL(layer_norm_backward)(args, harness::threads(threads));

  std::vector<double> to_weight(width), to_bias(width);
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<double> z(width);
    double middle = 0, variance = 0, one = 0, along = 0;
    for (int64_t i = 0; i < width; ++i) {
      const uint64_t at = uint64_t(r * width + i);
      const bool kept = !drops || harness::philox_word(args.seed, args.offset, at) >= args.threshold;
      const double h = double(residual[at]) + (kept ? double(input[at]) * (drops ? args.scale : 1.0) : 0.0);
      harness::expect(std::abs(double(sum[at]) - h) <= tolerance * (1 + std::abs(h)), "sum", double(sum[at]));
      z[i] = h, middle += h / double(width);
    }
    for (double h : z) variance += (h - middle) * (h - middle) / double(width);
    const double inverse = 1 / std::sqrt(variance + args.eps);
    for (int64_t i = 0; i < width; ++i) {
      const int64_t at = r * width + i;
      z[i] = (z[i] - middle) * inverse;
      const double y = z[i] * double(weight[i]) + double(bias[i]), g = double(grad_output[at]);
      harness::expect(std::abs(double(output[at]) - y) <= 10 * tolerance * (1 + inverse) * (1 + std::abs(y)),
                      "output", double(output[at]));
      one += g * double(weight[i]) / double(width), along += g * double(weight[i]) * z[i] / double(width);
      to_weight[i] += g * z[i], to_bias[i] += g;
    }
    for (int64_t i = 0; i < width; ++i) {
      const int64_t at = r * width + i;
      const double dh = (double(grad_output[at]) * double(weight[i]) - one - z[i] * along) * inverse +
                        (more ? double(grad_sum[at]) : 0.0);
      const double bound = 20 * tolerance * (1 + inverse) * (1 + inverse) * (4 + std::abs(dh));
      harness::expect(std::abs(double(grad_residual[at]) - dh) <= bound, "grad_residual",
                      double(grad_residual[at]));
      if (!drops) continue;
      const bool kept = harness::philox_word(args.seed, args.offset, uint64_t(at)) >= args.threshold;
      harness::expect(grad_input[at] == (kept ? grad_residual[at] * T(args.scale) : T(0)), "grad_input",
                      double(grad_input[at]));
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    const double bound = 50 * tolerance * double(rows + 1);
    harness::expect(std::abs(double(grad_bias[i]) - to_bias[i]) <= bound, "grad_bias", double(grad_bias[i]));
    if (width > 2)
      harness::expect(std::abs(double(grad_weight[i]) - to_weight[i]) <= bound, "grad_weight",
                      double(grad_weight[i]));
  }
}

}  // namespace

int main() {
  for (int64_t width : {1, 3, 16, 31, 1024, 1027})
    for (int64_t rows : {0, 1, 5, 70})
      for (int threads : {1, 3})
        for (int what = 0; what < 4; ++what) {
          run<float>(rows, width, what & 1, what & 2, threads, fastgan::Dtype::float32, 1e-6);
          run<double>(rows, width, what & 1, what & 2, threads, fastgan::Dtype::float64, 1e-14);
        }
  return harness::result();
}
