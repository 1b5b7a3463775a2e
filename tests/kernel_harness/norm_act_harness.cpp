// Batch norm and activation against the plain double loop: both layouts, tails, groups, every activation, 1
// and 3 threads.
#include "norm_act/norm_act.h"

#include <cstring>

#include "harness.h"

using fastgan::Activation;
using fastgan::NormActArgs;

namespace {

struct Case {
  int64_t batch, channels, spatial, groups;
};

template <class T>
void run(const Case& shape, Activation act, bool channels_last, bool batch_statistics, int threads,
         fastgan::Dtype dtype, double tolerance) {
  int64_t N = shape.batch, C = shape.channels, S = shape.spatial, G = batch_statistics ? shape.groups : 1;
  int64_t total = N * C * S;
  auto input = harness::normal<T>(total), grad = harness::normal<T>(total);
  auto weight = harness::normal<T>(C), bias = harness::normal<T>(C);
  for (int64_t i = 0; i < total; ++i) input[i] += T(3);
  harness::Buffer<T> output(total), grad_input(total), grad_weight(C), grad_bias(C);
  harness::Buffer<double> mean(G * C), var(G * C);
  for (int64_t i = 0; i < G * C; ++i) mean[i] = 3.1, var[i] = 0.7;

  NormActArgs args{};
  args.dtype = dtype, args.act = act, args.channels_last = channels_last,
  args.batch_statistics = batch_statistics;
  args.batch = N, args.channels = C, args.spatial = S, args.groups = G, args.eps = 1e-5,
  args.negative_slope = 0.2;
  args.input = input.get(), args.weight = weight.get(), args.bias = bias.get();
  args.mean = mean.get(), args.var = var.get(), args.output = output.get(), args.grad_output = grad.get();
  args.grad_input = grad_input.get(), args.grad_weight = grad_weight.get(), args.grad_bias = grad_bias.get();
  harness::Buffer<double> scratch(fastgan::norm_act_scratch(args));
  args.scratch = scratch.get();
  FASTGAN_KERNEL(norm_act_forward)(args, harness::threads(threads));
  FASTGAN_KERNEL(norm_act_backward)(args, harness::threads(threads));

  auto at = [&](int64_t n, int64_t c, int64_t s) {
    return channels_last ? (n * S + s) * C + c : (n * C + c) * S + s;
  };
  double count = double(N / G * S);
  for (int64_t c = 0; c < C; ++c) {
    double weight_sum = 0, bias_sum = 0;
    for (int64_t g = 0; g < G; ++g) {
      int64_t begin = g * (N / G), end = begin + N / G;
      double m = 3.1, v = 0.7;
      if (batch_statistics) {
        m = v = 0;
        for (int64_t n = begin; n < end; ++n)
          for (int64_t s = 0; s < S; ++s) m += double(input[at(n, c, s)]) / count;
        for (int64_t n = begin; n < end; ++n)
          for (int64_t s = 0; s < S; ++s) v += std::pow(double(input[at(n, c, s)]) - m, 2) / count;
        harness::expect_close(mean[g * C + c], m, tolerance, "mean");
        harness::expect_close(var[g * C + c], v, tolerance, "var");
      }
      double invstd = 1 / std::sqrt(v + 1e-5), w = double(weight[c]), sum = 0, along = 0;
      auto pre = [&](int64_t i) { return (double(input[i]) - m) * invstd * w + double(bias[c]); };
      double below = act == Activation::none ? 1 : act == Activation::relu ? 0 : 0.2;
      auto dz = [&](int64_t i) { return double(grad[i]) * (pre(i) > 0 ? 1 : below); };
      for (int64_t n = begin; n < end; ++n)
        for (int64_t s = 0; s < S; ++s) {
          int64_t i = at(n, c, s);
          sum += dz(i);
          along += dz(i) * (double(input[i]) - m) * invstd;
          harness::expect_close(double(output[i]), pre(i) * (pre(i) > 0 ? 1 : below), tolerance, "output");
        }
      weight_sum += along, bias_sum += sum;
      for (int64_t n = begin; n < end; ++n)
        for (int64_t s = 0; s < S; ++s) {
          int64_t i = at(n, c, s);
          if (std::fabs(pre(i)) < 1e-5) continue;  // the mask of a value at the corner may go either way
          double standardised = (double(input[i]) - m) * invstd;
          double exact = batch_statistics ? w * invstd * (dz(i) - sum / count - standardised * along / count)
                                          : w * invstd * dz(i);
          harness::expect_close(double(grad_input[i]), exact, 10 * tolerance, "grad_input");
        }
    }
    harness::expect_close(grad_weight[c], weight_sum, 100 * tolerance, "grad_weight");
    harness::expect_close(grad_bias[c], bias_sum, 100 * tolerance, "grad_bias");
  }
}

}  // namespace

int main() {
  // The last two are large enough for a cluster of a GPU's blocks.
  const Case cases[] = {{4, 3, 25, 2},   {2, 1, 1, 1},    {6, 5, 1, 3},     {2, 130, 9, 1},
                        {2, 2, 1100, 1}, {300, 17, 4, 2}, {2, 1, 16500, 1}, {4, 36, 640, 2}};
  for (const Case& shape : cases)
    for (Activation act : {Activation::none, Activation::relu, Activation::leaky_relu})
      for (bool channels_last : {false, true})
        for (bool batch_statistics : {false, true})
          for (int threads : {1, 3}) {
            if (!harness::is_chosen()) continue;
            run<float>(shape, act, channels_last, batch_statistics, threads, fastgan::Dtype::float32, 1e-5);
            run<double>(shape, act, channels_last, batch_statistics, threads, fastgan::Dtype::float64, 1e-12);
          }
  return harness::result();
}
