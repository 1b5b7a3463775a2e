// A discriminator's last convolution with its loss: few output channels (one, usually), many input channels.
//
// Such a convolution is a set of dot products along the channels, so everything here is vectorised over
// channels: a group of 2V of them (V lanes) at a time, two vectors, whatever the picture's size. The input is
// read where it lies; a tile of it, zero-padded, goes into a scratch area of the thread in the order
// [group][row][column][2V] and in the accumulate type, which is a plain copy from channels_last, a V x V
// transposition from NCHW, and a conversion from the 16-bit types. After that there are no borders and no
// layouts:
//
//   forward       logits of six neighbouring outputs in registers, over all taps and groups of the tile; one
//   horizontal
//                 sum a logit at the end. The image's logits go through the loss while they are in the cache.
//   grad_input    each pixel gathers over the taps that see it from a zero-padded row of logit gradients; a
//   thread has
//                 an image.
//   grad_weight   each (tap, group) is a sum over outputs and images; a thread has channels and passes over
//   all
//                 images, so that nothing is added across threads.
//
// If the kernel covers the whole image (DCGAN's 4x4 on 4x4) and an image is dense in memory, the three are a
// dot product, an outer product and a sum over images along the memory itself, in either layout, with no tile
// at all.
//
// Work is cut by shape alone, and each sum has one fixed order: the bits do not depend on the number of
// threads. Losses are summed in double, an output row at a time. The loss of the rounded logit is taken, the
// one that is returned, so that it is the loss of the logits that the caller sees. softplus is max(x, 0) +
// log1p(exp(-|x|)): its two terms are non-negative, as are the two terms of a loss, so nothing cancels and
// nothing need be clamped; NaN stays NaN.
#include "gan_loss/gan_loss.h"

#include "common/vector.h"

namespace fastgan {
namespace {

using Args = GanLossArgs;

constexpr int64_t kTileBytes = 160 * 1024;  // of the scratch area: stays in L2
constexpr int kOutputs = 6;  // outputs in registers: 6 x 2 accumulators, 2 weights, of 16 registers

template <class T>
constexpr int kGroup = 2 * lanes<T>;

FASTGAN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTGAN_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
FASTGAN_INLINE int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A thread's memory for the length of one range of work.
template <class T>
struct Scratch {
  T* data;
  void* block;
  explicit Scratch(int64_t count) {
    block = __builtin_malloc(size_t(count) * sizeof(T) + 64);
    if (!block) __builtin_trap();
    data = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(block) + 63) & ~uintptr_t(63));
  }
  ~Scratch() { __builtin_free(block); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// ---- the losses ----

// log(1 + z) for z in [0, 1]: 2 atanh(s), s = z / (2 + z) <= 1/3, so that small z keep all their digits.
FASTGAN_INLINE Vec<float> log1p(Vec<float> z) {
  Vec<float> s = z / (z + 2.0f), q = s * s;
  Vec<float> p = splat<float>(1.0f / 17);
  p = p * q + 1.0f / 15;
  p = p * q + 1.0f / 13;
  p = p * q + 1.0f / 11;
  p = p * q + 1.0f / 9;
  p = p * q + 1.0f / 7;
  p = p * q + 1.0f / 5;
  p = p * q + 1.0f / 3;
  Vec<float> twice = s + s;
  return twice + twice * (p * q);
}
FASTGAN_INLINE Vec<double> log1p(Vec<double> z) {
  for (int i = 0; i < lanes<double>; ++i) z[i] = __builtin_log1p(z[i]);
  return z;
}

template <class T>
FASTGAN_INLINE Vec<T> exp_minus_abs(Vec<T> x) {
  return exp(select(x < T(0), x, -x));
}

// Each loss: its value and derivative at logits x with weights `real` and `fake` of its two terms.
template <class T>
struct Bce {
  static FASTGAN_INLINE Vec<T> value(Vec<T> x, Vec<T> real, Vec<T> fake) {
    Vec<T> rest = log1p(exp_minus_abs<T>(x)), zero{};
    return real * (max(zero, -x) + rest) + fake * (max(zero, x) + rest);
  }
  static FASTGAN_INLINE Vec<T> derivative(Vec<T> x, Vec<T> real, Vec<T> fake) {
    Vec<T> z = exp_minus_abs<T>(x), large = T(1) / (z + T(1)), small = z / (z + T(1));
    Mask<T> positive = x >= T(0);
    return fake * select(positive, large, small) - real * select(positive, small, large);
  }
};
template <class T>
struct Hinge {
  static FASTGAN_INLINE Vec<T> value(Vec<T> x, Vec<T> real, Vec<T> fake) {
    Vec<T> zero{};
    return real * max(zero, T(1) - x) + fake * max(zero, T(1) + x);
  }
  static FASTGAN_INLINE Vec<T> derivative(Vec<T> x, Vec<T> real, Vec<T> fake) {
    Vec<T> zero{};
    return select(x <= T(-1), zero, fake) - select(x >= T(1), zero, real);
  }
};
template <class T>
struct LeastSquares {
  static FASTGAN_INLINE Vec<T> value(Vec<T> x, Vec<T> real, Vec<T>) { return (x - real) * (x - real); }
  static FASTGAN_INLINE Vec<T> derivative(Vec<T> x, Vec<T> real, Vec<T>) { return T(2) * (x - real); }
};
template <class T>
struct Wasserstein {
  static FASTGAN_INLINE Vec<T> value(Vec<T> x, Vec<T> real, Vec<T> fake) { return (fake - real) * x; }
  static FASTGAN_INLINE Vec<T> derivative(Vec<T>, Vec<T> real, Vec<T> fake) { return fake - real; }
};

template <class T>
FASTGAN_INLINE T at(const Strided& s, int64_t n, int64_t k, int64_t y, int64_t x) {
  return static_cast<const T*>(s.data)[n * s.stride[0] + k * s.stride[1] + y * s.stride[2] + x * s.stride[3]];
}

// The weights of V neighbouring logits of a row.
template <class T>
struct Terms {
  Vec<T> real, fake, sample;
};

template <class T>
FASTGAN_INLINE Terms<T> terms(const Args& a, int64_t n, int64_t k, int64_t y, int64_t x, int count,
                              bool& bad) {
  Vec<T> target = splat<T>(T(a.target_value)), positive = splat<T>(T(1)), sample = splat<T>(T(1));
  for (int i = 0; i < count; ++i) {
    if (a.target.data) target[i] = at<T>(a.target, n, k, y, x + i);
    if (a.pos_weight.data) positive[i] = at<T>(a.pos_weight, n, k, y, x + i);
    if (a.sample_weight.data) sample[i] = at<T>(a.sample_weight, n, k, y, x + i);
    bad |= target[i] < T(0) || target[i] > T(1);
  }
  target = target * T(1 - a.label_smoothing) + T(0.5 * a.label_smoothing);
  return {target * positive, T(1) - target, sample};
}

// Calls f with the functor of the loss.
template <class T, class F>
FASTGAN_INLINE void with_loss(GanLoss loss, F f) {
  switch (loss) {
    case GanLoss::bce:
      return f(Bce<T>{});
    case GanLoss::hinge:
      return f(Hinge<T>{});
    case GanLoss::lsgan:
      return f(LeastSquares<T>{});
    case GanLoss::wasserstein:
      return f(Wasserstein<T>{});
  }
}

// The losses of output row y of image n, whose logits are stored: their sum, or each of them.
template <class S, class T, class Loss>
void loss_of_row(const Args& a, int64_t n, int64_t y, Loss) {
  constexpr int V = lanes<T>;
  double sum = 0;
  bool bad = false;
  for (int64_t k = 0; k < a.outputs; ++k) {
    int64_t row = ((n * a.outputs + k) * a.out_height + y) * a.out_width;
    for (int64_t x = 0; x < a.out_width; x += V) {
      int count = int(smaller(V, a.out_width - x));
      Vec<T> logits = load_partial<T>(static_cast<const S*>(a.logits) + row + x, count);
      Terms<T> t = terms<T>(a, n, k, y, x, count, bad);
      Vec<T> each = Loss::value(logits, t.real, t.fake);
      if (a.sample_weight.data) each = each * t.sample;
      for (int i = 0; i < count; ++i) {
        sum += double(each[i]);
        if (a.reduction != Reduction::none) continue;
        if (a.loss_accumulates)
          store1(static_cast<T*>(a.loss_value) + row + x + i, each[i]);
        else
          store1(static_cast<S*>(a.loss_value) + row + x + i, each[i]);
      }
    }
  }
  a.partial_sums[n * a.out_height + y] = sum;
  if (bad && a.loss != GanLoss::lsgan) __atomic_store_n(a.bad_target, 1, __ATOMIC_RELAXED);
}

template <class S, class T>
void loss_of_rows(const Args& a, int64_t n, int64_t begin, int64_t end) {
  with_loss<T>(a.loss, [&](auto loss) {
    for (int64_t y = begin; y < end; ++y) loss_of_row<S, T>(a, n, y, loss);
  });
}

template <class S, class T>
void reduce_loss(const Args& a) {
  if (a.reduction == Reduction::none) return;
  double sum = 0;
  for (int64_t i = 0; i < a.batch * a.out_height; ++i) sum += a.partial_sums[i];
  if (a.reduction == Reduction::mean) sum /= double(a.batch * a.outputs * a.out_height * a.out_width);
  if (a.loss_accumulates)
    store1(static_cast<T*>(a.loss_value), T(sum));
  else
    store1(static_cast<S*>(a.loss_value), T(sum));
}

// The gradients of all logits of image n, into out (K, out_height, out_width).
template <class S, class T, class Loss>
void gradient_of_logits(const Args& a, int64_t n, T* out, Loss) {
  constexpr int V = lanes<T>;
  T scale =
      a.reduction == Reduction::mean ? T(1) / T(a.batch * a.outputs * a.out_height * a.out_width) : T(1);
  bool bad = false;
  for (int64_t k = 0; k < a.outputs; ++k)
    for (int64_t y = 0; y < a.out_height; ++y) {
      int64_t row = (k * a.out_height + y) * a.out_width;
      for (int64_t x = 0; x < a.out_width; x += V) {
        int count = int(smaller(V, a.out_width - x));
        Vec<T> gradient{};
        if (a.grad_loss.data) {
          int64_t first = n * a.outputs * a.out_height * a.out_width + row + x;
          Vec<T> logits = load_partial<T>(static_cast<const S*>(a.logits) + first, count);
          Terms<T> t = terms<T>(a, n, k, y, x, count, bad);
          Vec<T> grad_loss{};
          for (int i = 0; i < count; ++i) grad_loss[i] = at<T>(a.grad_loss, n, k, y, x + i);
          gradient = grad_loss * scale * Loss::derivative(logits, t.real, t.fake);
          if (a.sample_weight.data) gradient = gradient * t.sample;
        }
        for (int i = 0; i < count; ++i) {
          T value = gradient[i];
          if (a.grad_logits.data) {
            const int64_t* s = a.grad_logits.stride;
            value += load1<T>(static_cast<const S*>(a.grad_logits.data) + n * s[0] + k * s[1] + y * s[2] +
                              (x + i) * s[3]);
          }
          out[row + x + i] = value;
        }
      }
    }
}

// ---- tiles ----

// One step of a transposition: rows i and i + H change the blocks of H lanes that lie across the diagonal.
template <class T, int H, int V = lanes<T>>
FASTGAN_INLINE void transpose_step(Vec<T>* rows) {
  Mask<T> low{}, high{};
  for (int j = 0; j < V; ++j) {
    low[j] = (j & H) ? V + j - H : j;
    high[j] = (j & H) ? V + j : j + H;
  }
  for (int i = 0; i < V; ++i)
    if (!(i & H)) {
      Vec<T> a = rows[i], b = rows[i + H];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + H] = __builtin_shuffle(a, b, high);
    }
}
template <class T>
FASTGAN_INLINE void transpose(Vec<T>* rows) {
  if constexpr (lanes<T> >= 16) transpose_step<T, 8>(rows);
  if constexpr (lanes<T> >= 8) transpose_step<T, 4>(rows);
  if constexpr (lanes<T> >= 4) transpose_step<T, 2>(rows);
  transpose_step<T, 1>(rows);
}

// Pixels [0, count) of one input row (or of several that lie end to end), 2V channels from c, into
// tile[pixel][2V].
template <class S, class T>
FASTGAN_INLINE void pack_pixels(const S* from, int64_t stride_c, int64_t stride_w, int64_t count,
                                int channels, T* tile) {
  constexpr int V = lanes<T>, G = kGroup<T>;
  if (channels == G && stride_c == 1) {
    for (int64_t x = 0; x < count; ++x) {
      store(tile + x * G, load<T>(from + x * stride_w));
      store(tile + x * G + V, load<T>(from + x * stride_w + V));
    }
  } else if (channels == G && stride_w == 1 && count >= V) {
    for (int64_t x = 0; x < count; x += V) {
      if (x + V > count) x = count - V;  // the last block overlaps the one before
      for (int part = 0; part < 2; ++part) {
        Vec<T> rows[V];
        for (int i = 0; i < V; ++i) rows[i] = load<T>(from + (part * V + i) * stride_c + x);
        transpose<T>(rows);
        for (int i = 0; i < V; ++i) store(tile + (x + i) * G + part * V, rows[i]);
      }
    }
  } else {
    for (int64_t x = 0; x < count; ++x)
      for (int c = 0; c < G; ++c)
        tile[x * G + c] = c < channels ? load1<T>(from + c * stride_c + x * stride_w) : T(0);
  }
}

// The geometry of tiles: rows of the padded input, all columns, `groups` groups of channels.
struct Tile {
  int64_t width, rows, pixels, pitch, groups;  // pitch: elements from one group to the next
};

template <class T>
Tile tile_for(const Args& a, int64_t out_rows, int64_t most_groups) {
  Tile t;
  t.width = a.width + 2 * a.padding[1];
  t.rows = (out_rows - 1) * a.stride[0] + a.kernel_height;
  t.pixels = t.rows * t.width;
  t.pitch = t.pixels * kGroup<T> + kGroup<T>;  // the odd piece keeps groups out of each other's cache sets
  t.groups = larger(1, smaller(most_groups, kTileBytes / (t.pitch * int64_t(sizeof(T)))));
  return t;
}

// Output rows a tile can have with one group, at least one.
template <class T>
int64_t rows_that_fit(const Args& a) {
  int64_t row_bytes = (a.width + 2 * a.padding[1]) * kGroup<T> * int64_t(sizeof(T));
  int64_t rows = kTileBytes / larger(row_bytes, 1) - a.kernel_height;
  return smaller(a.out_height, larger(1, rows / a.stride[0] + 1));
}

// Rows [row, row + t.rows) of the padded image n, `groups` groups of channels from group g.
template <class S, class T>
void pack(const Args& a, const Tile& t, int64_t n, int64_t row, int64_t g, int64_t groups, T* tile) {
  constexpr int G = kGroup<T>;
  const int64_t* s = a.input.stride;
  const S* image = static_cast<const S*>(a.input.data) + n * s[0];
  int64_t first = larger(0, a.padding[0] - row), last = smaller(t.rows, a.height + a.padding[0] - row);
  if (last < first) first = last = 0;
  int64_t left = a.padding[1];
  bool whole = left == 0 && s[2] == a.width * s[3];  // rows end to end
  auto zero = [&](T* from, int64_t count) { __builtin_memset(from, 0, size_t(count) * sizeof(T)); };
  auto pixels = [&](int64_t i, int64_t r, int64_t x, int64_t count) {
    int channels = int(smaller(G, a.channels - (g + i) * G));
    pack_pixels<S, T>(image + (g + i) * G * s[1] + (row + r - a.padding[0]) * s[2] + x * s[3], s[1], s[3],
                      count, channels, tile + i * t.pitch + (r * t.width + left + x) * G);
  };
  for (int64_t i = 0; i < groups; ++i) {
    T* to = tile + i * t.pitch;
    zero(to, first * t.width * G);
    zero(to + last * t.width * G, (t.rows - last) * t.width * G);
    if (left)
      for (int64_t r = first; r < last; ++r) {
        zero(to + r * t.width * G, left * G);
        zero(to + ((r + 1) * t.width - left) * G, left * G);
      }
  }
  if (s[1] == 1) {  // channels_last: a pixel's groups lie side by side
    for (int64_t r = first; r < last; ++r)
      for (int64_t x = 0; x < a.width; ++x) {
        const S* from = image + (row + r - a.padding[0]) * s[2] + x * s[3] + g * G;
        T* to = tile + (r * t.width + left + x) * G;
        int64_t full = smaller(groups, a.channels / G - g);
        for (int64_t i = 0; i < full; ++i, from += G, to += t.pitch) {
          store(to, load<T>(from));
          store(to + lanes<T>, load<T>(from + lanes<T>));
        }
        for (int64_t i = full; i < groups; ++i) pixels(i, r, x, 1);
      }
  } else {
    for (int64_t i = 0; i < groups; ++i) {
      if (whole)
        pixels(i, first, 0, (last - first) * a.width);
      else
        for (int64_t r = first; r < last; ++r) pixels(i, r, 0, a.width);
    }
  }
}

// weight (K, C, kh, kw) into [k][group][tap][2V], zero beyond the channels.
template <class S, class T>
void pack_weight(const Args& a, T* packed) {
  constexpr int G = kGroup<T>;
  const int64_t* s = a.weight.stride;
  int64_t groups = up(a.channels, G);
  for (int64_t k = 0; k < a.outputs; ++k)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t c = 0; c < G; ++c) {
        T* to = packed + (k * groups + g) * a.kernel_height * a.kernel_width * G + c;
        int64_t channel = g * G + c;
        const S* from = static_cast<const S*>(a.weight.data) + k * s[0] + channel * s[1];
        for (int64_t i = 0; i < a.kernel_height; ++i)
          for (int64_t j = 0; j < a.kernel_width; ++j, to += G)
            *to = channel < a.channels ? load1<T>(from + i * s[2] + j * s[3]) : T(0);
      }
}

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
    Scratch<T> tile(t.groups * t.pitch);
    Scratch<Vec<T>> sums(a.outputs * per_output);
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
    Scratch<T> gradients(a.outputs * a.out_height * width), tile(rows * a.width * G);
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
    Scratch<T> tile(t.groups * t.pitch), sums(t.groups * a.outputs * taps * G);
    Scratch<int64_t> offsets(taps);
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

// ---- the kernel covers the image ----

// True if the kernel covers the image and the input is dense: its strides then hold the order of (c, h, w) in
// memory, and grad_input has the same.
bool covers(const Args& a) {
  const int64_t* s = a.input.stride;
  if (a.padding[0] || a.padding[1] || a.kernel_height != a.height || a.kernel_width != a.width) return false;
  bool nchw = s[3] == 1 && s[2] == a.width && s[1] == a.width * a.height;
  bool nhwc = s[1] == 1 && s[3] == a.channels && s[2] == a.width * a.channels;
  int64_t length = a.channels * a.height * a.width;
  return (nchw || nhwc) && (s[0] == length || a.batch == 1) && length >= 64;
}

// weight[k] in the order of the input's memory; `to` takes it, `from` brings a gradient back.
template <class F>
FASTGAN_INLINE void in_memory_order(const Args& a, const int64_t* strides, F f) {
  const int64_t* order = a.input.stride;
  for (int64_t c = 0; c < a.channels; ++c)
    for (int64_t y = 0; y < a.height; ++y)
      for (int64_t x = 0; x < a.width; ++x)
        f(c * order[1] + y * order[2] + x * order[3], c * strides[1] + y * strides[2] + x * strides[3]);
}

template <class S, class T>
void pack_covering_weight(const Args& a, T* packed) {
  int64_t length = a.channels * a.height * a.width;
  for (int64_t k = 0; k < a.outputs; ++k) {
    const S* from = static_cast<const S*>(a.weight.data) + k * a.weight.stride[0];
    in_memory_order(a, a.weight.stride,
                    [&](int64_t at, int64_t source) { packed[k * length + at] = load1<T>(from + source); });
  }
}

// R images' dot products with one weight.
template <class S, class T, int R>
FASTGAN_INLINE void dots(const S* x, int64_t stride, const T* w, int64_t length, T* out) {
  constexpr int V = lanes<T>, U = 3;
  Vec<T> acc[R][U] = {};
  int64_t i = 0;
  for (; i + U * V <= length; i += U * V)
    for (int u = 0; u < U; ++u) {
      Vec<T> weight = load(w + i + u * V);
      for (int r = 0; r < R; ++r) acc[r][u] += load<T>(x + r * stride + i + u * V) * weight;
    }
  for (int r = 0; r < R; ++r) {
    T rest = 0;
    for (int64_t j = i; j < length; ++j) rest += load1<T>(x + r * stride + j) * w[j];
    Vec<T> total = acc[r][0];
    for (int u = 1; u < U; ++u) total += acc[r][u];
    out[r] = sum<T>(total) + rest;
  }
}

template <class S, class T>
void forward_covering(const Args& a, const Threads& threads) {
  constexpr int R = 4;
  int64_t length = a.channels * a.height * a.width, stride = a.input.stride[0];
  T* weight = static_cast<T*>(a.workspace);
  pack_covering_weight<S, T>(a, weight);
  parallel_for(threads, up(a.batch, R), 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      int64_t n = unit * R, count = smaller(R, a.batch - n);
      const S* x = static_cast<const S*>(a.input.data) + n * stride;
      for (int64_t k = 0; k < a.outputs; ++k) {
        T out[R];
        if (count == R)
          dots<S, T, R>(x, stride, weight + k * length, length, out);
        else
          for (int64_t r = 0; r < count; ++r)
            dots<S, T, 1>(x + r * stride, stride, weight + k * length, length, out + r);
        T bias = a.bias ? load1<T>(static_cast<const S*>(a.bias) + k * a.bias_stride) : T(0);
        for (int64_t r = 0; r < count; ++r)
          store1(static_cast<S*>(a.logits) + (n + r) * a.outputs + k, out[r] + bias);
      }
      for (int64_t r = 0; r < count; ++r) loss_of_rows<S, T>(a, n + r, 0, 1);
    }
  });
}

template <class S, class T>
void input_gradient_covering(const Args& a, const Threads& threads, const T* weight,
                             const T* logit_gradients) {
  constexpr int V = lanes<T>;
  int64_t length = a.channels * a.height * a.width;
  parallel_for(threads, a.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      S* to = static_cast<S*>(a.grad_input) + n * length;
      const T* g = logit_gradients + n * a.outputs;
      int64_t i = 0;
      for (; i + V <= length; i += V) {
        Vec<T> value{};
        for (int64_t k = 0; k < a.outputs; ++k) value += load(weight + k * length + i) * g[k];
        store(to + i, value);
      }
      for (; i < length; ++i) {
        T value = 0;
        for (int64_t k = 0; k < a.outputs; ++k) value += weight[k * length + i] * g[k];
        store1(to + i, value);
      }
    }
  });
}

// Sums over the images, a run of the image's memory at a time; the sums, four images added at once, stay in
// L1. They overwrite the packed weight, which is read no more.
template <class S, class T>
void weight_gradient_covering(const Args& a, const Threads& threads, T* sums, const T* logit_gradients) {
  constexpr int V = lanes<T>;
  constexpr int64_t kRun = 1024;
  int64_t length = a.channels * a.height * a.width, stride = a.input.stride[0], K = a.outputs;
  const S* input = static_cast<const S*>(a.input.data);
  parallel_for(threads, up(length, kRun), 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      int64_t first = unit * kRun, last = smaller(length, first + kRun);
      for (int64_t k = 0; k < K; ++k) {
        T* out = sums + k * length;
        __builtin_memset(out + first, 0, size_t(last - first) * sizeof(T));
        int64_t n = 0;
        for (; n + 4 <= a.batch; n += 4) {
          const S* x = input + n * stride;
          const T* g = logit_gradients + n * K + k;
          T g0 = g[0], g1 = g[K], g2 = g[2 * K], g3 = g[3 * K];
          int64_t i = first;
          for (; i + V <= last; i += V)
            store(out + i, load(out + i) + (load<T>(x + i) * g0 + load<T>(x + stride + i) * g1) +
                               (load<T>(x + 2 * stride + i) * g2 + load<T>(x + 3 * stride + i) * g3));
          for (; i < last; ++i)
            out[i] += (load1<T>(x + i) * g0 + load1<T>(x + stride + i) * g1) +
                      (load1<T>(x + 2 * stride + i) * g2 + load1<T>(x + 3 * stride + i) * g3);
        }
        for (; n < a.batch; ++n) {
          const S* x = input + n * stride;
          T g = logit_gradients[n * K + k];
          for (int64_t i = first; i < last; ++i) out[i] += load1<T>(x + i) * g;
        }
      }
    }
  });
  for (int64_t k = 0; k < K; ++k) {
    S* to = static_cast<S*>(a.grad_weight) + k * a.grad_weight_stride[0];
    in_memory_order(a, a.grad_weight_stride,
                    [&](int64_t at, int64_t target) { store1(to + target, sums[k * length + at]); });
  }
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
