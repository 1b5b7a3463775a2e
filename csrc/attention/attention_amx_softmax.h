// The softmax of a tile for AMX: attention_softmax.h's forward in powers of two, and a backward of its own,
// with weights and score gradients rounded on the way to where the next product reads them. Products are
// so fast here that these loops take most of the time: per vector of 16 scores some 20 instructions forward
// and 35 backward.
//
// Scores come as the product left them, with a factor: t = score · factor is the exponent of two (factor =
// scale · log2 e, or log2 e where masks and bias have made scaled scores of them). It is rounded before the
// row's maximum, or its log-sum-exp in the same units, is subtracted, so that the greatest weight of a row is
// exactly 1.
#pragma once
#include "attention/attention_softmax.h"
#include "common/amx.h"

namespace fastgan {
namespace {

constexpr double kLog2e = 1.4426950408889634;

// Not to be fused with a subtraction behind it.
FASTGAN_INLINE Vec<float> product(Vec<float> x, float factor) {
  Vec<float> out = x * factor;
#if defined(__AVX512F__)
  asm("" : "+v"(out));
#endif
  return out;
}

// 2^t for t <= 127, relative error 3e-6, three orders below bfloat16's; exactly 1 at 0, zero below -125; NaN
// stays.
FASTGAN_INLINE Vec<float> power_of_two(Vec<float> t) {
  constexpr float kShift = 12582912.0f, kLowest = -125.0f;
  const Vec<float> shifted = t + kShift, r = t - (shifted - kShift);
  Vec<float> p = r * 9.582576647e-3f + 5.590682995e-2f;
  p = p * r + 2.402410728e-1f;
  p = p * r + 6.931241184e-1f;
  p = p * r + 1.0f;
  const Mask<float> power = ((Mask<float>)shifted << 23) + (127 << 23);
  return (Vec<float>)((Mask<float>)(p * (Vec<float>)power) & ~(t < kLowest));
}

// Powers of two (attention_softmax.h) of scores that are to be multiplied by a factor.
struct Binary {
  float factor;
  FASTGAN_INLINE Vec<float> exponent(Vec<float> score) const { return product(score, factor); }
  FASTGAN_INLINE Vec<float> power(Vec<float> difference) const { return power_of_two(difference); }
};

// A row's log-sum-exp as a power of two; of a row beyond the tile, whose weights are 0, that of a dead one.
inline LogSumExp<float> power_sum(const AttentionArgs& a, const Tile& t, int64_t r) {
  return LogSumExp<float>(r < t.rows ? a.logsumexp[row_index(a, t.batch, t.head, t.row + r)] * kLog2e
                                     : -infinity<double>());
}
FASTGAN_INLINE Vec<float> weight(const Binary& base, const LogSumExp<float>& sum, const float* score) {
  return base.power(base.exponent(load<float>(score)) - sum.subtracted - sum.remainder);
}

// What the backward's loops write of two rows of 16 columns.
struct BackwardTile {
  float *scores, *grads;  // in: scores and dP
  int64_t stride;
  bfloat16 *weight_pairs, *score_pairs;  // out: P, dropped and rescaled, and dS, as pairs,
  bfloat16* score_rows;                  // and dS as rows
  int64_t row_stride;
  bool keeps_gradients;  // dS in `grads` as well
};

FASTGAN_INLINE void write_pair(const BackwardTile& x, int64_t panel, int64_t r, int64_t c, Vec<float> p0,
                               Vec<float> p1, Vec<float> d0, Vec<float> d1) {
  const int64_t at = c * panel + r * kTile;
  store(reinterpret_cast<float*>(x.weight_pairs + at), rounded_pairs(p0, p1));
  store(reinterpret_cast<float*>(x.score_pairs + at), rounded_pairs(d0, d1));
  store(x.score_rows + r * x.row_stride + c, d0);
  store(x.score_rows + (r + 1) * x.row_stride + c, d1);
  if (x.keeps_gradients) {
    store(x.grads + r * x.stride + c, d0);
    store(x.grads + (r + 1) * x.stride + c, d1);
  }
}

// dS = P ∘ (dP − delta) and P, of tiles that are not whole rows and drop nothing: in one pass.
inline void score_gradients_in_one(const AttentionArgs& a, const Tile& t, const Binary& base,
                                   const BackwardTile& x, const float* deltas) {
  const int64_t columns = whole_tiles(t.columns), height = whole_tiles(t.rows);
  for (int64_t r = 0; r < height; r += 2) {
    const LogSumExp<float> sum0 = power_sum(a, t, r), sum1 = power_sum(a, t, r + 1);
    const float delta0 = r < t.rows ? deltas[r] : 0, delta1 = r + 1 < t.rows ? deltas[r + 1] : 0;
    const float *s0 = x.scores + r * x.stride, *s1 = s0 + x.stride;
    const float *g0 = x.grads + r * x.stride, *g1 = g0 + x.stride;
    for (int64_t c = 0; c < columns; c += kTile) {
      const Vec<float> p0 = weight(base, sum0, s0 + c), p1 = weight(base, sum1, s1 + c);
      write_pair(x, height, r, c, p0, p1, p0 * (load<float>(g0 + c) - delta0),
                 p1 * (load<float>(g1 + c) - delta1));
    }
  }
}

// The same with dropout, or with deltas that are summed up here from P ∘ dP, the numbers that they are
// subtracted from: a weight of 1 then has a gradient of exactly 0.
inline void score_gradients_in_two(const AttentionArgs& a, const Tile& t, const Binary& base,
                                   const BackwardTile& x, const float* deltas, uint32_t* words) {
  const bool whole_row = a.columns <= kAttentionKeyBlock;
  const int64_t columns = whole_tiles(t.columns), height = whole_tiles(t.rows);
  const float kept_scale = float(a.kept_scale);
  for (int64_t r = 0; r < height; r += 2) {
    float delta[2] = {};
    for (int64_t i = 0; i < 2; ++i) {
      float *s = x.scores + (r + i) * x.stride, *g = x.grads + (r + i) * x.stride;
      if (r + i >= t.rows) {
        std::memset(s, 0, size_t(columns) * sizeof *s);
        std::memset(g, 0, size_t(columns) * sizeof *g);
        continue;
      }
      const LogSumExp<float> row = power_sum(a, t, r + i);
      if (a.has_dropout) draw(a, t, r + i, words + i * (kAttentionKeyBlock + kPhiloxStep));
      Vec<float> sums{};
      for (int64_t c = 0; c < columns; c += kTile) {
        const Vec<float> p = weight(base, row, s + c);
        Vec<float> d = load<float>(g + c);
        if (a.has_dropout) {
          d = select(kept<float>(words + i * (kAttentionKeyBlock + kPhiloxStep) + c, a.threshold),
                     d * kept_scale, Vec<float>{});
          store(g + c, d);
        }
        sums += p * d;
        store(s + c, p);
      }
      delta[i] = whole_row ? sum<float>(sums) : deltas[r + i];
    }
    const float *s0 = x.scores + r * x.stride, *s1 = s0 + x.stride;
    const float *g0 = x.grads + r * x.stride, *g1 = g0 + x.stride;
    for (int64_t c = 0; c < columns; c += kTile) {
      Vec<float> p0 = load<float>(s0 + c), p1 = load<float>(s1 + c);
      const Vec<float> d0 = p0 * (load<float>(g0 + c) - delta[0]), d1 = p1 * (load<float>(g1 + c) - delta[1]);
      if (a.has_dropout) {
        p0 = select(kept<float>(words + c, a.threshold), p0 * kept_scale, Vec<float>{});
        p1 = select(kept<float>(words + kAttentionKeyBlock + kPhiloxStep + c, a.threshold), p1 * kept_scale,
                    Vec<float>{});
      }
      write_pair(x, height, r, c, p0, p1, d0, d1);
    }
  }
}

}  // namespace
}  // namespace fastgan
