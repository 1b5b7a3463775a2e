// Between tensors of any strides and tiles of scratch in which channels are contiguous: everything that knows
// of edges, padding, remainders, layouts and storage types is here, so that transforms and products only meet
// whole tiles.
//
// A window is rows × columns × kSlice channels of scratch; window row i is row  row0 + i * row_step  of the
// tensor, likewise the columns (of step 1), and what lies outside is zero on reading and dropped on writing.
#pragma once
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

// One image of a tensor: (channels, height, width).
struct Image {
  Dtype dtype;
  char* data;
  int64_t channel_stride, row_stride, column_stride;
  int64_t channels, height, width;
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

FASTGAN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTGAN_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

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

template <class Storage>
void read_row(const Storage* from, int64_t channel_stride, int64_t column_stride, int64_t channels,
              int64_t columns, float* to, int64_t pixel_stride) {
  constexpr int W = lanes<float>;
  int64_t done = 0;
  if (column_stride == 1 && channels == kSlice) {
    // Channel by channel: planes are often a multiple of 4096 bytes apart, and all sixteen would meet in one
    // set of the first cache.
    const int64_t whole = columns / W * W;
    for (int64_t c = 0; c < kSlice; c += W)
      for (done = 0; done < whole; done += W) {
        Vec<float> square[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) square[i] = load<float>(from + (c + i) * channel_stride + done);
        transpose<float>(square);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(to + (done + i) * pixel_stride + c, square[i]);
      }
  } else if (channel_stride == 1 && channels == kSlice) {
    for (; done < columns; ++done)
#pragma GCC unroll 4
      for (int64_t c = 0; c < kSlice; c += W)
        store(to + done * pixel_stride + c, load<float>(from + done * column_stride + c));
  }
  for (; done < columns; ++done)
    for (int64_t c = 0; c < kSlice; ++c)
      to[done * pixel_stride + c] =
          c < channels ? load1<float>(from + c * channel_stride + done * column_stride) : 0.0f;
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
      read_row(data + channel * image.channel_stride + at * image.row_stride +
                   (window.column0 + before) * image.column_stride,
               image.channel_stride, image.column_stride, channels, end - before,
               row + before * window.pixel_stride, window.pixel_stride);
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
        Vec<float> square[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) square[i] = load<float>(from + (done + i) * pixel_stride + c);
        transpose<float>(square);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(to + (c + i) * channel_stride + done, square[i]);
      }
  } else if (channel_stride == 1 && channels == kSlice) {
    for (; done < columns; ++done)
#pragma GCC unroll 4
      for (int64_t c = 0; c < kSlice; c += W)
        store(to + done * column_stride + c, load<float>(from + done * pixel_stride + c));
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

// ---- weights: the kTaps numbers of a (row channel, column channel) pair, vectors over one of the two ----

struct Weights {
  Dtype dtype;
  void* data;
  int64_t lane_stride, lanes;  // the channel that vectors run over, and how many there are
  int64_t row_stride, rows;    // the other one
  int64_t r_stride, s_stride;
};

// taps[r * kKernel + s] for lanes [lane, lane + vector) of row `row`; zero where there is none.
template <int kKernel>
FASTGAN_INLINE void read_taps(const Weights& w, int64_t row, int64_t lane,
                              Vec<float> (&taps)[kKernel * kKernel]) {
  constexpr int W = lanes<float>, kTaps = kKernel * kKernel;
  const int64_t count = row < w.rows ? least(W, w.lanes - lane) : 0;
  if (count <= 0) {
    for (Vec<float>& tap : taps) tap = Vec<float>{};
    return;
  }
  with_storage(w.dtype, w.data, [&](const auto* data) {
    const auto* from = data + row * w.row_stride + lane * w.lane_stride;
    if (count == W && w.lane_stride == 1) {
#pragma GCC unroll 16
      for (int t = 0; t < kTaps; ++t)
        taps[t] = load<float>(from + t / kKernel * w.r_stride + t % kKernel * w.s_stride);
      return;
    }
    if constexpr (kTaps % W == 0) {
      if (count == W && w.s_stride == 1 && w.r_stride == kKernel) {
#pragma GCC unroll 4
        for (int part = 0; part < kTaps; part += W) {
          Vec<float> square[W];
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) square[i] = load<float>(from + i * w.lane_stride + part);
          transpose<float>(square);
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) taps[part + i] = square[i];
        }
        return;
      }
    }
    float buffer[kTaps][W];
    for (int t = 0; t < kTaps; ++t)
      for (int i = 0; i < W; ++i)
        buffer[t][i] =
            i < count
                ? load1<float>(from + i * w.lane_stride + t / kKernel * w.r_stride + t % kKernel * w.s_stride)
                : 0.0f;
    for (int t = 0; t < kTaps; ++t) taps[t] = load<float>(buffer[t]);
  });
}

template <int kKernel>
FASTGAN_INLINE void write_taps(const Weights& w, int64_t row, int64_t lane,
                               const Vec<float> (&taps)[kKernel * kKernel]) {
  constexpr int W = lanes<float>, kTaps = kKernel * kKernel;
  const int64_t count = row < w.rows ? least(W, w.lanes - lane) : 0;
  if (count <= 0) return;
  with_storage(w.dtype, w.data, [&](auto* data) {
    auto* to = data + row * w.row_stride + lane * w.lane_stride;
    if (count == W && w.lane_stride == 1) {
      for (int t = 0; t < kTaps; ++t)
        store(to + t / kKernel * w.r_stride + t % kKernel * w.s_stride, taps[t]);
      return;
    }
    if constexpr (kTaps % W == 0) {
      if (count == W && w.s_stride == 1 && w.r_stride == kKernel) {
#pragma GCC unroll 4
        for (int part = 0; part < kTaps; part += W) {
          Vec<float> square[W];
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) square[i] = taps[part + i];
          transpose<float>(square);
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) store(to + i * w.lane_stride + part, square[i]);
        }
        return;
      }
    }
    for (int t = 0; t < kTaps; ++t)
      for (int i = 0; i < count; ++i)
        store1(to + i * w.lane_stride + t / kKernel * w.r_stride + t % kKernel * w.s_stride, taps[t][i]);
  });
}

}  // namespace
}  // namespace fastgan
