// The convolution kernels against their definition in double, without PyTorch: odd sizes, every padding,
// remainders of channels and tiles, both layouts, several blocks and several steps of images, one and several
// threads; and what is not finite is seen.
#include "conv/conv.h"

#include "harness.h"

namespace {

using harness::Buffer;

struct Case {
  int32_t kernel, stride;
  int64_t batch, channels, height, width, outputs, pad_height, pad_width;
  bool channels_last, bias;
};

fastgan::ConvTensor tensor(Buffer<float>& data, int64_t channels, int64_t height, int64_t width, bool last) {
  if (last) return {data.get(), {channels * height * width, 1, width * channels, channels}};
  return {data.get(), {channels * height * width, height * width, width, 1}};
}

using Kernel = void (*)(const fastgan::ConvArgs&, const fastgan::Threads&);
constexpr Kernel kKernels[2][3] = {
    {FASTGAN_KERNEL(conv_forward), FASTGAN_KERNEL(conv_input_gradient), FASTGAN_KERNEL(conv_weight_gradient)},
    {FASTGAN_KERNEL(conv_direct_forward), FASTGAN_KERNEL(conv_direct_input_gradient),
     FASTGAN_KERNEL(conv_direct_weight_gradient)}};

void call(bool direct, int pass, fastgan::ConvArgs& a, int threads) {
  const Kernel kernel = kKernels[direct][pass];
  int64_t size = 0;
  a.workspace = nullptr, a.workspace_size = &size,
  a.threads = threads > 1 ? threads - 1 : 1;  // one has to allocate
  kernel(a, harness::threads(threads));
  std::vector<char> memory(size_t(size) + 63);
  a.workspace = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  kernel(a, harness::threads(threads));
}

void check(const Case& c, bool direct = false) {
  const int64_t out_h = (c.height + 2 * c.pad_height - c.kernel) / c.stride + 1;
  const int64_t out_w = (c.width + 2 * c.pad_width - c.kernel) / c.stride + 1;
  const int64_t x_size = c.batch * c.channels * c.height * c.width,
                y_size = c.batch * c.outputs * out_h * out_w,
                w_size = c.outputs * c.channels * c.kernel * c.kernel;
  Buffer<float> in[3] = {harness::normal<float>(x_size), harness::normal<float>(w_size),
                         harness::normal<float>(y_size)};
  Buffer<float> bias = harness::normal<float>(c.channels + c.outputs);
  for (int pass = 0; pass < 3; ++pass) {
    const int64_t size = pass == 0 ? y_size : pass == 1 ? x_size : w_size;
    std::vector<double> exact(static_cast<size_t>(size)), weight(static_cast<size_t>(size));
    const fastgan::ConvTensor x = tensor(in[0], c.channels, c.height, c.width, c.channels_last),
                              w = tensor(in[1], c.channels, c.kernel, c.kernel, c.channels_last),
                              y = tensor(in[2], c.outputs, out_h, out_w, c.channels_last);
    auto at = [](const fastgan::ConvTensor& t, int64_t i, int64_t j, int64_t k, int64_t l) {
      return i * t.strides[0] + j * t.strides[1] + k * t.strides[2] + l * t.strides[3];
    };
    const bool bias_used = c.bias && pass < 2;
    for (int64_t n = 0; n < c.batch; ++n)
      for (int64_t k = 0; k < c.outputs; ++k)
        for (int64_t i = 0; i < out_h; ++i)
          for (int64_t j = 0; j < out_w; ++j)
            for (int64_t ch = 0; ch < c.channels; ++ch)
              for (int64_t r = 0; r < c.kernel; ++r)
                for (int64_t s = 0; s < c.kernel; ++s) {
                  const int64_t row = c.stride * i + r - c.pad_height,
                                column = c.stride * j + s - c.pad_width;
                  if (row < 0 || row >= c.height || column < 0 || column >= c.width) continue;
                  const int64_t xi = at(x, n, ch, row, column), wi = at(w, k, ch, r, s),
                                yi = at(y, n, k, i, j);
                  const int64_t to = pass == 0 ? yi : pass == 1 ? xi : wi;
                  const double product = pass == 0   ? double(in[0][xi]) * double(in[1][wi])
                                         : pass == 1 ? double(in[2][yi]) * double(in[1][wi])
                                                     : double(in[0][xi]) * double(in[2][yi]);
                  exact[size_t(to)] += product, weight[size_t(to)] += std::fabs(product);
                }
    if (bias_used)
      for (int64_t n = 0; n < c.batch; ++n)
        for (int64_t k = 0; k < (pass == 0 ? c.outputs : c.channels); ++k)
          for (int64_t i = 0; i < (pass == 0 ? out_h : c.height); ++i)
            for (int64_t j = 0; j < (pass == 0 ? out_w : c.width); ++j)
              exact[size_t(at(pass == 0 ? y : x, n, k, i, j))] += double(bias[k]);
    // The error of the fast algorithm is relative to the largest that went into a tile, not to each output.
    double largest = 1;
    for (double each : weight) largest = std::fmax(largest, each);
    Buffer<float> first(size);
    for (int threads : {1, 2, 3}) {
      Buffer<float> out(size);
      for (int64_t i = 0; i < size; ++i) out[i] = -12345.0f;
      fastgan::ConvArgs a{};
      a.dtype = fastgan::Dtype::float32;
      a.kernel = c.kernel, a.stride = c.stride;
      a.batch = c.batch, a.channels = c.channels, a.height = c.height, a.width = c.width,
      a.outputs = c.outputs;
      a.out_height = out_h, a.out_width = out_w, a.pad_height = c.pad_height, a.pad_width = c.pad_width;
      a.x = x, a.w = w, a.y = y;
      (pass == 0 ? a.y : pass == 1 ? a.x : a.w).data = out.get();
      a.bias = bias_used ? bias.get() : nullptr;
      int32_t nonfinite = 0;
      a.nonfinite = &nonfinite;
      a.second_cache = threads == 3 ? 1 << 20 : 0;  // larger blocks, and the same bits
      call(direct, pass, a, threads);
      harness::expect(nonfinite == 0, "finite");
      for (int64_t i = 0; i < size; ++i) {
        const double error = std::fabs(double(out[i]) - exact[size_t(i)]) / largest;
        harness::expect(error <= 2e-6,
                        pass == 0   ? "forward"
                        : pass == 1 ? "input gradient"
                                    : "weight gradient",
                        error);
        if (threads == 1) first[i] = out[i];
        harness::expect(first[i] == out[i], "the same bits for every number of threads");
      }
      if (threads != 2) continue;
      if (pass < 2) {
        a.slope = 0.25f;
        call(direct, pass, a, threads);
        for (int64_t i = 0; i < size; ++i)
          harness::expect(out[i] == (first[i] > 0 ? first[i] : 0.25f * first[i]), "leaky ReLU");
        a.slope = 1;
      }
      // A gradient read through the derivative of an activation.
      for (const float slope : {0.0f, 0.25f}) {
        if (pass == 0) break;
        Buffer<float> mask = harness::normal<float>(y_size), expected(size);
        mask[0] = 0, mask[y_size / 2] = NAN;
        a.mask = mask.get(), a.mask_slope = slope;
        call(direct, pass, a, threads);
        a.mask = nullptr;
        for (int64_t i = 0; i < size; ++i) expected[i] = out[i];
        Buffer<float> gradient(y_size);
        for (int64_t i = 0; i < y_size; ++i) {
          gradient[i] = in[2][i];
          if (slope == 0 ? mask[i] <= 0 : !(mask[i] > 0)) in[2][i] *= slope;
        }
        call(direct, pass, a, threads);
        for (int64_t i = 0; i < size; ++i) harness::expect(out[i] == expected[i], "a mask");
        for (int64_t i = 0; i < y_size; ++i) in[2][i] = gradient[i];
      }
      // Anything that is not finite, wherever it lies inside, is told.
      Buffer<float>& spoiled = in[pass == 0 ? 0 : 2];
      const int64_t where = spoiled.size / 2;
      const float before = spoiled[where];
      spoiled[where] = c.bias ? INFINITY : NAN;
      call(direct, pass, a, threads);
      spoiled[where] = before;
      // (an element of x that no output sees, or whose output is padding, need not be)
      if (pass == 1 && c.pad_height < c.kernel && c.pad_width < c.kernel && c.height > 3 && c.width > 3)
        harness::expect(nonfinite == 1, "told of an infinity");
    }
  }
}

}  // namespace

int main() {
  for (bool last : {false, true}) {
    for (int64_t pad : {0, 1, 2, 3})
      for (int64_t size : {4, 5, 8, 9, 11})
        check({4, 2, 3, 5, size, size + 1, 19, pad, (pad + 1) % 4, last, pad == 1});
    check({4, 2, 70, 17, 8, 8, 16, 1, 1, last, true});    // several runs of single tiles
    check({4, 2, 2, 33, 36, 38, 35, 1, 1, last, false});  // several blocks an image
    check(
        {4, 2, 1, 16, 6, 150, 64, 1, 1, last, true});  // wide: the row of tiles is cut into pieces and blocks
    for (int64_t pad : {0, 1, 2})
      for (int64_t size : {3, 4, 5, 9})
        check({3, 1, 3, 7, size, size + 1, 19, pad, (pad + 1) % 3, last, pad == 1});
    check({3, 1, 5, 80, 9, 9, 48, 1, 1, last, true});
    check({3, 1, 1, 16, 33, 37, 65, 1, 1, last, false});
  }
  for (bool last : {false, true}) {
    for (int64_t pad : {0, 1, 2, 3, 5})
      for (int64_t size : {4, 5, 8, 11}) {
        check({4, 2, 3, 3, size, size + 1, 19, pad, (pad + 1) % 4, last, pad == 1}, true);
        check({3, 1, 3, 1 + pad, size, size + 1, 16, pad, (pad + 1) % 3, last, pad == 1}, true);
      }
    check({4, 2, 35, 3, 8, 8, 64, 1, 1, last, true}, true);
    check({4, 2, 1, 3, 70, 66, 35, 1, 1, last, true}, true);
    check({3, 1, 2, 4, 19, 150, 5, 1, 1, last, false}, true);
  }
  return harness::result();
}
