// Convolutions from or to a few channels (a picture's one or three), multiplied directly: all three passes.
//
// Winograd's algorithm transforms 16 channels at a time, so on three of them it would work for thirteen that
// are not there. Here x is the side with few channels C, y the side with many, K. A band of rows of x lies in
// scratch as (row, column, channel), padded. What an output sees of one row of it, kernel * C numbers, is
// then contiguous (a "segment"), and the next output's begins stride * C further on. So no patches are
// copied:
//
//   forward           y (pixels × K) = patches (pixels × depth) w (depth × K), depth = kernel segments, each
//                     patch read in place
//   input gradient    products (pixels × depth) = y (pixels × K) wᵀ (K × depth), added where patches overlap
//   weight gradient   w (segment × K) += patchesᵀ (segment × pixels) y (pixels × K), a row of outputs at a
//   time
//
// all on the register tiles of products.h (6 rows × 2 vectors). A segment of 3 channels and kernel 4 has 12
// numbers, two whole tiles.
//
// Tasks are bands of rows of an image, cut by shape; the weight gradient adds up to kParts partial sums in
// their order. So the bits are the same for any number of threads. Sums are chains over depth, K or the
// pixels of a row. An infinity in a weight times padding is NaN where torch has none: what is not finite is
// told.
#include "conv/conv.h"
#include "conv/layout.h"
#include "conv/products.h"
#include "conv/scratch.h"

namespace fastgan {
namespace {

constexpr int64_t kParts = 32;          // partial sums of the weight gradient
constexpr int64_t kWeightsInL1 = 4096;  // numbers
constexpr int64_t kTasks = 32;          // wanted at least
constexpr int64_t kBandSize = 12288;    // numbers of x in a band, about
constexpr int64_t kWide = 2 * lanes<float> > kSlice ? 2 * lanes<float> : kSlice;  // columns of a panel

typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));

FASTGAN_INLINE int64_t whole_panels_of(int64_t n) { return divide_up(n, kWide) * kWide; }

struct Shape {
  int64_t channels, segment, depth, columns;  // columns of y, whole panels
  int64_t across, pitch;                      // of a row of x in scratch: pixels, numbers
  int64_t bands, rows;                        // of outputs in a band

  explicit Shape(const ConvArgs& a) {
    channels = a.channels, segment = a.kernel * channels, depth = a.kernel * segment;
    columns = whole_panels_of(a.outputs);
    across = most((a.out_width - 1) * a.stride + a.kernel, a.width + a.pad_width);
    pitch = divide_up(across * channels, 16) * 16;
    bands = most(divide_up(kTasks, a.batch), divide_up(pitch * a.stride * a.out_height, kBandSize));
    rows = divide_up(a.out_height, least(bands, a.out_height));
    bands = divide_up(a.out_height, rows);
  }
  int64_t x_rows(const ConvArgs& a) const { return (rows - 1) * a.stride + a.kernel; }
};

// Rows [row, row + rows) of the padded image as (row, column, channel).
void read_band(const Image& image, int64_t row, int64_t rows, int64_t pad_height, int64_t pad_width,
               const Shape& shape, float* to) {
  const int64_t C = shape.channels, width = least(image.width, shape.across - pad_width);
  for (int64_t i = 0; i < rows; ++i, to += shape.pitch) {
    zero(to, shape.pitch);
    const int64_t at = row + i - pad_height;
    if (at < 0 || at >= image.height) continue;
    with_storage(image.dtype, image.data, [&](const auto* data) {
      const auto* from = data + at * image.row_stride;
      float* pixels = to + pad_width * C;
      if (image.channel_stride == 1 && image.column_stride == C) {
        for (int64_t j = 0; j < width * C; ++j) pixels[j] = load1<float>(from + j);
        return;
      }
      for (int64_t c = 0; c < C; ++c)
        for (int64_t j = 0; j < width; ++j)
          pixels[j * C + c] = load1<float>(from + c * image.channel_stride + j * image.column_stride);
    });
  }
}

// A row of y: all its pixels with their channels side by side, where it lies if it lies so and has no mask.
struct Row {
  const float* data;
  int64_t pixel_stride;
};

Row row_of_y(const ConvArgs& a, int64_t n, int64_t row, int64_t columns, float* scratch) {
  const Image image = image_of_y(a, n);
  if (!image.mask && image.channel_stride == 1 && a.dtype == Dtype::float32 && columns == a.outputs)
    return {static_cast<const float*>(a.y.data) + n * a.y.strides[0] + row * image.row_stride,
            image.column_stride};
  for (int64_t k = 0; k < columns; k += kSlice)
    read_window(image, k, {row, 1, 1, 0, a.out_width, columns}, scratch + k);
  return {scratch, columns};
}

// The weights as (panel, depth, kWide outputs), zero beyond them.
void pack_weights_forward(const ConvArgs& a, const Shape& shape, float* to) {
  const int64_t* s = a.w.strides;
  with_storage(a.dtype, a.w.data, [&](const auto* w) {
    for (int64_t panel = 0; panel < shape.columns; panel += kWide)
      for (int64_t r = 0; r < a.kernel; ++r)
        for (int64_t t = 0; t < a.kernel; ++t)
          for (int64_t c = 0; c < a.channels; ++c, to += kWide)
            for (int64_t k = 0; k < kWide; ++k)
              to[k] = panel + k < a.outputs
                          ? load1<float>(w + (panel + k) * s[0] + c * s[1] + r * s[2] + t * s[3])
                          : 0.0f;
  });
}

// The weights as (panel, outputs, kWide of depth), zero beyond it.
void pack_weights_backward(const ConvArgs& a, const Shape& shape, float* to) {
  const int64_t* s = a.w.strides;
  with_storage(a.dtype, a.w.data, [&](const auto* w) {
    for (int64_t panel = 0; panel < shape.depth; panel += kWide)
      for (int64_t k = 0; k < a.outputs; ++k, to += kWide)
        for (int64_t d = 0; d < kWide; ++d) {
          const int64_t r = (panel + d) / shape.segment, t = (panel + d) % shape.segment / a.channels;
          to[d] = panel + d < shape.depth
                      ? load1<float>(w + k * s[0] + (panel + d) % a.channels * s[1] + r * s[2] + t * s[3])
                      : 0.0f;
        }
  });
}

// ---- forward ----

template <int kCount>
__attribute__((noinline)) void patch_kernel(int64_t segments, int64_t segment, const float* a, int64_t pitch,
                                            int64_t step, const float* b, const float* bias, float slope,
                                            float* c, int64_t ldc, Check& check) {
  constexpr int W = lanes<float>;
  Vec<float> sums[kCount][2];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) sums[i][0] = sums[i][1] = Vec<float>{};
  for (int64_t r = 0; r < segments; ++r, a += pitch)
    for (int64_t k = 0; k < segment; ++k, b += kWide) {
      const Vec<float> b0 = load<float>(b), b1 = load<float>(b + W);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
        const Vec<float> x = broadcast<float>(a[k + i * step]);
        sums[i][0] += x * b0;
        sums[i][1] += x * b1;
      }
    }
  const Vec<float> bias0 = load<float>(bias), bias1 = load<float>(bias + W);
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    sums[i][0] += bias0, sums[i][1] += bias1;
    check.see(2 * i, sums[i][0]);
    check.see(2 * i + 1, sums[i][1]);
    store(c + i * ldc, activate(sums[i][0], slope));
    store(c + i * ldc + W, activate(sums[i][1], slope));
  }
}

FASTGAN_INLINE void patch_kernel_of(int count, int64_t segments, int64_t segment, const float* a,
                                    int64_t pitch, int64_t step, const float* b, const float* bias,
                                    float slope, float* c, int64_t ldc, Check& check) {
  switch (count) {
    case 6:
      return patch_kernel<6>(segments, segment, a, pitch, step, b, bias, slope, c, ldc, check);
    case 5:
      return patch_kernel<5>(segments, segment, a, pitch, step, b, bias, slope, c, ldc, check);
    case 4:
      return patch_kernel<4>(segments, segment, a, pitch, step, b, bias, slope, c, ldc, check);
    case 3:
      return patch_kernel<3>(segments, segment, a, pitch, step, b, bias, slope, c, ldc, check);
    case 2:
      return patch_kernel<2>(segments, segment, a, pitch, step, b, bias, slope, c, ldc, check);
    default:
      return patch_kernel<1>(segments, segment, a, pitch, step, b, bias, slope, c, ldc, check);
  }
}

void forward(const ConvArgs& a, const Threads& threads) {
  const Shape shape(a);
  const int64_t band = shape.x_rows(a) * shape.pitch, out = a.out_width * kWide;
  Cutter cutter{static_cast<char*>(a.workspace)};
  Slots slots(cutter, band + out, a.threads);
  float* weights = reinterpret_cast<float*>(cutter.take(shape.depth * shape.columns * 4));
  float* bias = reinterpret_cast<float*>(cutter.take(shape.columns * 4));
  if (!a.workspace) {
    *a.workspace_size = cutter.used;
    return;
  }
  pack_weights_forward(a, shape, weights);
  for (int64_t k = 0; k < shape.columns; ++k) bias[k] = a.bias && k < a.outputs ? a.bias[k] : 0.0f;
  over_slots(threads, slots, a.batch * shape.bands, [&](int64_t task, float* scratch) {
    const int64_t n = task / shape.bands, first = task % shape.bands * shape.rows;
    const int64_t rows = least(shape.rows, a.out_height - first), step = a.stride * shape.channels;
    float* pixels = scratch + band;
    Check check;
    read_band(image_of(a.x, a.dtype, n, a.channels, a.height, a.width), first * a.stride,
              (rows - 1) * a.stride + a.kernel, a.pad_height, a.pad_width, shape, scratch);
    const Image image = image_of(a.y, a.dtype, n, a.outputs, a.out_height, a.out_width);
    // Where y has its channels side by side, sums go where they belong, all channels of six pixels at a time
    // if the weights stay in L1; else a panel of a row is laid out by write_window.
    const bool in_place =
        image.channel_stride == 1 && a.dtype == Dtype::float32 && shape.columns == a.outputs;
    const int64_t panels = in_place && shape.depth * shape.columns <= kWeightsInL1 ? shape.columns : kWide;
    for (int64_t i = 0; i < rows; ++i) {
      float* row = in_place
                       ? static_cast<float*>(a.y.data) + n * a.y.strides[0] + (first + i) * image.row_stride
                       : nullptr;
      for (int64_t group = 0; group < shape.columns; group += panels) {
        int count;
        for (int64_t j = 0; j < a.out_width; j += count) {
          const int64_t left = a.out_width - j;
          count = int(left <= kMicroRows ? left : left < 2 * kMicroRows ? (left + 1) / 2 : kMicroRows);
          for (int64_t k = group; k < group + panels; k += 2 * lanes<float>)
            patch_kernel_of(count, a.kernel, shape.segment, scratch + i * a.stride * shape.pitch + j * step,
                            shape.pitch, step, weights + k / kWide * kWide * shape.depth + k % kWide,
                            bias + k, a.slope,
                            in_place ? row + j * image.column_stride + k : pixels + j * kWide + k - group,
                            in_place ? image.column_stride : kWide, check);
        }
        for (int64_t slice = 0; !in_place && slice < kWide; slice += kSlice)
          write_window(pixels + slice, {first + i, 1, 1, 0, a.out_width, kWide}, image, group + slice);
      }
    }
    check.tell(a.nonfinite);
  });
}

// ---- input gradient ----

// Adds the products of a row of outputs, their segment r, to a row of x. Outputs that do not overlap come one
// after another, so that no number is read right after it was written.
void add_segments(const float* products, int64_t width, int64_t outputs, int64_t segment, int64_t step,
                  int64_t overlap, float* row) {
  for (int64_t begin = 0; begin < overlap; ++begin)
    for (int64_t j = begin; j < outputs; j += overlap) {
      const float* from = products + j * width;
      float* to = row + j * step;
      int64_t d = 0;
      for (; d + 4 <= segment; d += 4)
        *reinterpret_cast<Quad*>(to + d) += *reinterpret_cast<const Quad*>(from + d);
      for (; d < segment; ++d) to[d] += from[d];
    }
}

void write_band(const Image& image, int64_t row, int64_t rows, int64_t pad_width, const Shape& shape,
                const float* bias, float slope, const float* from) {
  const int64_t C = shape.channels;
  for (int64_t i = 0; i < rows; ++i, from += shape.pitch)
    with_storage(image.dtype, image.data, [&](auto* data) {
      auto* to = data + (row + i) * image.row_stride;
      const float* pixels = from + pad_width * C;
      if (!bias && slope == 1 && image.channel_stride == 1 && image.column_stride == C) {
        for (int64_t j = 0; j < image.width * C; ++j) store1(to + j, pixels[j]);
        return;
      }
      for (int64_t c = 0; c < C; ++c)
        for (int64_t j = 0; j < image.width; ++j)
          store1(to + c * image.channel_stride + j * image.column_stride,
                 activate(pixels[j * C + c] + (bias ? bias[c] : 0.0f), slope));
    });
}

void input_gradient(const ConvArgs& a, const Threads& threads) {
  const Shape shape(a);
  const int64_t width = whole_panels_of(shape.depth), columns = whole_slices(a.outputs);
  const int64_t bands = least(shape.bands, a.height), rows = divide_up(a.height, bands);
  const int64_t band = rows * shape.pitch, sums = a.out_width * width;
  Cutter cutter{static_cast<char*>(a.workspace)};
  Slots slots(cutter, band + sums + a.out_width * columns, a.threads);
  float* weights = reinterpret_cast<float*>(cutter.take(a.outputs * width * 4));
  if (!a.workspace) {
    *a.workspace_size = cutter.used;
    return;
  }
  pack_weights_backward(a, shape, weights);
  over_slots(threads, slots, a.batch * bands, [&](int64_t task, float* scratch) {
    const int64_t n = task / bands, first = task % bands * rows, count = least(rows, a.height - first);
    if (count <= 0) return;
    float *products = scratch + band, *pixels = products + sums;
    zero(scratch, count * shape.pitch);
    // Row q of the padded image is row q - pad of x; output row i reaches rows stride * i + r.
    const int64_t top = first + a.pad_height, bottom = top + count;
    const int64_t begin = most(0, divide_up(top - a.kernel + 1, a.stride));
    for (int64_t i = begin; i < a.out_height && i * a.stride < bottom; ++i) {
      const Row y = row_of_y(a, n, i, columns, pixels);
      for (int64_t d = 0; d < width; d += kWide)
        multiply_point<false>(a.out_width, kWide, a.outputs, y.data, y.pixel_stride, weights + d * a.outputs,
                              kWide, products + d, width, false);
      for (int64_t r = 0; r < a.kernel; ++r) {
        const int64_t row = i * a.stride + r - top;
        if (row >= 0 && row < count)
          add_segments(products + r * shape.segment, width, a.out_width, shape.segment,
                       a.stride * shape.channels, divide_up(a.kernel, a.stride), scratch + row * shape.pitch);
      }
    }
    Check check;
    for (int64_t i = 0; i < count * shape.pitch; i += lanes<float>) {
      const Vec<float> v = load<float>(scratch + i);
      check.see(0, v);
    }
    check.tell(a.nonfinite);
    write_band(image_of(a.x, a.dtype, n, a.channels, a.height, a.width), first, count, a.pad_width, shape,
               a.bias, a.slope, scratch);
  });
}

// ---- weight gradient ----

void weight_gradient(const ConvArgs& a, const Threads& threads) {
  const Shape shape(a);
  const int64_t columns = whole_slices(a.outputs), sums_size = shape.depth * columns;
  const int64_t band = shape.x_rows(a) * shape.pitch, units = a.batch * shape.bands;
  const int64_t parts = least(units, kParts);
  Cutter cutter{static_cast<char*>(a.workspace)};
  Slots slots(cutter, band + a.out_width * columns, a.threads);
  float* partial = reinterpret_cast<float*>(cutter.take(parts * sums_size * 4));
  if (!a.workspace) {
    *a.workspace_size = cutter.used;
    return;
  }
  over_slots(threads, slots, parts, [&](int64_t part, float* scratch) {
    float *sums = partial + part * sums_size, *pixels = scratch + band;
    bool add = false;
    for (int64_t unit = units * part / parts; unit < units * (part + 1) / parts; ++unit) {
      const int64_t n = unit / shape.bands, first = unit % shape.bands * shape.rows;
      const int64_t rows = least(shape.rows, a.out_height - first);
      read_band(image_of(a.x, a.dtype, n, a.channels, a.height, a.width), first * a.stride,
                (rows - 1) * a.stride + a.kernel, a.pad_height, a.pad_width, shape, scratch);
      for (int64_t i = 0; i < rows; ++i, add = true) {
        const Row y = row_of_y(a, n, first + i, columns, pixels);
        for (int64_t r = 0; r < a.kernel; ++r)
          multiply_point<true>(shape.segment, columns, a.out_width,
                               scratch + (i * a.stride + r) * shape.pitch, a.stride * shape.channels, y.data,
                               y.pixel_stride, sums + r * shape.segment * columns, columns, add);
      }
    }
  });
  parallel_for(threads, shape.depth, 4, [&](int64_t begin, int64_t end) {
    const int64_t* s = a.w.strides;
    Check check;
    for (int64_t d = begin; d < end; ++d) {
      float* total = partial + d * columns;
      for (int64_t k = 0; k < columns; k += lanes<float>) {
        Vec<float> sum = load<float>(total + k);
        for (int64_t part = 1; part < parts; ++part) sum += load<float>(total + part * sums_size + k);
        check.see(0, sum);
        store(total + k, sum);
      }
      const int64_t r = d / shape.segment, t = d % shape.segment / a.channels, c = d % a.channels;
      with_storage(a.dtype, a.w.data, [&](auto* w) {
        for (int64_t k = 0; k < a.outputs; ++k)
          store1(w + k * s[0] + c * s[1] + r * s[2] + t * s[3], total[k]);
      });
    }
    check.tell(a.nonfinite);
  });
}

}  // namespace
}  // namespace fastgan

extern "C" void FASTGAN_KERNEL(conv_direct_forward)(const fastgan::ConvArgs& a,
                                                    const fastgan::Threads& threads) {
  fastgan::forward(a, threads);
}

extern "C" void FASTGAN_KERNEL(conv_direct_input_gradient)(const fastgan::ConvArgs& a,
                                                           const fastgan::Threads& threads) {
  fastgan::input_gradient(a, threads);
}

extern "C" void FASTGAN_KERNEL(conv_direct_weight_gradient)(const fastgan::ConvArgs& a,
                                                            const fastgan::Threads& threads) {
  fastgan::weight_gradient(a, threads);
}
