// A discriminator's last convolution with its loss: few output channels (one, usually), many input channels.
//
// Such a convolution is a set of dot products along the channels, so everything here is vectorised over
// channels: a group of 2V of them (V lanes) at a time, two vectors, whatever the picture's size. The input is
// read where it lies; a tile of it, zero-padded, goes into a scratch area of the thread (tiles.h). After that
// there are no borders and no layouts:
//
//   forward      logits of six neighbouring outputs in registers, over all taps and groups of the tile; one
//                horizontal sum a logit at the end. The image's logits go through the loss (losses.h) while
//                they are in the cache.
//   grad_input   each pixel gathers over the taps that see it from a zero-padded row of logit gradients; a
//                thread has an image.
//   grad_weight  each (tap, group) is a sum over outputs and images; a thread has channels and passes over
//                all images, so that nothing is added across threads.
//
// If the kernel covers the whole image (DCGAN's 4x4 on 4x4) and an image is dense in memory, the three need
// no tile at all: covering.h.
//
// Work is cut by shape alone, and each sum has one fixed order: the bits do not depend on the number of
// threads.
#include "gan_loss/covering.h"
#include "gan_loss/gan_loss.h"
#include "gan_loss/tiles.h"

namespace fastgan {
namespace {

// ---- forward, by tiles ----

// R neighbouring outputs: sums over all groups of the tile and all taps, added to sums[R].
template <class T, int R>
FASTGAN_INLINE void dot_taps(const Args& a, const Tile& t, int64_t groups, const T* tile, const T* weight,
                             Vec<T>* sums) {
  constexpr int V = lanes<T>, G = kGroup<T>;
  Vec<T> acc[R][2] = {};
  int64_t step = a.stride[1] * G;
  for (int64_t g = 0; g < groups; ++g, tile += t.pitch) {
    for (int64_t i = 0; i < a.kernel_height; ++i) {
      const T* x = tile + i * t.width * G;
      for (int64_t j = 0; j < a.kernel_width; ++j, x += G, weight += G) {
        Vec<T> w0 = load(weight), w1 = load(weight + V);
        for (int r = 0; r < R; ++r) {
          acc[r][0] += load(x + r * step) * w0;
          acc[r][1] += load(x + r * step + V) * w1;
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) sums[r] += acc[r][0] + acc[r][1];
}

template <class S, class T>
void forward_tiles(const Args& a, const Threads& threads) {
  constexpr int G = kGroup<T>;
  int64_t groups = up(a.channels, G), taps = a.kernel_height * a.kernel_width;
  T* weight = static_cast<T*>(a.workspace);
  pack_weight<S, T>(a, weight);
  int64_t blocks =
      larger(up(a.out_height, rows_that_fit<T>(a)), smaller(a.out_height, up(8, larger(1, a.batch))));
  int64_t out_rows = up(a.out_height, blocks);
  blocks = up(a.out_height, out_rows);
  Tile t = tile_for<T>(a, out_rows, groups);
  parallel_for(threads, a.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    int64_t per_output = out_rows * a.out_width;
    Scratch<T> tile(a, t.groups * t.pitch);
    Scratch<Vec<T>> sums(a, a.outputs * per_output);
    if (!tile.data || !sums.data) return;
    for (int64_t unit = begin; unit < end; ++unit) {
      int64_t n = unit / blocks, y0 = unit % blocks * out_rows, rows = smaller(out_rows, a.out_height - y0);
      __builtin_memset(sums.data, 0, size_t(a.outputs * per_output) * sizeof(Vec<T>));
      for (int64_t g = 0; g < groups; g += t.groups) {
        int64_t count = smaller(t.groups, groups - g);
        Tile part = t;
        part.rows = (rows - 1) * a.stride[0] + a.kernel_height;
        pack<S, T>(a, part, n, y0 * a.stride[0], g, count, tile.data);
        for (int64_t k = 0; k < a.outputs; ++k)
          for (int64_t y = 0; y < rows; ++y)
            for (int64_t x = 0; x < a.out_width; x += kOutputs) {
              const T* from = tile.data + (y * a.stride[0] * t.width + x * a.stride[1]) * G;
              const T* w = weight + (k * groups + g) * taps * G;
              Vec<T>* to = sums.data + k * per_output + y * a.out_width + x;
              switch (smaller(kOutputs, a.out_width - x)) {
                case 6:
                  dot_taps<T, 6>(a, t, count, from, w, to);
                  break;
                case 5:
                  dot_taps<T, 5>(a, t, count, from, w, to);
                  break;
                case 4:
                  dot_taps<T, 4>(a, t, count, from, w, to);
                  break;
                case 3:
                  dot_taps<T, 3>(a, t, count, from, w, to);
                  break;
                case 2:
                  dot_taps<T, 2>(a, t, count, from, w, to);
                  break;
                default:
                  dot_taps<T, 1>(a, t, count, from, w, to);
              }
            }
      }
      for (int64_t k = 0; k < a.outputs; ++k) {
        T bias = a.bias ? load1<T>(static_cast<const S*>(a.bias) + k * a.bias_stride) : T(0);
        S* logits = static_cast<S*>(a.logits) + ((n * a.outputs + k) * a.out_height + y0) * a.out_width;
        for (int64_t i = 0; i < rows * a.out_width; ++i)
          store1(logits + i, sum<T>(sums.data[k * per_output + i]) + bias);
      }
      loss_of_rows<S, T>(a, n, y0, y0 + rows);
    }
  });
}

// ---- backward, by tiles ----

// Pixels x .. x + R of input row y: the 2V channels' gradients into out[R][2V]. `gradients` holds, for each k
// and output row, the logits' gradients at their places among the padded input's columns with zeros between
// and around.
template <class T, int R>
FASTGAN_INLINE void gather_taps(const Args& a, int64_t groups, const T* weight, const T* gradients,
                                int64_t width, int64_t y, int64_t x, T* out) {
  constexpr int V = lanes<T>, G = kGroup<T>;
  Vec<T> acc[R][2] = {};
  int64_t taps = a.kernel_height * a.kernel_width;
  for (int64_t k = 0; k < a.outputs; ++k, weight += groups * taps * G)
    for (int64_t i = 0; i < a.kernel_height; ++i) {
      int64_t above = y + a.padding[0] - i, row = above / a.stride[0];
      if (above < 0 || above % a.stride[0] || row >= a.out_height) continue;
      const T* g = gradients + (k * a.out_height + row) * width + x + a.padding[1] + a.kernel_width - 1;
      const T* w = weight + i * a.kernel_width * G;
      for (int64_t j = 0; j < a.kernel_width; ++j, --g, w += G) {
        Vec<T> w0 = load(w), w1 = load(w + V);
        for (int r = 0; r < R; ++r) {
          acc[r][0] += w0 * g[r];
          acc[r][1] += w1 * g[r];
        }
      }
    }
  for (int r = 0; r < R; ++r) {
    store(out + r * G, acc[r][0]);
    store(out + r * G + V, acc[r][1]);
  }
}

template <class T>
FASTGAN_INLINE void gather_pixels(const Args& a, int64_t groups, const T* weight, const T* gradients,
                                  int64_t width, int64_t y, int64_t x, int64_t count, T* out) {
  switch (count) {
    case 6:
      return gather_taps<T, 6>(a, groups, weight, gradients, width, y, x, out);
    case 5:
      return gather_taps<T, 5>(a, groups, weight, gradients, width, y, x, out);
    case 4:
      return gather_taps<T, 4>(a, groups, weight, gradients, width, y, x, out);
    case 3:
      return gather_taps<T, 3>(a, groups, weight, gradients, width, y, x, out);
    case 2:
      return gather_taps<T, 2>(a, groups, weight, gradients, width, y, x, out);
    default:
      return gather_taps<T, 1>(a, groups, weight, gradients, width, y, x, out);
  }
}

// from[pixel][2V] to a row of the gradient, in either layout.
template <class S, class T>
FASTGAN_INLINE void unpack_pixels(const T* from, int64_t count, int channels, S* to, int64_t stride_c,
                                  int64_t stride_w) {
  constexpr int V = lanes<T>, G = kGroup<T>;
  if (channels == G && stride_c == 1) {
    for (int64_t x = 0; x < count; ++x) {
      store(to + x * stride_w, load(from + x * G));
      store(to + x * stride_w + V, load(from + x * G + V));
    }
  } else if (channels == G && stride_w == 1 && count >= V) {
    for (int64_t x = 0; x < count; x += V) {
      if (x + V > count) x = count - V;
      for (int part = 0; part < 2; ++part) {
        Vec<T> rows[V];
        for (int i = 0; i < V; ++i) rows[i] = load(from + (x + i) * G + part * V);
        transpose<T>(rows);
        for (int i = 0; i < V; ++i) store(to + (part * V + i) * stride_c + x, rows[i]);
      }
    }
  } else {
    for (int c = 0; c < channels; ++c)
      for (int64_t x = 0; x < count; ++x) store1(to + c * stride_c + x * stride_w, from[x * G + c]);
  }
}

template <class S, class T>
void input_gradient(const Args& a, const Threads& threads, const T* weight, const T* logit_gradients) {
  constexpr int G = kGroup<T>;
  int64_t groups = up(a.channels, G), taps = a.kernel_height * a.kernel_width;
  // Column ow of the logits lies at ow * stride + kernel_width - 1; the last pixels may read kOutputs beyond.
  int64_t width = a.width + 2 * a.padding[1] + a.kernel_width + a.stride[1] + kOutputs;
  int64_t row_bytes = a.width * G * int64_t(sizeof(T));
  int64_t rows = smaller(a.height, larger(1, kTileBytes / 2 / larger(row_bytes, 1)));
  rows = smaller(rows, up(a.height, larger(1, smaller(a.height, up(8, larger(1, a.batch))))));
  int64_t blocks = up(a.height, larger(rows, 1));
  const int64_t* s = a.grad_input_stride;
  parallel_for(threads, a.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> gradients(a, a.outputs * a.out_height * width), tile(a, rows * a.width * G);
    if (!gradients.data || !tile.data) return;
    int64_t held = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      int64_t n = unit / blocks, y0 = unit % blocks * rows, count = smaller(rows, a.height - y0);
      if (n != held) {
        __builtin_memset(gradients.data, 0, size_t(a.outputs * a.out_height * width) * sizeof(T));
        const T* from = logit_gradients + n * a.outputs * a.out_height * a.out_width;
        for (int64_t row = 0; row < a.outputs * a.out_height; ++row)
          for (int64_t x = 0; x < a.out_width; ++x)
            gradients.data[row * width + x * a.stride[1] + a.kernel_width - 1] = from[row * a.out_width + x];
        held = n;
      }
      S* image = static_cast<S*>(a.grad_input) + n * s[0];
      auto group_of_row = [&](int64_t g, int64_t y, int64_t x, int64_t pixels, T* to) {
        gather_pixels<T>(a, groups, weight + g * taps * G, gradients.data, width, y, x, pixels, to);
      };
      if (s[1] == 1) {
        for (int64_t y = y0; y < y0 + count; ++y)
          for (int64_t x = 0; x < a.width; x += kOutputs)
            for (int64_t g = 0; g < groups; ++g) {
              int64_t pixels = smaller(kOutputs, a.width - x);
              group_of_row(g, y, x, pixels, tile.data);
              unpack_pixels<S, T>(tile.data, pixels, int(smaller(G, a.channels - g * G)),
                                  image + y * s[2] + x * s[3] + g * G, 1, s[3]);
            }
      } else {
        for (int64_t g = 0; g < groups; ++g) {
          for (int64_t y = 0; y < count; ++y)
            for (int64_t x = 0; x < a.width; x += kOutputs)
              group_of_row(g, y0 + y, x, smaller(kOutputs, a.width - x), tile.data + (y * a.width + x) * G);
          // grad_input is dense: its rows lie end to end
          unpack_pixels<S, T>(tile.data, count * a.width, int(smaller(G, a.channels - g * G)),
                              image + g * G * s[1] + y0 * s[2], s[1], s[3]);
        }
      }
    }
  });
}

// B neighbouring taps, 2V channels: sums over the outputs of `rows` rows, added to sums[B][2V].
template <class T, int B>
FASTGAN_INLINE void scatter_taps(const Args& a, const Tile& t, const T* tile, const int64_t* offsets,
                                 const T* gradients, int64_t rows, T* sums) {
  constexpr int V = lanes<T>, G = kGroup<T>;
  Vec<T> acc[B][2] = {};
  for (int64_t y = 0; y < rows; ++y) {
    const T* x = tile + y * a.stride[0] * t.width * G;
    const T* g = gradients + y * a.out_width;
    for (int64_t i = 0; i < a.out_width; ++i, x += a.stride[1] * G)
      for (int b = 0; b < B; ++b) {
        acc[b][0] += load(x + offsets[b]) * g[i];
        acc[b][1] += load(x + offsets[b] + V) * g[i];
      }
  }
  for (int b = 0; b < B; ++b) {
    store(sums + b * G, load(sums + b * G) + acc[b][0]);
    store(sums + b * G + V, load(sums + b * G + V) + acc[b][1]);
  }
}

template <class S, class T>
void weight_gradient(const Args& a, const Threads& threads, const T* logit_gradients) {
  constexpr int G = kGroup<T>, B = 4;
  int64_t groups = up(a.channels, G), taps = a.kernel_height * a.kernel_width;
  int64_t out_rows = rows_that_fit<T>(a), blocks = up(a.out_height, out_rows);
  Tile t = tile_for<T>(a, out_rows, larger(1, groups / 8));
  const int64_t* s = a.grad_weight_stride;
  parallel_for(threads, up(groups, t.groups), 1, [&](int64_t begin, int64_t end) {
    Scratch<T> tile(a, t.groups * t.pitch), sums(a, t.groups * a.outputs * taps * G);
    Scratch<int64_t> offsets(a, taps);
    if (!tile.data || !sums.data || !offsets.data) return;
    for (int64_t tap = 0; tap < taps; ++tap)
      offsets.data[tap] = (tap / a.kernel_width * t.width + tap % a.kernel_width) * G;
    for (int64_t unit = begin; unit < end; ++unit) {
      int64_t g = unit * t.groups, count = smaller(t.groups, groups - g);
      __builtin_memset(sums.data, 0, size_t(count * a.outputs * taps * G) * sizeof(T));
      for (int64_t n = 0; n < a.batch; ++n)
        for (int64_t block = 0; block < blocks; ++block) {
          int64_t y0 = block * out_rows, rows = smaller(out_rows, a.out_height - y0);
          Tile part = t;
          part.rows = (rows - 1) * a.stride[0] + a.kernel_height;
          pack<S, T>(a, part, n, y0 * a.stride[0], g, count, tile.data);
          for (int64_t i = 0; i < count; ++i)
            for (int64_t k = 0; k < a.outputs; ++k) {
              const T* x = tile.data + i * t.pitch;
              const T* gradients = logit_gradients + ((n * a.outputs + k) * a.out_height + y0) * a.out_width;
              T* to = sums.data + (i * a.outputs + k) * taps * G;
              int64_t tap = 0;
              for (; tap + B <= taps; tap += B)
                scatter_taps<T, B>(a, t, x, offsets.data + tap, gradients, rows, to + tap * G);
              for (; tap < taps; ++tap)
                scatter_taps<T, 1>(a, t, x, offsets.data + tap, gradients, rows, to + tap * G);
            }
        }
      for (int64_t i = 0; i < count; ++i)
        for (int64_t k = 0; k < a.outputs; ++k)
          for (int64_t tap = 0; tap < taps; ++tap)
            for (int64_t c = 0; c < smaller(G, a.channels - (g + i) * G); ++c)
              store1(static_cast<S*>(a.grad_weight) + k * s[0] + ((g + i) * G + c) * s[1] +
                         tap / a.kernel_width * s[2] + tap % a.kernel_width * s[3],
                     sums.data[((i * a.outputs + k) * taps + tap) * G + c]);
    }
  });
}

// ---- entry points ----

template <class S>
void forward(const Args& a, const Threads& threads) {
  using T = Accumulate<S>;
  if (covers(a))
    forward_covering<S, T>(a, threads);
  else
    forward_tiles<S, T>(a, threads);
  reduce_loss<S, T>(a);
}

template <class S>
void backward(const Args& a, const Threads& threads) {
  using T = Accumulate<S>;
  bool whole = covers(a);
  int64_t per_image = a.outputs * a.out_height * a.out_width;
  T* gradients = static_cast<T*>(a.workspace);
  T* weight = gradients + a.batch * per_image;
  parallel_for(threads, a.batch, larger(1, 256 / larger(1, per_image)), [&](int64_t begin, int64_t end) {
    with_loss<T>(a.loss, [&](auto loss) {
      for (int64_t n = begin; n < end; ++n) gradient_of_logits<S, T>(a, n, gradients + n * per_image, loss);
    });
  });
  if (a.grad_bias)
    for (int64_t k = 0; k < a.outputs; ++k) {
      double total = 0;
      for (int64_t n = 0; n < a.batch; ++n)
        for (int64_t i = 0; i < a.out_height * a.out_width; ++i)
          total += double(gradients[n * per_image + k * a.out_height * a.out_width + i]);
      store1(static_cast<S*>(a.grad_bias) + k, T(total));
    }
  if (a.grad_input) {
    if (whole) {
      pack_covering_weight<S, T>(a, weight);
      input_gradient_covering<S, T>(a, threads, weight, gradients);
    } else {
      pack_weight<S, T>(a, weight);
      input_gradient<S, T>(a, threads, weight, gradients);
    }
  }
  if (a.grad_weight) {
    if (whole)
      weight_gradient_covering<S, T>(a, threads, weight, gradients);
    else
      weight_gradient<S, T>(a, threads, gradients);
  }
}

}  // namespace
}  // namespace fastgan

#define FASTGAN_BY_DTYPE(function)                                \
  switch (args.dtype) {                                           \
    case fastgan::Dtype::float32:                                 \
      return fastgan::function<float>(args, threads);             \
    case fastgan::Dtype::float64:                                 \
      return fastgan::function<double>(args, threads);            \
    case fastgan::Dtype::bfloat16:                                \
      return fastgan::function<fastgan::bfloat16>(args, threads); \
    case fastgan::Dtype::float16:                                 \
      return fastgan::function<fastgan::float16>(args, threads);  \
  }

void FASTGAN_KERNEL(gan_loss_forward)(const fastgan::GanLossArgs& args, const fastgan::Threads& threads) {
  FASTGAN_BY_DTYPE(forward)
}

void FASTGAN_KERNEL(gan_loss_backward)(const fastgan::GanLossArgs& args, const fastgan::Threads& threads) {
  FASTGAN_BY_DTYPE(backward)
}
