// The losses of a discriminator's logits, as functors, and their gradients: a row of logits at a time.
//
// Losses are summed in double, an output row at a time. The loss of the rounded logit is taken, the one that
// is returned, so that it is the loss of the logits that the caller sees. softplus is max(x, 0) +
// log1p(exp(-|x|)): its two terms are non-negative, as are the two terms of a loss, so nothing cancels and
// nothing need be clamped; NaN stays NaN.
//
// Unnamed namespace: see common/threads.h.
#pragma once
#include "common/vector.h"
#include "gan_loss/gan_loss.h"

namespace fastgan {
namespace {

using Args = GanLossArgs;

FASTGAN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTGAN_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
FASTGAN_INLINE int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

}  // namespace
}  // namespace fastgan
