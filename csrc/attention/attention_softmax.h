// What happens to a tile of scores between the products, forward and backward. A Base says what is raised to
// what power: exponent(x) of a score, in whose units maxima are kept, and power(difference).
#pragma once
#include "attention/attention_tiles.h"

namespace fastgan {
namespace {

template <class T>
struct Natural {
  FASTGAN_INLINE Vec<T> exponent(Vec<T> score) const { return score; }
  FASTGAN_INLINE Vec<T> power(Vec<T> difference) const { return exp_of_difference(difference); }
};

// weights = exp(S − maximum), which may lie where the scores do; updates the rows' maxima and sums, and
// leaves in `rescale` what O is to be scaled by.
template <class T, class Base, class Weight>
void softmax_tile(const AttentionArgs& a, const Tile& t, const Base& base, const T* scores, int64_t stride,
                  Weight* weights, int64_t weights_stride, T* maximum, T* total, T* rescale,
                  uint32_t* words) {
  constexpr int W = lanes<T>;
  int64_t padded = whole_panels<T>(t.columns);
  for (int64_t r = 0; r < t.rows; ++r, scores += stride, weights += weights_stride) {
    Vec<T> first = broadcast<T>(-infinity<T>()), second = first;
    for (int64_t c = 0; c < padded; c += 2 * W) {
      first = max(load<T>(scores + c), first);
      second = max(load<T>(scores + c + W), second);
    }
    T before = maximum[r], now = base.exponent(broadcast<T>(fastgan::maximum<T>(max(first, second))))[0];
    if (!(now > before)) now = before;
    T subtracted = now == -infinity<T>() ? T(0) : now;
    if (a.has_dropout) draw(a, t, r, words);
    Vec<T> sum0{}, sum1{};
    for (int64_t c = 0; c < padded; c += 2 * W) {
      Vec<T> p0 = base.power(base.exponent(load<T>(scores + c)) - subtracted);
      Vec<T> p1 = base.power(base.exponent(load<T>(scores + c + W)) - subtracted);
      sum0 += p0;
      sum1 += p1;
      if (a.has_dropout) {
        p0 = select(kept<T>(words + c, a.threshold), p0, Vec<T>{});
        p1 = select(kept<T>(words + c + W, a.threshold), p1, Vec<T>{});
      }
      store(weights + c, p0);
      store(weights + c + W, p1);
    }
    // Most often 1, the maximum being the old one, or 0, there having been none.
    T scale = before == subtracted       ? T(1)
              : before == -infinity<T>() ? T(0)
                                         : base.power(broadcast<T>(before - subtracted))[0];
    rescale[r] = scale;
    total[r] = total[r] * scale + sum<T>(sum0 + sum1);
    maximum[r] = now;
  }
}

// Of scores and dP (before dropout): P (dropped and rescaled) in `scores` and dS in `grads`. D in two ways:
// where the tile has the whole row it is summed up from P ∘ dP, the numbers that it is subtracted from: a
// weight of 1 then has a gradient of exactly 0, as it must. Otherwise it is `delta`, from dO ∘ O, equal but
// for rounding.
template <class T>
void score_gradients(const AttentionArgs& a, const Tile& t, T* scores, T* grads, int64_t stride,
                     const T* deltas, uint32_t* words) {
  constexpr int W = lanes<T>;
  const bool whole_row = a.columns <= kAttentionKeyBlock;
  const int64_t padded = whole_panels<T>(t.columns);
  const T kept_scale = T(a.kept_scale);
  for (int64_t r = 0; r < t.rows; ++r, scores += stride, grads += stride) {
    const LogSumExp<T> logsumexp = logsumexp_of<T>(a, t, r);
    if (a.has_dropout) draw(a, t, r, words);
    if (!whole_row && !a.has_dropout) {
      const T delta = deltas[r];
      for (int64_t c = 0; c < padded; c += 2 * W) {
        Vec<T> p0 = logsumexp.probability(load<T>(scores + c));
        Vec<T> p1 = logsumexp.probability(load<T>(scores + c + W));
        store(scores + c, p0);
        store(scores + c + W, p1);
        store(grads + c, p0 * (load<T>(grads + c) - delta));
        store(grads + c + W, p1 * (load<T>(grads + c + W) - delta));
      }
      continue;
    }
    Vec<T> sums{};
    for (int64_t c = 0; c < padded; c += W) {
      Vec<T> p = logsumexp.probability(load<T>(scores + c)), g = load<T>(grads + c);
      if (a.has_dropout) {
        g = select(kept<T>(words + c, a.threshold), g * kept_scale, Vec<T>{});
        store(grads + c, g);
      }
      sums += p * g;
      store(scores + c, p);
    }
    T delta = whole_row ? sum<T>(sums) : deltas[r];
    for (int64_t c = 0; c < padded; c += W) {
      Vec<T> p = load<T>(scores + c);
      store(grads + c, p * (load<T>(grads + c) - delta));
      if (a.has_dropout) store(scores + c, select(kept<T>(words + c, a.threshold), p * kept_scale, Vec<T>{}));
    }
  }
}

}  // namespace
}  // namespace fastgan
