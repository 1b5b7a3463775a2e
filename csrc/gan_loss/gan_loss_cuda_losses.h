// The losses on CUDA, and what is made of a logit and of its gradient.
#pragma once
#include "gan_loss/gan_loss_cuda.h"

namespace fastgan {
namespace {

using Args = GanLossArgs;

// ---- the losses: value and derivative at a logit, with the weights of their real and their fake term ----

template <class T>
FASTGAN_DEVICE T positive_part(T x) {
  return x < T(0) ? T(0) : x;  // NaN stays
}

struct Bce {
  template <class T>
  static FASTGAN_DEVICE T value(T x, T real, T fake) {
    T rest = log1p(exp(x < T(0) ? x : -x));
    return real * (positive_part(-x) + rest) + fake * (positive_part(x) + rest);
  }
  template <class T>
  static FASTGAN_DEVICE T derivative(T x, T real, T fake) {
    T z = exp(x < T(0) ? x : -x), large = T(1) / (z + T(1)), small = z / (z + T(1));
    return fake * (x >= T(0) ? large : small) - real * (x >= T(0) ? small : large);
  }
};
struct Hinge {
  template <class T>
  static FASTGAN_DEVICE T value(T x, T real, T fake) {
    return real * positive_part(T(1) - x) + fake * positive_part(T(1) + x);
  }
  template <class T>
  static FASTGAN_DEVICE T derivative(T x, T real, T fake) {
    return (x <= T(-1) ? T(0) : fake) - (x >= T(1) ? T(0) : real);
  }
};
struct LeastSquares {
  template <class T>
  static FASTGAN_DEVICE T value(T x, T real, T) {
    return (x - real) * (x - real);
  }
  template <class T>
  static FASTGAN_DEVICE T derivative(T x, T real, T) {
    return T(2) * (x - real);
  }
};
struct Wasserstein {
  template <class T>
  static FASTGAN_DEVICE T value(T x, T real, T fake) {
    return (fake - real) * x;
  }
  template <class T>
  static FASTGAN_DEVICE T derivative(T, T real, T fake) {
    return fake - real;
  }
};

// ---- where things lie ----

struct Place {
  int64_t n, k, y, x;
};
FASTGAN_DEVICE Place place_of(const Args& a, int64_t logit) {
  Place p;
  int64_t rest;
  int64_t row = split(logit, a.out_width, p.x);
  rest = split(row, a.out_height, p.y);
  p.n = split(rest, a.outputs, p.k);
  return p;
}

// A weight, by its number in the order that the input has in memory.
struct Tap {
  int64_t k, c, i, j;
};
FASTGAN_DEVICE Tap tap_of(const Args& a, int64_t index) {
  Tap t;
  if (a.input.stride[1] == 1 && a.channels > 1)
    t.k = split(split(split(index, a.channels, t.c), a.kernel_width, t.j), a.kernel_height, t.i);
  else
    t.k = split(split(split(index, a.kernel_width, t.j), a.kernel_height, t.i), a.channels, t.c);
  return t;
}
template <class S>
FASTGAN_DEVICE void store_weight_gradient(const Args& a, const Tap& t, Accumulate<S> sum) {
  const int64_t* s = a.grad_weight_stride;
  narrow(static_cast<S*>(a.grad_weight)[t.k * s[0] + t.c * s[1] + t.i * s[2] + t.j * s[3]], sum);
}

template <class S>
FASTGAN_DEVICE Accumulate<S> at(const Strided& s, const Place& p) {
  return widen(static_cast<const S*>(
      s.data)[p.n * s.stride[0] + p.k * s.stride[1] + p.y * s.stride[2] + p.x * s.stride[3]]);
}

// The weights of the two terms, and the sample's.
template <class T>
FASTGAN_DEVICE void terms(const Args& a, const Place& p, T& real, T& fake, T& sample) {
  T target = a.target.data ? at<T>(a.target, p) : T(a.target_value);
  target = target * T(1 - a.label_smoothing) + T(0.5 * a.label_smoothing);
  real = a.pos_weight.data ? target * at<T>(a.pos_weight, p) : target;
  fake = T(1) - target;
  sample = a.sample_weight.data ? at<T>(a.sample_weight, p) : T(1);
}

// ---- a logit ----

// A logit is summed: what is made of it.
template <class S, class Loss>
FASTGAN_DEVICE void finish(const Args& a, const Place& p, int64_t logit, Accumulate<S> sum) {
  using T = Accumulate<S>;
  if (a.bias) sum += widen(static_cast<const S*>(a.bias)[p.k * a.bias_stride]);
  S rounded;
  narrow(rounded, sum);
  static_cast<S*>(a.logits)[logit] = rounded;
  T real, fake, sample;
  terms(a, p, real, fake, sample);
  T each = Loss::value(widen(rounded), real, fake) * sample;
  if (a.reduction != Reduction::none)
    static_cast<T*>(a.workspace)[logit] = each;
  else if (a.loss_accumulates)
    static_cast<T*>(a.loss_value)[logit] = each;
  else
    narrow(static_cast<S*>(a.loss_value)[logit], each);
}

// Of all that the backward was given with respect to a logit, of `count`.
template <class S, class Loss>
FASTGAN_DEVICE Accumulate<S> gradient_of(const Args& a, int64_t logit, int64_t count) {
  using T = Accumulate<S>;
  const Place p = place_of(a, logit);
  T gradient = 0;
  if (a.grad_loss.data) {
    T scale = a.reduction == Reduction::mean ? T(1) / T(count) : T(1), real, fake, sample;
    terms(a, p, real, fake, sample);
    T x = widen(static_cast<const S*>(a.logits)[logit]);
    gradient = at<T>(a.grad_loss, p) * scale * Loss::derivative(x, real, fake) * sample;
  }
  if (a.grad_logits.data) gradient += at<S>(a.grad_logits, p);
  return gradient;
}

}  // namespace
}  // namespace fastgan
