// The bilinear algorithm of Toom, Cook and Winograd for short convolutions, its matrices computed from the
// points.
//
// With x of m + r - 1 numbers, w of r taps, y of m outputs, the sum over i and u of x[i + u] w[u] y[i] is the
// sum over n = m + r - 1 points of (Bx)(Gw)(Ay): n products in place of m r. Dropping one factor gives the
// map onto it, so the three passes of a convolution share the three matrices: outputs are Aᵀ(Bx · Gw), input
// gradients Bᵀ(Ay · Gw) (added where tiles overlap), weight gradients Gᵀ(Bx · Ay). In two dimensions each
// matrix works on rows and on columns.
//
// The points are in pairs p, -p (half of the work is shared: even and odd powers apart), then 0 for an odd
// number of finite points, then infinity. They were chosen for the error in float32 by search, and are dyadic
// so that the matrices are exact; root mean square error of 256 channels, forward / input gradient / weight
// gradient:
//   F(4,2)  ±1/2, ±5/4, inf       7.2e-7  2.7e-7  3.3e-7    (0, 1, -1, 2, inf, the
//   usual: 14.6e-7  4.5e-7  5.3e-7) F(4,3)  ±5/8, ±3/2, 0, inf   11.5e-7  4.1e-7  4.2e-7    (0, ±1, ±2, inf:
//   28e-7  9e-7  13e-7 at 256)
#pragma once
#include "common/vector.h"

namespace fastgan {
namespace {

template <int kPoints, int kSize>
struct TransformMatrix {
  float at[kPoints][kSize];
};

// F(kOutputs, kTaps) on pairs of points ±kPair[i], 0 where the number of points asks for it, and infinity.
template <int kOutputs, int kTaps>
struct Toom {
  static constexpr int points = kOutputs + kTaps - 1;
  static constexpr int pairs = (points - 1) / 2;
  static constexpr bool with_zero = (points - 1) % 2 == 1;

  static constexpr double point(int j) {
    constexpr double even[2] = {0.5, 1.25}, odd[2] = {0.625, 1.5};
    if (j >= 2 * pairs) return 0;
    double p = points == 4 ? 1.0 : with_zero ? odd[j / 2] : even[j / 2];
    return j % 2 ? -p : p;
  }

  // powers of the point, for infinity the highest: A (points × outputs), and G before its division
  template <int kSize>
  static constexpr TransformMatrix<points, kSize> powers() {
    TransformMatrix<points, kSize> out{};
    for (int j = 0; j < points - 1; ++j) {
      double power = 1;
      for (int i = 0; i < kSize; ++i, power *= point(j)) out.at[j][i] = float(power);
    }
    out.at[points - 1][kSize - 1] = 1;
    return out;
  }
  static constexpr TransformMatrix<points, kOutputs> a() { return powers<kOutputs>(); }

  static constexpr TransformMatrix<points, kTaps> g() {
    TransformMatrix<points, kTaps> out = powers<kTaps>();
    for (int j = 0; j < points - 1; ++j) {
      // Of a pair, both rows are divided by the first one's number; its sign for the second goes to B.
      const int base = j >= 2 * pairs ? j : j / 2 * 2;
      double divisor = 1;
      for (int l = 0; l < points - 1; ++l)
        if (l != base) divisor *= point(base) - point(l);
      for (int i = 0; i < kTaps; ++i) out.at[j][i] = float(double(out.at[j][i]) / divisor);
    }
    return out;
  }

  // rows: the polynomial with zeros at all other finite points; for infinity, at all of them
  static constexpr TransformMatrix<points, points> b() {
    TransformMatrix<points, points> out{};
    for (int j = 0; j < points; ++j) {
      double c[points] = {1};
      int degree = 0;
      for (int l = 0; l < points - 1; ++l) {
        if (l == j) continue;
        ++degree;
        for (int i = degree; i >= 0; --i) c[i] = (i > 0 ? c[i - 1] : 0) - point(l) * c[i];
      }
      bool second = j < 2 * pairs && j % 2 == 1;
      for (int i = 0; i < points; ++i) out.at[j][i] = float(second && !with_zero ? -c[i] : c[i]);
    }
    return out;
  }
};

// out (points) = M in (size). Rows 2i and 2i + 1 of M differ in the sign of the odd columns.
template <class Algorithm, auto kMatrix, int kPoints, int kSize>
FASTGAN_INLINE void apply(const Vec<float> (&in)[kSize], Vec<float> (&out)[kPoints]) {
#pragma GCC unroll 8
  for (int j = 0; j < kPoints; ++j) {
    if (j < 2 * Algorithm::pairs && j % 2 == 1) continue;
    Vec<float> even{}, odd{};
    bool any_even = false, any_odd = false;
#pragma GCC unroll 8
    for (int i = 0; i < kSize; ++i) {
      const float factor = kMatrix.at[j][i];
      if (factor == 0) continue;
      bool& any = i % 2 ? any_odd : any_even;
      Vec<float>& sum = i % 2 ? odd : even;
      sum = any ? sum + in[i] * factor : in[i] * factor;
      any = true;
    }
    out[j] = !any_odd ? even : !any_even ? odd : even + odd;
    if (j < 2 * Algorithm::pairs) out[j + 1] = even - odd;
  }
}

// out (size) = Mᵀ in (points)
template <class Algorithm, auto kMatrix, int kPoints, int kSize>
FASTGAN_INLINE void apply_transposed(const Vec<float> (&in)[kPoints], Vec<float> (&out)[kSize]) {
  Vec<float> sums[kPoints];
#pragma GCC unroll 8
  for (int j = 0; j < kPoints; ++j) {
    if (j >= 2 * Algorithm::pairs) {
      sums[j] = in[j];
    } else if (j % 2 == 0) {
      sums[j] = in[j] + in[j + 1];
      sums[j + 1] = in[j] - in[j + 1];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSize; ++i) {
    Vec<float> sum{};
    bool any = false;
#pragma GCC unroll 8
    for (int j = 0; j < kPoints; ++j) {
      if (j < 2 * Algorithm::pairs && j % 2 == 1) continue;
      const float factor = kMatrix.at[j][i];
      if (factor == 0) continue;
      Vec<float> part = sums[j < 2 * Algorithm::pairs ? j + i % 2 : j] * factor;
      sum = any ? sum + part : part;
      any = true;
    }
    out[i] = sum;
  }
}

// A tile of size × size (load(i, j)) to points × points (store(i, j, v)), and the transpose of that map.
template <class Algorithm, auto kMatrix, class Load, class Store>
FASTGAN_INLINE void transform_tile(const Load& load, const Store& store) {
  constexpr int n = sizeof(kMatrix.at) / sizeof(kMatrix.at[0]), size = sizeof(kMatrix.at[0]) / sizeof(float);
  Vec<float> middle[n][size];
#pragma GCC unroll 8
  for (int j = 0; j < size; ++j) {
    Vec<float> in[size], out[n];
#pragma GCC unroll 8
    for (int i = 0; i < size; ++i) in[i] = load(i, j);
    apply<Algorithm, kMatrix>(in, out);
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) middle[i][j] = out[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) {
    Vec<float> out[n];
    apply<Algorithm, kMatrix>(middle[i], out);
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) store(i, j, out[j]);
  }
}

template <class Algorithm, auto kMatrix, class Load, class Store>
FASTGAN_INLINE void transform_tile_back(const Load& load, const Store& store) {
  constexpr int n = sizeof(kMatrix.at) / sizeof(kMatrix.at[0]), size = sizeof(kMatrix.at[0]) / sizeof(float);
  Vec<float> middle[size][n];
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) {
    Vec<float> in[n], out[size];
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) in[i] = load(i, j);
    apply_transposed<Algorithm, kMatrix>(in, out);
#pragma GCC unroll 8
    for (int i = 0; i < size; ++i) middle[i][j] = out[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < size; ++i) {
    Vec<float> out[size];
    apply_transposed<Algorithm, kMatrix>(middle[i], out);
#pragma GCC unroll 8
    for (int j = 0; j < size; ++j) store(i, j, out[j]);
  }
}

}  // namespace
}  // namespace fastgan
