// Between tensors of any strides and tiles of scratch in which channels are contiguous: everything that knows
// of edges, padding, remainders, layouts and storage types is here, so that transforms and products only meet
// whole tiles.
//
// A window is rows × columns × kSlice channels of scratch; window row i is row  row0 + i * row_step  of the
// tensor, likewise the columns (of step 1), and what lies outside is zero on reading and dropped on writing.
#pragma once
#include <type_traits>

#include "common/gemm.h"
#include "common/types.h"
#include "conv/conv.h"

namespace fastgan {
namespace {

constexpr int kSlice = 16;  // channels

struct Window {
  int64_t row0, row_step, rows, column0, columns;
  int64_t pixel_stride;  // of the scratch, from a column to the next
};

// One image of a tensor: (channels, height, width). Where there is a mask, reading gives the numbers times
// the derivative of an activation whose results lie there, at the same strides.
struct Image {
  Dtype dtype;
  char* data;
  int64_t channel_stride, row_stride, column_stride;
  int64_t channels, height, width;
  const char* mask = nullptr;
  float mask_slope = 1;
};

FASTGAN_INLINE int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline Image image_of(const ConvTensor& tensor, Dtype dtype, int64_t n, int64_t channels, int64_t height,
                      int64_t width) {
  return {dtype,
          static_cast<char*>(tensor.data) + n * tensor.strides[0] * size_of(dtype),
          tensor.strides[1],
          tensor.strides[2],
          tensor.strides[3],
          channels,
          height,
          width};
}

// y, as the two gradients read it.
inline Image image_of_y(const ConvArgs& a, int64_t n) {
  Image image = image_of(a.y, a.dtype, n, a.outputs, a.out_height, a.out_width);
  if (a.mask) image.mask = static_cast<const char*>(a.mask) + (image.data - static_cast<char*>(a.y.data));
  image.mask_slope = a.mask_slope;
  return image;
}

FASTGAN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTGAN_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// ReLU (slope 0), leaky ReLU, or nothing (1).
FASTGAN_INLINE Vec<float> activate(Vec<float> v, float slope) { return select(v > 0.0f, v, v * slope); }
FASTGAN_INLINE float activate(float v, float slope) { return v > 0.0f ? v : v * slope; }

// A gradient times the derivative where the result is `y`; as torch's, also where that is NaN.
FASTGAN_INLINE Vec<float> masked(Vec<float> gradient, Vec<float> y, float slope) {
  if (slope == 0) return select(y <= 0.0f, Vec<float>{}, gradient);
  return select(y > 0.0f, gradient, gradient * slope);
}
FASTGAN_INLINE float masked(float gradient, float y, float slope) {
  if (slope == 0) return y <= 0.0f ? 0.0f : gradient;
  return y > 0.0f ? gradient : gradient * slope;
}

FASTGAN_INLINE void zero(float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = 0;
}

// Calls body(pointer of the storage type) for the tensor's dtype.
template <class Body>
FASTGAN_INLINE void with_storage(Dtype dtype, void* data, const Body& body) {
  switch (dtype) {
    case Dtype::bfloat16:
      return body(static_cast<bfloat16*>(data));
    case Dtype::float16:
      return body(static_cast<float16*>(data));
    default:
      return body(static_cast<float*>(data));
  }
}

// Rows of a matrix of W vectors become columns: load(i) is row i, store(i, v) takes column i.
template <class Load, class Store>
FASTGAN_INLINE void exchange(const Load& load_row, const Store& store_column) {
  constexpr int W = lanes<float>;
  Vec<float> square[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) square[i] = load_row(i);
  transpose<float>(square);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store_column(i, square[i]);
}

// What is read, and the mask beside it if there is one.
template <class Storage, bool kMasked>
struct Reading {
  const Storage *from, *mask;
  float slope;

  FASTGAN_INLINE Vec<float> vector(int64_t at) const {
    const Vec<float> v = load<float>(from + at);
    if constexpr (kMasked) return masked(v, load<float>(mask + at), slope);
    return v;
  }
  FASTGAN_INLINE float one(int64_t at) const {
    const float v = load1<float>(from + at);
    if constexpr (kMasked) return masked(v, load1<float>(mask + at), slope);
    return v;
  }
  FASTGAN_INLINE void prefetch(int64_t at) const {
    __builtin_prefetch(from + at, 0, 2);
    if constexpr (kMasked) __builtin_prefetch(mask + at, 0, 2);
  }
};

template <class Reading>
void read_row(const Reading& read, int64_t channel_stride, int64_t column_stride, int64_t channels,
              int64_t columns, float* to, int64_t pixel_stride) {
  constexpr int W = lanes<float>;
  int64_t done = 0;
  if (column_stride == 1 && channels == kSlice) {
    // Channel by channel: planes are often a multiple of 4096 bytes apart, and all sixteen would meet in one
    // set of the first cache.
    const int64_t whole = columns / W * W;
    for (int64_t c = 0; c < kSlice; c += W)
      for (done = 0; done < whole; done += W) {
        exchange([&](int i) { return read.vector((c + i) * channel_stride + done); },
                 [&](int i, Vec<float> v) { store(to + (done + i) * pixel_stride + c, v); });
      }
  } else if (channel_stride == 1 && channels == kSlice) {
    for (; done < columns; ++done) {
      // The next slice of these pixels is what is read next, and no hardware foresees it.
      read.prefetch(done * column_stride + kSlice);
#pragma GCC unroll 4
      for (int64_t c = 0; c < kSlice; c += W)
        store(to + done * pixel_stride + c, read.vector(done * column_stride + c));
    }
  }
  for (; done < columns; ++done)
    for (int64_t c = 0; c < kSlice; ++c)
      to[done * pixel_stride + c] = c < channels ? read.one(c * channel_stride + done * column_stride) : 0.0f;
}

// Channels [channel, channel + kSlice) of the image into a window of scratch.
inline void read_window(const Image& image, int64_t channel, const Window& window, float* to) {
  const int64_t channels = least(kSlice, image.channels - channel);
  const int64_t before = least(most(-window.column0, 0), window.columns);
  const int64_t end = most(least(image.width - window.column0, window.columns), before);
  for (int64_t i = 0; i < window.rows; ++i) {
    float* row = to + i * window.columns * window.pixel_stride;
    const int64_t at = window.row0 + i * window.row_step;
    const bool inside = channels > 0 && at >= 0 && at < image.height && end > before;
    const int64_t first = inside ? before : window.columns, last = inside ? end : window.columns;
    for (int64_t j = 0; j < first; ++j) zero(row + j * window.pixel_stride, kSlice);
    for (int64_t j = last; j < window.columns; ++j) zero(row + j * window.pixel_stride, kSlice);
    if (!inside) continue;
    with_storage(image.dtype, image.data, [&](auto* data) {
      using Storage = std::remove_reference_t<decltype(*data)>;
      const int64_t first_one = channel * image.channel_stride + at * image.row_stride +
                                (window.column0 + before) * image.column_stride;
      const auto read = [&](const auto& reading) {
        read_row(reading, image.channel_stride, image.column_stride, channels, end - before,
                 row + before * window.pixel_stride, window.pixel_stride);
      };
      if (image.mask)
        read(Reading<Storage, true>{
            data + first_one, reinterpret_cast<const Storage*>(image.mask) + first_one, image.mask_slope});
      else
        read(Reading<Storage, false>{data + first_one, nullptr, 1});
    });
  }
}

template <class Storage>
void write_row(const float* from, int64_t pixel_stride, Storage* to, int64_t channel_stride,
               int64_t column_stride, int64_t channels, int64_t columns) {
  constexpr int W = lanes<float>;
  int64_t done = 0;
  if (column_stride == 1 && channels == kSlice) {
    const int64_t whole = columns / W * W;
    for (int64_t c = 0; c < kSlice; c += W)
      for (done = 0; done < whole; done += W) {
        exchange([&](int i) { return load<float>(from + (done + i) * pixel_stride + c); },
                 [&](int i, Vec<float> v) { store(to + (c + i) * channel_stride + done, v); });
      }
  } else if (channel_stride == 1 && channels == kSlice) {
    for (; done < columns; ++done) {
#pragma GCC unroll 4
      for (int64_t c = 0; c < kSlice; c += W)
        store(to + done * column_stride + c, load<float>(from + done * pixel_stride + c));
    }
  }
  for (; done < columns; ++done)
    for (int64_t c = 0; c < channels; ++c)
      store1(to + c * channel_stride + done * column_stride, from[done * pixel_stride + c]);
}

// A window of scratch into channels [channel, channel + kSlice) of the image.
inline void write_window(const float* from, const Window& window, const Image& image, int64_t channel) {
  const int64_t channels = least(kSlice, image.channels - channel);
  const int64_t before = least(most(-window.column0, 0), window.columns);
  const int64_t end = least(image.width - window.column0, window.columns);
  if (channels <= 0 || end <= before) return;
  for (int64_t i = 0; i < window.rows; ++i) {
    const int64_t at = window.row0 + i * window.row_step;
    if (at < 0 || at >= image.height) continue;
    with_storage(image.dtype, image.data, [&](auto* data) {
      write_row(from + (i * window.columns + before) * window.pixel_stride, window.pixel_stride,
                data + channel * image.channel_stride + at * image.row_stride +
                    (window.column0 + before) * image.column_stride,
                image.channel_stride, image.column_stride, channels, end - before);
    });
  }
}

// ---- weights: the kernel's taps for pairs of channels, vectors over one of the two ----

struct Weights {
  Dtype dtype;
  void* data;
  int64_t lane_stride, lanes;  // the channel that vectors run over, and how many there are
  int64_t row_stride, rows;    // the other one
  int64_t r_stride, s_stride;
};

// Taps of kSlice rows from `row` on and `columns` lanes from `lane` on: (row, tap, lane) in scratch.
template <int kKernel>
struct TapBlock {
  static constexpr int kTaps = kKernel * kKernel;
  static constexpr int64_t size(int64_t columns) { return kSlice * kTaps * columns; }
  float* data;
  int64_t row, lane, columns;
  FASTGAN_INLINE float* at(int64_t r, int tap) const { return data + (r * kTaps + tap) * columns; }
};

// Calls, for what there is of the block, the fastest of these, `p` pointing at the weights' first of them:
//   straight(p, r, tap, l)   lanes l to l + W of row r and this tap, contiguous in the weights
//   by_rows(p, r, tap, l)    the same of rows r to r + W, of which each lane is contiguous in the weights
//   by_taps(p, r, tap, l)    the same of row r and taps tap to tap + W, contiguous likewise
//   single(p, r, tap, l)     one number
// For taps of the kernel's rows first, first + step, ... alone (and others where it costs nothing to have
// them).
template <int kKernel, class Storage, class Straight, class ByRows, class ByTaps, class Single>
FASTGAN_INLINE void over_taps(const Weights& w, const TapBlock<kKernel>& block, Storage* data, int first,
                              int step, const Straight& straight, const ByRows& by_rows,
                              const ByTaps& by_taps, const Single& single) {
  constexpr int W = lanes<float>, kTaps = kKernel * kKernel;
  const int64_t rows = least(kSlice, w.rows - block.row),
                columns = least(block.columns, w.lanes - block.lane);
  auto place = [&](int64_t r, int tap, int64_t l) {
    return data + (block.row + r) * w.row_stride + (block.lane + l) * w.lane_stride +
           tap / kKernel * w.r_stride + tap % kKernel * w.s_stride;
  };
  auto wanted = [&](int tap) { return tap / kKernel >= first && (tap / kKernel - first) % step == 0; };
  int64_t done = 0;  // lanes
  if (w.lane_stride == 1) {
    done = columns / W * W;
    for (int64_t r = 0; r < rows; ++r)
      for (int tap = 0; tap < kTaps; ++tap)
        if (wanted(tap))
          for (int64_t l = 0; l < done; l += W) straight(place(r, tap, l), r, tap, l);
  } else if (w.row_stride == 1 && rows == kSlice) {
    done = columns / W * W;
    for (int64_t l = 0; l < done; l += W)
      for (int tap = 0; tap < kTaps; ++tap)
        if (wanted(tap))
          for (int64_t r = 0; r < kSlice; r += W) by_rows(place(r, tap, l), r, tap, l);
  } else if (w.s_stride == 1 && w.r_stride == kKernel && kTaps >= W) {
    done = columns / W * W;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t l = 0; l < done; l += W) {
        int tap = 0;
        for (; tap + W <= kTaps; tap += W) by_taps(place(r, tap, l), r, tap, l);
        for (; tap < kTaps; ++tap)
          for (int64_t i = 0; i < W; ++i) single(place(r, tap, l + i), r, tap, l + i);
      }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int tap = 0; tap < kTaps; ++tap)
      if (wanted(tap))
        for (int64_t l = done; l < columns; ++l) single(place(r, tap, l), r, tap, l);
}

// The weights' taps into the block, of the kernel's rows first, first + step, ... at least; zero where there
// are none.
template <int kKernel>
void read_taps(const Weights& w, const TapBlock<kKernel>& block, int first = 0, int step = 1) {
  if (w.rows - block.row < kSlice || w.lanes - block.lane < block.columns)
    zero(block.data, block.size(block.columns));
  with_storage(w.dtype, w.data, [&](const auto* data) {
    using Storage = std::remove_reference_t<decltype(*data)>;
    over_taps<kKernel>(
        w, block, data, first, step,
        [&](Storage* from, int64_t r, int tap, int64_t l) {
          __builtin_prefetch(from + kSlice * w.row_stride, 0, 2);
          store(block.at(r, tap) + l, load<float>(from));
        },
        [&](Storage* from, int64_t r, int tap, int64_t l) {
          exchange(
              [&](int i) {
                __builtin_prefetch(from + i * w.lane_stride + kSlice, 0, 2);
                return load<float>(from + i * w.lane_stride);
              },
              [&](int i, Vec<float> v) { store(block.at(r + i, tap) + l, v); });
        },
        [&](Storage* from, int64_t r, int tap, int64_t l) {
          exchange([&](int i) { return load<float>(from + i * w.lane_stride); },
                   [&](int i, Vec<float> v) { store(block.at(r, tap + i) + l, v); });
        },
        [&](Storage* from, int64_t r, int tap, int64_t l) { block.at(r, tap)[l] = load1<float>(from); });
  });
}

// The block into the weights, as far as there are any.
template <int kKernel>
void write_taps(const Weights& w, const TapBlock<kKernel>& block) {
  with_storage(w.dtype, w.data, [&](auto* data) {
    using Storage = std::remove_reference_t<decltype(*data)>;
    over_taps<kKernel>(
        w, block, data, 0, 1,
        [&](Storage* to, int64_t r, int tap, int64_t l) { store(to, load<float>(block.at(r, tap) + l)); },
        [&](Storage* to, int64_t r, int tap, int64_t l) {
          exchange([&](int i) { return load<float>(block.at(r + i, tap) + l); },
                   [&](int i, Vec<float> v) { store(to + i * w.lane_stride, v); });
        },
        [&](Storage* to, int64_t r, int tap, int64_t l) {
          exchange([&](int i) { return load<float>(block.at(r, tap + i) + l); },
                   [&](int i, Vec<float> v) { store(to + i * w.lane_stride, v); });
        },
        [&](Storage* to, int64_t r, int tap, int64_t l) { store1(to, block.at(r, tap)[l]); });
  });
}

}  // namespace
}  // namespace fastgan
