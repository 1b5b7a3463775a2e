// Batch norm and activation on the CPU: after the statistics, one pass forward; after the two sums, one pass
// backward.
//
// Two walks over memory. (batch, channels, spatial): a unit of work is a few neighbouring channels of one
// group, at least 2 KB of every image, through all images; its statistics are followed at once by its output,
// while the data is in the second-level cache. (batch, spatial, channels), vectors across channels: blocks of
// rows, each with sums of its own, combined in the order of the blocks, then a second walk for the output.
// Both cuts depend on shapes alone, so the bits are the same for every number of threads. Whole rows are read
// one after another: pairs of rows, which save loads of coefficients, and strips of 128 channels both broke
// the streams that the prefetcher follows, and took 1.4 to 1.8 times as long wherever the data did not lie in
// the cache.
//
// Numerics. Sums of squares are taken about a pivot, the mean of what was seen before, in chunks of a few
// hundred values; chunks are combined in double by Chan's formula. Since the sum over chunks of n (chunk mean
// - mean before)^2 is at most twice the whole second moment (Welford's identity), nothing cancels for any
// data: mean 1e4 and deviation 1 come out as exactly as mean 0. Only the first chunk has no history; it is
// read twice. A mean in float would be off by half an ulp of 1e4, a thousandth of the deviation, so the
// output is (x - float(mean)) * scale + shift, the mean's remainder folded into the shift. The activation's
// mask is recomputed from the input by the same expression. NaN: no comparison drops one. Half-precision
// types are widened on load; sums are float within a chunk and double after.
#include "norm_act/norm_act.h"

#include "common/vector.h"

namespace fastgan {
namespace {

constexpr int64_t kChunk = 256;    // values of a channel whose sums stay in T
constexpr int kMaxChannels = 64;   // of a unit, channels_first
constexpr int64_t kStrip = 512;    // channels at a time, channels_last
constexpr int64_t kRowsInT = 128;  // rows whose sums stay in T, channels_last
constexpr int64_t kGrain = 32768;  // values that are worth a thread

FASTGAN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTGAN_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
FASTGAN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// z = (x - mean) * scale + shift
template <class T>
struct Affine {
  T mean, scale, shift;
};
template <class T>
struct AffineVec {
  Vec<T> mean, scale, shift;
  FASTGAN_INLINE Vec<T> operator()(Vec<T> x) const { return (x - mean) * scale + shift; }
};

template <class T>
FASTGAN_INLINE AffineVec<T> splat(const Affine<T>& a) {
  return {fastgan::splat<T>(a.mean), fastgan::splat<T>(a.scale), fastgan::splat<T>(a.shift)};
}

template <Activation A, class T>
FASTGAN_INLINE Vec<T> activate(Vec<T> z, T slope) {
  if (A == Activation::relu) return select(z < T(0), Vec<T>{}, z);  // NaN is not below zero and stays
  if (A == Activation::leaky_relu) return select(z > T(0), z, z * slope);
  return z;
}
template <Activation A, class T>
FASTGAN_INLINE Vec<T> masked(Vec<T> grad, Vec<T> z, T slope) {
  if (A == Activation::relu) return select(z <= T(0), Vec<T>{}, grad);
  if (A == Activation::leaky_relu) return select(z > T(0), grad, grad * slope);
  return grad;
}

// The tail of a run is a vector of fewer elements. What fills it up is the mean, so that it adds nothing to
// sums about it.
template <class T, class S>
FASTGAN_INLINE Vec<T> load_tail(const S* p, int count, T fill) {
  Vec<T> out = load_partial<T>(p, count);
  for (int i = 0; i < lanes<T>; ++i) out[i] = i < count ? out[i] : fill;
  return out;
}

template <class T>
FASTGAN_INLINE double total(Vec<T> v) {
  double out = 0;
  for (int i = 0; i < lanes<T>; ++i) out += double(v[i]);
  return out;
}

// Count, mean and second moment about it, by Chan's formula.
struct Moments {
  double count = 0, mean = 0, square = 0;
  // What was added: sums of (x - pivot) and (x - pivot)^2 over n values.
  FASTGAN_INLINE void add(double n, double pivot, double s1, double s2) {
    double offset = s1 / n, delta = pivot + offset - mean, all = count + n;
    square += s2 - s1 * offset + delta * delta * (count * (n / all));
    mean += delta * (n / all);
    count = all;
  }
};

template <class S, Activation A>
struct NormAct {
  using T = Accumulate<S>;
  using V = Vec<T>;
  static constexpr int L = lanes<T>;

  const NormActArgs& args;
  const Threads& threads;
  const int64_t C = args.channels, HW = args.spatial, N = args.batch / args.groups;
  const double count = double(N) * double(HW);
  const int64_t padded = C + 16;
  const S* const x = static_cast<const S*>(args.input);
  S* const y = static_cast<S*>(args.output);
  const S* const dy = static_cast<const S*>(args.grad_output);
  S* const dx = static_cast<S*>(args.grad_input);
  const T slope = T(args.negative_slope);

  // ---- coefficients ----

  double weight(int64_t c) const { return args.weight ? double(static_cast<const T*>(args.weight)[c]) : 1.0; }
  double bias(int64_t c) const { return args.bias ? double(static_cast<const T*>(args.bias)[c]) : 0.0; }
  double invstd(int64_t gc) const { return 1.0 / std::sqrt(args.var[gc] + args.eps); }

  Affine<T> affine(int64_t g, int64_t c) const {
    int64_t gc = g * C + c;
    double mean = args.mean[gc], scale = weight(c) * invstd(gc);
    T high = T(mean);
    // An infinite mean has no remainder; x - mean is then NaN or infinite by itself.
    double rest = mean - double(high);
    return {high, T(scale), T(rest == rest ? bias(c) - rest * scale : bias(c))};
  }

  // dx = dz * scale - (x - mean) * along - constant
  struct Gradient {
    T scale, along, constant;
  };
  Gradient gradient(int64_t g, int64_t c, double sum, double sum_x) const {
    int64_t gc = g * C + c;
    double inverse = invstd(gc), scale = weight(c) * inverse;
    if (!args.batch_statistics) return {T(scale), T(0), T(0)};
    double rest = args.mean[gc] - double(T(args.mean[gc]));
    double along = scale * inverse * inverse * (sum_x - rest * sum) / count;
    return {T(scale), T(along), T(scale * sum / count - rest * along)};
  }

  double* sums(int64_t g) const {
    return args.scratch + g * padded * 2;
  }  // (2, padded): of dz and dz (x - T(mean))
  T* coefficients(int64_t g, int which) const {
    return reinterpret_cast<T*>(args.scratch + args.groups * padded * 2 + (g * 5 + which) * padded);
  }
  double* partial(int64_t g, int64_t block) const {
    return args.scratch + args.groups * padded * 7 + (g * norm_act_blocks(args) + block) * 2 * padded;
  }

  void weight_and_bias_gradients() const {
    for (int64_t c = 0; c < C; ++c) {
      double weight_sum = 0, bias_sum = 0;
      for (int64_t g = 0; g < args.groups; ++g) {
        double sum = sums(g)[c], sum_x = sums(g)[padded + c], mean = args.mean[g * C + c];
        bias_sum += sum;
        weight_sum += (sum_x - (mean - double(T(mean))) * sum) * invstd(g * C + c);
      }
      if (args.grad_weight) static_cast<T*>(args.grad_weight)[c] = T(weight_sum);
      if (args.grad_bias) static_cast<T*>(args.grad_bias)[c] = T(bias_sum);
    }
  }

  bool wants_sums() const {
    return args.grad_weight || args.grad_bias || (args.grad_input && args.batch_statistics);
  }

  // ---- (batch, channels, spatial) ----

  int64_t unit_channels() const {
    return least(least(most(2048 / most(HW * int64_t(sizeof(S)), 1), 1), C), kMaxChannels);
  }

  // body(group, first channel, channels)
  template <class Body>
  void for_units(const Body& body) const {
    int64_t width = unit_channels(), units = ceil_div(C, width);
    int64_t grain = most(1, kGrain / most(1, N * HW * width));
    parallel_for(threads, args.groups * units, grain, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        int64_t c = u % units * width;
        body(u / units, c, least(width, C - c));
      }
    });
  }

  // body(first image, image after the last, first value of the run, its length): whole planes of several
  // images, or a piece of one plane.
  template <class Body>
  void for_chunks(const Body& body) const {
    if (HW >= kChunk) {
      for (int64_t n = 0; n < N; ++n)
        for (int64_t p = 0; p < HW; p += 4 * kChunk) body(n, n + 1, p, least(4 * kChunk, HW - p));
      return;
    }
    int64_t images = kChunk / HW;
    for (int64_t n = 0; n < N; n += images) body(n, least(n + images, N), 0, HW);
  }

  const S* plane(const S* base, int64_t g, int64_t n, int64_t c) const {
    return base + ((g * N + n) * C + c) * HW;
  }
  S* plane(S* base, int64_t g, int64_t n, int64_t c) const { return base + ((g * N + n) * C + c) * HW; }

  // Adds the sums of (x - pivot) and its square over a run; four chains, since one would wait for each
  // addition.
  static FASTGAN_INLINE void add_moments(const S* p, int64_t length, T pivot, V& s1, V& s2) {
    V k = fastgan::splat<T>(pivot);
    int64_t i = 0;
    if (length >= 4 * L) {
      V a[4] = {}, b[4] = {};
      for (; i + 4 * L <= length; i += 4 * L)
        for (int j = 0; j < 4; ++j) {
          V d = load<T>(p + i + j * L) - k;
          a[j] += d;
          b[j] += d * d;
        }
      s1 += (a[0] + a[1]) + (a[2] + a[3]);
      s2 += (b[0] + b[1]) + (b[2] + b[3]);
    }
    for (; i + L <= length; i += L) {
      V d = load<T>(p + i) - k;
      s1 += d;
      s2 += d * d;
    }
    if (i < length) {
      V d = load_tail<T>(p + i, int(length - i), pivot) - k;
      s1 += d;
      s2 += d * d;
    }
  }

  void unit_statistics(int64_t g, int64_t c0, int64_t channels) const {
    Moments moments[kMaxChannels];
    V s1[kMaxChannels], s2[kMaxChannels];
    T pivot[kMaxChannels];
    auto run = [&](int64_t first, int64_t last, int64_t begin, int64_t length) {
      for (int64_t c = 0; c < channels; ++c) s1[c] = s2[c] = V{};
      for (int64_t n = first; n < last; ++n)
        for (int64_t c = 0; c < channels; ++c)
          add_moments(plane(x, g, n, c0 + c) + begin, length, pivot[c], s1[c], s2[c]);
    };
    bool fresh = true;
    for_chunks([&](int64_t first, int64_t last, int64_t begin, int64_t length) {
      double n = double((last - first) * length);
      if (fresh) {
        for (int64_t c = 0; c < channels; ++c) pivot[c] = load1<T>(plane(x, g, first, c0 + c) + begin);
        run(first, last, begin, length);
        for (int64_t c = 0; c < channels; ++c) pivot[c] = T(double(pivot[c]) + total<T>(s1[c]) / n);
        fresh = false;
      }
      run(first, last, begin, length);
      for (int64_t c = 0; c < channels; ++c) {
        moments[c].add(n, double(pivot[c]), total<T>(s1[c]), total<T>(s2[c]));
        pivot[c] = T(moments[c].mean);
      }
    });
    for (int64_t c = 0; c < channels; ++c) {
      args.mean[g * C + c0 + c] = moments[c].mean;
      args.var[g * C + c0 + c] = moments[c].square / count;
    }
  }

  FASTGAN_INLINE void forward_plane(const S* in, S* out, const Affine<T>& coefficient, int64_t length,
                                    T slope) const {
    AffineVec<T> f = splat(coefficient);
    int64_t i = 0;
    for (; i + L <= length; i += L) store(out + i, activate<A>(f(load<T>(in + i)), slope));
    if (i < length) {
      int rest = int(length - i);
      store_partial<T>(out + i, activate<A>(f(load_partial<T>(in + i, rest)), slope), rest);
    }
  }

  void forward_channels_first() const {
    if (!args.batch_statistics) return evaluate_channels_first();
    for_units([&](int64_t g, int64_t c0, int64_t channels) {
      unit_statistics(g, c0, channels);
      Affine<T> coefficient[kMaxChannels];
      for (int64_t c = 0; c < channels; ++c) coefficient[c] = affine(g, c0 + c);
      const int64_t HW = this->HW;  // not read again after each store
      const T slope = this->slope;
      for (int64_t n = 0; n < N; ++n)
        for (int64_t c = 0; c < channels; ++c)
          forward_plane(plane(x, g, n, c0 + c), plane(y, g, n, c0 + c), coefficient[c], HW, slope);
    });
  }

  // Without statistics to gather first, straight through memory.
  void evaluate_channels_first() const {
    fill_affine();
    const T *mean = coefficients(0, 0), *scale = coefficients(0, 1), *shift = coefficients(0, 2);
    parallel_for(threads, N * C, most(1, kGrain / HW), [&](int64_t begin, int64_t end) {
      const int64_t HW = this->HW, C = this->C;
      const T slope = this->slope;
      for (int64_t i = begin, c = begin % C; i < end; ++i, c = c + 1 < C ? c + 1 : 0)
        forward_plane(x + i * HW, y + i * HW, {mean[c], scale[c], shift[c]}, HW, slope);
    });
  }

  FASTGAN_INLINE void add_gradients(const S* p, const S* q, int64_t length, const Affine<T>& a, V& s1,
                                    V& s2) const {
    AffineVec<T> f = splat(a);
    V sum[2] = {}, along[2] = {};
    int64_t i = 0;
    auto one = [&](V in, V grad, int j) {
      V dz = masked<A>(grad, f(in), slope);
      sum[j] += dz;
      along[j] += dz * (in - f.mean);
    };
    for (; i + 2 * L <= length; i += 2 * L) {
      one(load<T>(p + i), load<T>(q + i), 0);
      one(load<T>(p + i + L), load<T>(q + i + L), 1);
    }
    if (i + L <= length) {
      one(load<T>(p + i), load<T>(q + i), 0);
      i += L;
    }
    if (i < length) {  // an infinite mean times the filling's zero would be NaN, as the run's own values are
      int rest = int(length - i);
      one(load_tail<T>(p + i, rest, a.mean), load_tail<T>(q + i, rest, T(0)), 0);
    }
    s1 += sum[0] + sum[1];
    s2 += along[0] + along[1];
  }

  void backward_channels_first() const {
    for_units([&](int64_t g, int64_t c0, int64_t channels) {
      Affine<T> coefficient[kMaxChannels];
      double sum[kMaxChannels] = {}, sum_x[kMaxChannels] = {};
      for (int64_t c = 0; c < channels; ++c) coefficient[c] = affine(g, c0 + c);
      if (wants_sums()) {
        V s1[kMaxChannels], s2[kMaxChannels];
        for_chunks([&](int64_t first, int64_t last, int64_t begin, int64_t length) {
          for (int64_t c = 0; c < channels; ++c) s1[c] = s2[c] = V{};
          for (int64_t n = first; n < last; ++n)
            for (int64_t c = 0; c < channels; ++c)
              add_gradients(plane(x, g, n, c0 + c) + begin, plane(dy, g, n, c0 + c) + begin, length,
                            coefficient[c], s1[c], s2[c]);
          for (int64_t c = 0; c < channels; ++c) {
            sum[c] += total<T>(s1[c]);
            sum_x[c] += total<T>(s2[c]);
          }
        });
        for (int64_t c = 0; c < channels; ++c) {
          sums(g)[c0 + c] = sum[c];
          sums(g)[padded + c0 + c] = sum_x[c];
        }
      }
      if (!dx) return;
      Gradient gradients[kMaxChannels];
      for (int64_t c = 0; c < channels; ++c) gradients[c] = gradient(g, c0 + c, sum[c], sum_x[c]);
      const int64_t HW = this->HW;
      const T slope = this->slope;
      const bool batch_statistics = args.batch_statistics;
      for (int64_t n = 0; n < N; ++n)
        for (int64_t c = 0; c < channels; ++c) {
          const S *in = plane(x, g, n, c0 + c), *grad = plane(dy, g, n, c0 + c);
          S* out = plane(dx, g, n, c0 + c);
          AffineVec<T> f = splat(coefficient[c]);
          V scale = fastgan::splat<T>(gradients[c].scale), along = fastgan::splat<T>(gradients[c].along),
            constant = fastgan::splat<T>(gradients[c].constant);
          auto one = [&](V v, V d) {
            V dz = masked<A>(d, f(v), slope);
            return batch_statistics ? dz * scale - (v - f.mean) * along - constant : dz * scale;
          };
          int64_t i = 0;
          for (; i + L <= HW; i += L) store(out + i, one(load<T>(in + i), load<T>(grad + i)));
          if (i < HW) {
            int rest = int(HW - i);
            store_partial<T>(out + i, one(load_partial<T>(in + i, rest), load_partial<T>(grad + i, rest)),
                             rest);
          }
        }
    });
  }

  // ---- (batch, spatial, channels) ----

  // body(group, block, first row, rows): rows counted from the start of the tensor
  template <class Body>
  void for_blocks(const Body& body) const {
    int64_t rows = norm_act_block_rows(args), blocks = norm_act_blocks(args), all = N * HW;
    parallel_for(threads, args.groups * blocks, most(1, kGrain / most(1, rows * C)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t u = begin; u < end; ++u) {
                     int64_t g = u / blocks, block = u % blocks, first = block * rows;
                     body(g, block, g * all + first, least(rows, all - first));
                   }
                 });
  }

  // A row's whole vectors and its tail are the same code twice: the tail's length is known before the loop
  // over rows.
  struct Whole {
    FASTGAN_INLINE V get(const S* p) const { return load<T>(p); }
    FASTGAN_INLINE void put(S* p, V v) const { store(p, v); }
  };
  struct Tail {
    int length;
    FASTGAN_INLINE V get(const S* p) const { return load_partial<T>(p, length); }
    FASTGAN_INLINE void put(S* p, V v) const { store_partial<T>(p, v, length); }
  };
  // body(channel, Whole or Tail) for the vectors of channels [c0, c1)
  template <class Body>
  static FASTGAN_INLINE void for_vectors(int64_t c0, int64_t c1, const Body& body) {
    int64_t c = c0;
    for (; c + L <= c1; c += L) body(c, Whole{});
    if (c < c1) body(c, Tail{int(c1 - c)});
  }

  // Sums of (x - pivot) and its square over some rows, for the channels [c0, c1): four rows for one visit to
  // the sums.
  static void row_moments(const S* rows, int64_t number, int64_t C, int64_t c0, int64_t c1, const T* pivot,
                          T* s1, T* s2) {
    for (int64_t c = 0; c < kStrip; ++c) s1[c] = s2[c] = T(0);
    for (; number >= 4; number -= 4, rows += 4 * C)
      for_vectors(c0, c1, [=](int64_t c, auto io) FASTGAN_INLINE_LAMBDA {
        V k = load<T>(pivot + c - c0), a = load<T>(s1 + c - c0), b = load<T>(s2 + c - c0);
        const S* p = rows + c;
        V d0 = io.get(p) - k, d1 = io.get(p + C) - k, d2 = io.get(p + 2 * C) - k, d3 = io.get(p + 3 * C) - k;
        store(s1 + c - c0, a + ((d0 + d1) + (d2 + d3)));
        store(s2 + c - c0, b + ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)));
      });
    for (; number > 0; --number, rows += C)
      for_vectors(c0, c1, [=](int64_t c, auto io) FASTGAN_INLINE_LAMBDA {
        V d = io.get(rows + c) - load<T>(pivot + c - c0);
        store(s1 + c - c0, load<T>(s1 + c - c0) + d);
        store(s2 + c - c0, load<T>(s2 + c - c0) + d * d);
      });
  }

  void block_statistics(int64_t g, int64_t block, int64_t first, int64_t rows) const {
    constexpr int64_t step = kRowsInT;
    double *mean = partial(g, block), *square = mean + padded;
    for (int64_t c0 = 0; c0 < C; c0 += kStrip) {
      int64_t c1 = least(c0 + kStrip, C), width = c1 - c0;
      T pivot[kStrip + 16] = {}, s1[kStrip + 16] = {}, s2[kStrip + 16] = {};
      const S* base = x + first * C;
      for (int64_t c = 0; c < width; ++c) pivot[c] = load1<T>(base + c0 + c);
      int64_t head = least(4, rows);  // rows that are read twice
      row_moments(base, head, C, c0, c1, pivot, s1, s2);
      for (int64_t c = 0; c < width; ++c) {
        pivot[c] += s1[c] / T(head);
        mean[c0 + c] = square[c0 + c] = 0;
      }
      for (int64_t r = 0; r < rows; r += step) {
        int64_t now = least(step, rows - r);
        row_moments(base + r * C, now, C, c0, c1, pivot, s1, s2);
        combine(width, double(r), double(now), pivot, s1, s2, mean + c0, square + c0);
        for (int64_t c = 0; c < width; ++c) pivot[c] = T(mean[c0 + c]);
      }
    }
  }

  // Chan's formula (Moments::add) for neighbouring channels at once.
  static void combine(int64_t width, double before, double n, const T* pivot, const T* s1, const T* s2,
                      double* mean, double* square) {
    double inverse = 1 / n, share = n / (before + n), both = before * share;
    for (int64_t c = 0; c < width; ++c) {
      double offset = double(s1[c]) * inverse, delta = double(pivot[c]) + offset - mean[c];
      square[c] += double(s2[c]) - double(s1[c]) * offset + delta * delta * both;
      mean[c] += delta * share;
    }
  }

  void combine_blocks() const {
    int64_t rows = norm_act_block_rows(args), blocks = norm_act_blocks(args), all = N * HW;
    parallel_for(threads, args.groups * ceil_div(C, kStrip), most(1, kGrain / most(1, blocks * kStrip)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t u = begin; u < end; ++u) {
                     int64_t g = u / ceil_div(C, kStrip), c0 = u % ceil_div(C, kStrip) * kStrip,
                             c1 = least(c0 + kStrip, C);
                     double *mean = args.mean + g * C, *square = args.var + g * C;
                     for (int64_t c = c0; c < c1; ++c) mean[c] = square[c] = 0;
                     for (int64_t block = 0; block < blocks; ++block) {
                       const double *m = partial(g, block), *s = m + padded;
                       double before = double(block * rows), n = double(least(rows, all - block * rows)),
                              share = n / (before + n);
                       for (int64_t c = c0; c < c1; ++c) {
                         double delta = m[c] - mean[c];
                         square[c] += s[c] + delta * delta * (before * share);
                         mean[c] += delta * share;
                       }
                     }
                     for (int64_t c = c0; c < c1; ++c) square[c] /= count;
                   }
                 });
  }

  void fill_affine() const {
    for (int64_t g = 0; g < args.groups; ++g)
      for (int64_t c = 0; c < padded; ++c) {
        Affine<T> a = c < C ? affine(g, c) : Affine<T>{T(0), T(0), T(0)};
        coefficients(g, 0)[c] = a.mean;
        coefficients(g, 1)[c] = a.scale;
        coefficients(g, 2)[c] = a.shift;
      }
  }

  // Where the coefficients of a group lie, by value so that no store makes the compiler read it again.
  struct Rows {
    const T *mean, *scale, *shift, *along, *constant;
    T slope;
    FASTGAN_INLINE AffineVec<T> at(int64_t c) const {
      return {load<T>(mean + c), load<T>(scale + c), load<T>(shift + c)};
    }
  };
  Rows rows_of(int64_t g) const {
    return {coefficients(g, 0), coefficients(g, 1), coefficients(g, 2),
            coefficients(g, 3), coefficients(g, 4), slope};
  }

  void forward_channels_last() const {
    if (args.batch_statistics) {
      for_blocks([&](int64_t g, int64_t block, int64_t first, int64_t rows) {
        block_statistics(g, block, first, rows);
      });
      combine_blocks();
    }
    fill_affine();
    for_blocks([&](int64_t g, int64_t, int64_t first, int64_t rows) {
      output_rows(x + first * C, y + first * C, rows, C, rows_of(g));
    });
  }

  static void output_rows(const S* in, S* out, int64_t rows, int64_t C, const Rows from) {
    for (; rows > 0; --rows, in += C, out += C)
      for_vectors(0, C, [=](int64_t c, auto io) FASTGAN_INLINE_LAMBDA {
        io.put(out + c, activate<A>(from.at(c)(io.get(in + c)), from.slope));
      });
  }

  void block_gradients(int64_t g, int64_t block, int64_t first, int64_t rows) const {
    constexpr int64_t step = kRowsInT;
    double *sum = partial(g, block), *sum_x = sum + padded;
    const Rows from = rows_of(g);
    for (int64_t c0 = 0; c0 < C; c0 += kStrip) {
      int64_t c1 = least(c0 + kStrip, C), width = c1 - c0;
      for (int64_t c = c0; c < c1; ++c) sum[c] = sum_x[c] = 0;
      for (int64_t r = 0; r < rows; r += step) {
        T s1[kStrip + 16] = {}, s2[kStrip + 16] = {};
        row_gradients(x + (first + r) * C, dy + (first + r) * C, least(step, rows - r), C, c0, c1, from, s1,
                      s2);
        for (int64_t c = 0; c < width; ++c) {
          sum[c0 + c] += double(s1[c]);
          sum_x[c0 + c] += double(s2[c]);
        }
      }
    }
  }

  static void row_gradients(const S* in, const S* grad, int64_t number, int64_t C, int64_t c0, int64_t c1,
                            const Rows from, T* s1, T* s2) {
    for (; number > 0; --number, in += C, grad += C)
      for_vectors(c0, c1, [=](int64_t c, auto io) FASTGAN_INLINE_LAMBDA {
        AffineVec<T> f = from.at(c);
        V v = io.get(in + c), dz = masked<A>(io.get(grad + c), f(v), from.slope);
        store(s1 + c - c0, load<T>(s1 + c - c0) + dz);
        store(s2 + c - c0, load<T>(s2 + c - c0) + dz * (v - f.mean));
      });
  }

  template <bool BatchStatistics>
  static void gradient_rows(const S* in, const S* grad, S* out, int64_t rows, int64_t C, const Rows from) {
    auto one = [](V v, V d, const AffineVec<T>& f, V along, V constant, T slope) FASTGAN_INLINE_LAMBDA {
      V dz = masked<A>(d, f(v), slope);
      // In evaluation x - mean has no part in it: infinity times the zero coefficient would be NaN.
      return BatchStatistics ? dz * f.scale - (v - f.mean) * along - constant : dz * f.scale;
    };
    for (; rows > 0; --rows, in += C, grad += C, out += C)
      for_vectors(0, C, [=](int64_t c, auto io) FASTGAN_INLINE_LAMBDA {
        V along = load<T>(from.along + c), constant = load<T>(from.constant + c);
        io.put(out + c, one(io.get(in + c), io.get(grad + c), from.at(c), along, constant, from.slope));
      });
  }

  void backward_channels_last() const {
    fill_affine();
    if (wants_sums()) {
      for_blocks([&](int64_t g, int64_t block, int64_t first, int64_t rows) {
        block_gradients(g, block, first, rows);
      });
      int64_t blocks = norm_act_blocks(args);
      for (int64_t g = 0; g < args.groups; ++g) {
        double* out = sums(g);
        for (int64_t c = 0; c < 2 * padded; ++c) out[c] = 0;
        for (int64_t block = 0; block < blocks; ++block) {
          const double* part = partial(g, block);
          for (int64_t c = 0; c < C; ++c) out[c] += part[c];
          for (int64_t c = padded; c < padded + C; ++c) out[c] += part[c];
        }
      }
    }
    if (!dx) return;
    for (int64_t g = 0; g < args.groups; ++g)
      for (int64_t c = 0; c < padded; ++c) {
        Gradient gradients =
            c < C ? gradient(g, c, sums(g)[c], sums(g)[padded + c]) : Gradient{T(0), T(0), T(0)};
        coefficients(g, 3)[c] = gradients.along;
        coefficients(g, 4)[c] = gradients.constant;
      }
    for_blocks([&](int64_t g, int64_t, int64_t first, int64_t rows) {
      int64_t at = first * C;
      if (args.batch_statistics)
        gradient_rows<true>(x + at, dy + at, dx + at, rows, C, rows_of(g));
      else
        gradient_rows<false>(x + at, dy + at, dx + at, rows, C, rows_of(g));
    });
  }

  void forward() const { args.channels_last ? forward_channels_last() : forward_channels_first(); }
  void backward() const {
    args.channels_last ? backward_channels_last() : backward_channels_first();
    if (args.grad_weight || args.grad_bias) weight_and_bias_gradients();
  }
};

template <class S, Activation A>
void run(const NormActArgs& args, const Threads& threads, bool backward) {
  NormAct<S, A> kernel{args, threads};
  backward ? kernel.backward() : kernel.forward();
}

template <class S>
void with_activation(const NormActArgs& args, const Threads& threads, bool backward) {
  switch (args.act) {
    case Activation::none:
      return run<S, Activation::none>(args, threads, backward);
    case Activation::relu:
      return run<S, Activation::relu>(args, threads, backward);
    case Activation::leaky_relu:
      return run<S, Activation::leaky_relu>(args, threads, backward);
  }
}

void with_dtype(const NormActArgs& args, const Threads& threads, bool backward) {
  switch (args.dtype) {
    case Dtype::float32:
      return with_activation<float>(args, threads, backward);
    case Dtype::float64:
      return with_activation<double>(args, threads, backward);
    case Dtype::bfloat16:
      return with_activation<bfloat16>(args, threads, backward);
    case Dtype::float16:
      return with_activation<float16>(args, threads, backward);
  }
}

}  // namespace
}  // namespace fastgan

extern "C" void FASTGAN_KERNEL(norm_act_forward)(const fastgan::NormActArgs& args,
                                                 const fastgan::Threads& threads) {
  fastgan::with_dtype(args, threads, false);
}
extern "C" void FASTGAN_KERNEL(norm_act_backward)(const fastgan::NormActArgs& args,
                                                  const fastgan::Threads& threads) {
  fastgan::with_dtype(args, threads, true);
}
