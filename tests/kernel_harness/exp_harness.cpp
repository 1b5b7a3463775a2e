// The attention kernels' exp (attention_tiles.h) and the common one (vector.h) against libm in double: every
// 4,099th float32 of their range, or, with the argument "all", every one. Exits non-zero where one is more
// than 2 ulp off, or a special value is wrong.
#include <cstring>
#include <limits>

#include "attention/attention_tiles.h"
#include "harness.h"

using namespace fastgan;

namespace {

struct Worst {
  double ulps = 0;
  float at = 0;
  void see(float got, double exact, float x) {
    int exponent;
    std::frexp(exact, &exponent);
    double error = std::fabs(double(got) - exact) / std::ldexp(1.0, exponent - 24);
    if (!(error <= ulps)) ulps = error, at = x;
  }
};

// The floats whose bits are from + stride · i, below end.
void check(uint32_t from, uint32_t end, uint32_t stride, Worst& difference, Worst& common) {
  for (uint64_t bits = from; bits < end; bits += uint64_t(stride) * lanes<float>) {
    Vec<float> x{};
    for (int i = 0; i < lanes<float>; ++i) {
      uint64_t own = bits + uint64_t(stride) * uint64_t(i);
      uint32_t word = uint32_t(own < end ? own : bits);
      float value;
      std::memcpy(&value, &word, 4);
      x[i] = value;
    }
    Vec<float> ours = exp_of_difference(x), theirs = fastgan::exp(x);
    for (int i = 0; i < lanes<float>; ++i) {
      double exact = std::exp(double(x[i]));
      difference.see(ours[i], exact, x[i]);
      common.see(theirs[i], exact, x[i]);
    }
  }
}

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

}  // namespace

int main(int count, char** arguments) {
  const bool all = count > 1 && std::strcmp(arguments[1], "all") == 0;
  const uint32_t stride = all ? 1 : 4099;
  Worst worst[4];
  std::thread negative(
      [&] { check(0x80000000u, bits_of(-87.33f) + 1, stride, worst[0], worst[1]); });  // -0 to -87.33
  check(0, bits_of(88.0f) + 1, stride, worst[2], worst[3]);
  negative.join();
  for (int i = 0; i < 4; ++i) {
    std::printf("%s, %s: %.3f ulp at %.9g\n", i % 2 ? "exp" : "exp_of_difference", i < 2 ? "x < 0" : "x > 0",
                worst[i].ulps, double(worst[i].at));
    harness::expect(worst[i].ulps <= 2, "an exp within 2 ulp");
  }
  const float inf = std::numeric_limits<float>::infinity();
  auto of = [](float x) { return exp_of_difference(splat<float>(x))[lanes<float> - 1]; };
  harness::expect(of(0.0f) == 1 && of(-0.0f) == 1, "exp(0) is 1 exactly");
  harness::expect(of(-inf) == 0 && of(-3e38f) == 0 && of(-87.4f) == 0, "nothing far below");
  for (uint32_t payload : {0x7fc00000u, 0xffc00001u, 0x7fffffffu, 0x7fc00100u}) {
    float nan;
    std::memcpy(&nan, &payload, 4);
    harness::expect(std::isnan(of(nan)), "NaN stays NaN, whatever its payload");
  }
  return harness::result();
}
