// common/vector.h by itself: the conversions of the 16-bit types over all of their values, and exp against
// libm in double over its whole range. Prints what it measured; exits non-zero where a bound is broken.
#include "common/vector.h"

#include <cmath>
#include <cstdio>
#include <limits>

using namespace fastgan;

namespace {

int failures = 0;

void expect(bool ok, const char* what, double value) {
  if (ok) return;
  ++failures;
  if (failures < 20) std::printf("FAILED %s at %.9g\n", what, value);
}

double ulps(float got, double exact) {
  if (std::isnan(exact)) return std::isnan(got) ? 0 : 1e9;
  float nearest = float(exact);
  if (got == nearest) return 0;
  if (std::isinf(got) || std::isinf(nearest)) return 1e9;
  float step = std::fabs(std::nextafterf(nearest, std::numeric_limits<float>::infinity()) - nearest);
  return std::fabs(double(got) - exact) / double(step);
}

void check_exp() {
  double worst = 0, worst_at = 0;
  for (double at = -110; at < 92; at += 1e-3) {
    float x = float(at);
    Vec<float> v = exp(splat<float>(x));
    double error = ulps(v[0], std::exp(double(x)));
    if (x > -87 && x < 88 && error > worst) worst = error, worst_at = x;
    // Denormal results lose bits by their nature; they may be one step off.
    expect(error <= 2, "exp", x);
    for (int i = 1; i < lanes<float>; ++i) expect(v[i] == v[0], "exp lane", x);
  }
  const float inf = std::numeric_limits<float>::infinity();
  expect(exp(splat<float>(-inf))[0] == 0, "exp(-inf)", -inf);
  expect(exp(splat<float>(inf))[0] == inf, "exp(inf)", inf);
  expect(std::isnan(exp(splat<float>(std::nanf("")))[0]), "exp(nan)", 0);
  expect(exp(splat<float>(0.0f))[0] == 1, "exp(0)", 0);
  std::printf("exp: %.3f ulp at %.6g\n", worst, worst_at);
  expect(worst <= 1.0, "exp on [-87, 88] within 1 ulp", worst_at);
}

template <class Half, class ToHalf>
void check_half(const char* name, const ToHalf& to_half) {
  for (uint32_t base = 0; base < 65536; base += lanes<float>) {
    Half in[lanes<float>], out[lanes<float>];
    for (int i = 0; i < lanes<float>; ++i) in[i].bits = uint16_t(base + i);
    Vec<float> v = load<float>(in);
    store(out, v);
    for (int i = 0; i < lanes<float>; ++i) {
      float scalar = to_float(in[i]);
      bool nan = std::isnan(scalar);
      expect(nan ? std::isnan(v[i]) : v[i] == scalar, name, double(base + i));
      expect(nan ? std::isnan(to_float(out[i])) : out[i].bits == in[i].bits, name, double(base + i));
      expect(nan ? std::isnan(to_float(to_half(scalar))) : to_half(scalar).bits == in[i].bits, name,
             double(base + i));
      if (nan || std::isinf(scalar)) continue;
      // Half way to the next value, and a little to each side: nearest, ties to even.
      Half next = {uint16_t(in[i].bits + 1)};
      float after = to_float(next);
      if (std::isinf(after) || std::isnan(after) || (in[i].bits & 0x7fff) == 0x7fff) continue;
      float middle = float((double(scalar) + double(after)) / 2);
      uint16_t even = in[i].bits % 2 == 0 ? in[i].bits : next.bits;
      expect(to_half(middle).bits == even, "tie", middle);
      expect(to_half(std::nextafterf(middle, scalar)).bits == in[i].bits, "below a tie", middle);
      expect(to_half(std::nextafterf(middle, after)).bits == next.bits, "above a tie", middle);
    }
  }
}

}  // namespace

int main() {
  check_exp();
  check_half<bfloat16>("bfloat16", [](float x) { return to_bfloat16(x); });
  check_half<float16>("float16", [](float x) { return to_float16(x); });
  std::printf("%d failures with %d-byte vectors\n", failures, kVectorBytes);
  return failures != 0;
}
