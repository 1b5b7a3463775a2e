// The gan_loss kernels without PyTorch: every layout, both paths, three thread counts, against plain loops in
// double.
#include "gan_loss/gan_loss.h"

#include <cstring>

#include "harness.h"

using namespace fastgan;

namespace {

struct Shape {
  int64_t n, c, h, w, k, kh, kw, sh, sw, ph, pw;
};

double softplus(double x) { return std::fmax(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }

// strides of a dense (n, c, h, w) tensor
void dense(int64_t (&s)[4], int64_t c, int64_t h, int64_t w, bool channels_last) {
  s[0] = c * h * w;
  s[1] = channels_last ? 1 : h * w;
  s[2] = channels_last ? w * c : w;
  s[3] = channels_last ? c : 1;
}

template <class T>
void check(const Shape& g, Dtype dtype, bool channels_last, double tolerance) {
  GanLossArgs a{};
  a.dtype = dtype;
  a.loss = GanLoss::bce;
  a.reduction = Reduction::mean;
  a.label_smoothing = 0.1;
  a.batch = g.n, a.channels = g.c, a.height = g.h, a.width = g.w;
  a.outputs = g.k, a.kernel_height = g.kh, a.kernel_width = g.kw;
  a.stride[0] = g.sh, a.stride[1] = g.sw, a.padding[0] = g.ph, a.padding[1] = g.pw;
  a.out_height = (g.h + 2 * g.ph - g.kh) / g.sh + 1, a.out_width = (g.w + 2 * g.pw - g.kw) / g.sw + 1;
  int64_t per_image = g.k * a.out_height * a.out_width, logits_count = g.n * per_image;
  int64_t input_count = g.n * g.c * g.h * g.w, weight_count = g.k * g.c * g.kh * g.kw;

  auto input = harness::normal<T>(input_count), weight = harness::normal<T>(weight_count),
       bias = harness::normal<T>(g.k);
  for (int64_t i = 0; i < weight_count; ++i) weight[i] /= T(std::sqrt(double(g.c * g.kh * g.kw)));
  auto grad_logits = harness::normal<T>(logits_count);
  harness::Buffer<T> target(g.n);
  for (int64_t i = 0; i < g.n; ++i) target[i] = T(i % 3) / 2;
  dense(a.input.stride, g.c, g.h, g.w, channels_last);
  dense(a.weight.stride, g.c, g.kh, g.kw, false);
  dense(a.grad_logits.stride, g.k, a.out_height, a.out_width, false);
  dense(a.grad_input_stride, g.c, g.h, g.w, channels_last);
  dense(a.grad_weight_stride, g.c, g.kh, g.kw, false);
  a.input.data = input.get(), a.weight.data = weight.get(), a.bias = bias.get(), a.bias_stride = 1;
  a.target.data = target.get(), a.target.stride[0] = 1;
  T grad_loss = T(1.5);
  a.grad_loss.data = &grad_loss, a.grad_logits.data = grad_logits.get();

  // The obvious loops.
  auto x_at = [&](int64_t n, int64_t c, int64_t y, int64_t x) {
    const int64_t* s = a.input.stride;
    return n * s[0] + c * s[1] + y * s[2] + x * s[3];
  };
  std::vector<double> logits(logits_count), gx(input_count), gw(weight_count), gb(g.k), dz(logits_count);
  double loss = logits_count ? 0 : std::nan("");  // the mean over nothing
  auto taps = [&](auto f) {
    for (int64_t n = 0; n < g.n; ++n)
      for (int64_t k = 0; k < g.k; ++k)
        for (int64_t y = 0; y < a.out_height; ++y)
          for (int64_t x = 0; x < a.out_width; ++x)
            for (int64_t c = 0; c < g.c; ++c)
              for (int64_t i = 0; i < g.kh; ++i)
                for (int64_t j = 0; j < g.kw; ++j) {
                  int64_t row = y * g.sh + i - g.ph, column = x * g.sw + j - g.pw;
                  if (row < 0 || row >= g.h || column < 0 || column >= g.w) continue;
                  f(((n * g.k + k) * a.out_height + y) * a.out_width + x, x_at(n, c, row, column),
                    ((k * g.c + c) * g.kh + i) * g.kw + j);
                }
  };
  taps([&](int64_t z, int64_t x, int64_t w) { logits[z] += double(input[x]) * double(weight[w]); });
  for (int64_t z = 0; z < logits_count; ++z) {
    int64_t n = z / per_image, k = z / (a.out_height * a.out_width) % g.k;
    logits[z] += double(bias[k]);
    double t = double(target[n]) * 0.9 + 0.05;
    loss += (t * softplus(-logits[z]) + (1 - t) * softplus(logits[z])) / double(logits_count);
    dz[z] = 1.5 * (1 / (1 + std::exp(-logits[z])) - t) / double(logits_count) + double(grad_logits[z]);
    gb[k] += dz[z];
  }
  taps([&](int64_t z, int64_t x, int64_t w) {
    gx[x] += dz[z] * double(weight[w]);
    gw[w] += dz[z] * double(input[x]);
  });

  harness::Buffer<T> first_input(input_count), first_weight(weight_count);
  for (int threads = 1; threads <= harness::most_threads(); ++threads) {
    harness::Buffer<T> out(logits_count), value(1), workspace(gan_loss_workspace(a));
    harness::Buffer<T> grad_input(input_count), grad_weight(weight_count), grad_bias(g.k);
    harness::Buffer<double> partial(g.n * a.out_height);
    int32_t bad = 0;
    a.logits = out.get(), a.loss_value = value.get(), a.workspace = workspace.get();
    a.partial_sums = partial.get(), a.bad_target = &bad;
    FASTGAN_KERNEL(gan_loss_forward)(a, harness::threads(threads));
    a.grad_input = grad_input.get(), a.grad_weight = grad_weight.get(), a.grad_bias = grad_bias.get();
    FASTGAN_KERNEL(gan_loss_backward)(a, harness::threads(threads));
    harness::expect(bad == 0, "targets are in range");
    harness::expect_close(double(value[0]), loss, tolerance, "loss");
    for (int64_t i = 0; i < logits_count; ++i)
      harness::expect_close(double(out[i]), logits[i], tolerance, "logits");
    for (int64_t i = 0; i < input_count; ++i)
      harness::expect_close(double(grad_input[i]), gx[i], tolerance, "grad_input");
    for (int64_t i = 0; i < weight_count; ++i)
      harness::expect_close(double(grad_weight[i]), gw[i], tolerance, "grad_weight");
    for (int64_t i = 0; i < g.k; ++i)
      harness::expect_close(double(grad_bias[i]), gb[i], tolerance, "grad_bias");
    if (threads == 1) {
      std::memcpy(first_input.get(), grad_input.get(), size_t(input_count) * sizeof(T));
      std::memcpy(first_weight.get(), grad_weight.get(), size_t(weight_count) * sizeof(T));
    } else {
      harness::expect(
          !std::memcmp(first_input.get(), grad_input.get(), size_t(input_count) * sizeof(T)) &&
              !std::memcmp(first_weight.get(), grad_weight.get(), size_t(weight_count) * sizeof(T)),
          "the same bits for every thread count");
    }
  }
}

}  // namespace

int main() {
  const Shape shapes[] = {
      {5, 40, 4, 4, 1, 4, 4, 1, 1, 0, 0},   {3, 33, 9, 7, 1, 4, 4, 1, 1, 1, 1},
      {2, 64, 8, 8, 2, 4, 4, 1, 1, 0, 0},   {2, 20, 9, 11, 3, 3, 2, 2, 3, 1, 2},
      {1, 16, 17, 19, 1, 4, 4, 1, 1, 1, 1}, {2, 3, 5, 6, 4, 1, 1, 1, 1, 0, 0},
      {9, 65, 1, 1, 2, 1, 1, 1, 1, 0, 0},   {0, 8, 4, 4, 1, 4, 4, 1, 1, 0, 0},
  };
  for (const Shape& shape : shapes)
    for (bool channels_last : {false, true}) {
      if (!harness::is_chosen()) continue;
      check<float>(shape, Dtype::float32, channels_last, 2e-5);
      check<double>(shape, Dtype::float64, channels_last, 1e-12);
    }
  return harness::result();
}
