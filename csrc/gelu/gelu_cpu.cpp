// Bias and GELU on the CPU, one pass each way. The normal distribution below zero is exp(-x^2 / 2) times a
// function that a polynomial of t = 1 / (1 + 0.35 |x|) follows to 3e-8, and its density is the same
// exponential: an exponential and a division an element, forward and backward. Above zero it is 1 minus that.
#include "gelu/gelu.h"

#include <cmath>

namespace fastgan {
namespace {

constexpr int64_t kGrain = 16384;                    // elements that are worth a thread
constexpr int64_t kRow = 4096;                       // elements at a time where there is no bias
constexpr double kDensity = 0.39894228040143267794;  // 1 / sqrt(2 pi)

// Phi(-|x|) / exp(-x^2 / 2) = erfcx(|x| / sqrt 2) / 2 in powers of t from the first on: least relative error
// on [0, 14.5], beyond which the exponential is zero.
constexpr float kTail[] = {0.13962130649937196f, 0.13986352237516425f,  0.11982123091649279f,
                           0.10555274937778289f, -0.02321298423468658f, 0.15932066967879804f,
                           -0.2558398996725983f, 0.14403137048515993f,  -0.02915798141187283f};

template <class T>
struct Gelu {
  Vec<T> value, slope;
};

// exp(a) for a <= 0: without the care for denormal and infinite results that exp of vector.h takes. exp(-87)
// is the least, 1e-38.
FASTGAN_INLINE Vec<float> exp_of_negative(Vec<float> a) {
  a = max(splat<float>(-87.0f), a);  // NaN stays
  Vec<float> shifted;
  const Vec<float> p = exp_of_rest(a, shifted);
  return (Vec<float>)((Mask<float>)p + ((Mask<float>)shifted << 23));  // times 2^n
}

template <bool kSlope>
FASTGAN_INLINE Gelu<float> by_erf(Vec<float> x) {
  typedef Vec<float> V;
  const V size = select(x < 0.0f, -x, x), t = 1.0f / (1.0f + 0.35f * size);
  V p = splat<float>(kTail[8]);
#pragma GCC unroll 8
  for (int i = 7; i >= 0; --i) p = p * t + kTail[i];
  const V bell = exp_of_negative(x * x * -0.5f), tail = p * t * bell;
  const V phi = select(x < 0.0f, tail, 1.0f - tail);  // NaN is not below zero and stays
  return {x * phi, kSlope ? phi + x * bell * float(kDensity) : V{}};
}

template <bool kSlope>
FASTGAN_INLINE Gelu<double> by_erf(Vec<double> x) {
  Gelu<double> out{};
  for (int i = 0; i < lanes<double>; ++i) {
    const double phi = 0.5 * std::erfc(-x[i] * 0.70710678118654752440);
    out.value[i] = x[i] * phi;
    if (kSlope) out.slope[i] = phi + x[i] * kDensity * std::exp(-0.5 * x[i] * x[i]);
  }
  return out;
}

template <bool kSlope, class T>
FASTGAN_INLINE Gelu<T> by_tanh(Vec<T> x) {
  constexpr T kTwice = T(1.5957691216057307118), kCube = T(0.044715);  // 2 sqrt(2 / pi)
  const Vec<T> square = x * x, s = T(1) / (T(1) + exp(-kTwice * x * (T(1) + kCube * square)));
  return {x * s, kSlope ? s + x * s * (T(1) - s) * kTwice * (T(1) + T(3) * kCube * square) : Vec<T>{}};
}

template <class S, bool kTanh, bool kBias>
struct Pass {
  using T = Accumulate<S>;
  using V = Vec<T>;
  const GeluArgs& args;
  const int64_t width = args.width;
  const T* const bias = static_cast<const T*>(args.bias);

  template <bool kSlope>
  static FASTGAN_INLINE Gelu<T> gelu(V x) {
    if constexpr (kTanh)
      return by_tanh<kSlope, T>(x);
    else
      return by_erf<kSlope>(x);
  }

  template <bool kWhole>
  FASTGAN_INLINE V at(const S* x, int64_t i, int count, std::bool_constant<kWhole> whole) const {
    V v = load_at<T>(x + i, count, whole);
    if constexpr (kBias) v += load_at<T>(bias + i, count, whole);
    return v;
  }

  // Of `length` elements from `start` on, which begin a row where there is a bias.
  void forward(int64_t start, int64_t length) const {
    const S* x = static_cast<const S*>(args.input) + start;
    S* y = static_cast<S*>(args.output) + start;
    for_columns<T>(0, length, [&](int64_t i, int count, auto whole, auto) FASTGAN_INLINE_LAMBDA {
      store_at<T>(y + i, gelu<false>(at(x, i, count, whole)).value, count, whole);
    });
  }

  template <bool kSums>
  void backward(int64_t start, int64_t length, T* sums) const {
    const S* x = static_cast<const S*>(args.input) + start;
    const S* g = static_cast<const S*>(args.grad_output) + start;
    S* out = static_cast<S*>(args.grad_input) + start;
    for_columns<T>(0, length, [&](int64_t i, int count, auto whole, auto) FASTGAN_INLINE_LAMBDA {
      V dx = load_at<T>(g + i, count, whole) * gelu<true>(at(x, i, count, whole)).slope;
      store_at<T>(out + i, dx, count, whole);
      if constexpr (kSums) store_at<T>(sums + i, load_at<T>(sums + i, count, whole) + dx, count, whole);
    });
  }

  // body(start, length): rows, or pieces of the whole.
  template <class Body>
  void for_rows(const Threads& threads, const Body& body) const {
    const int64_t all = args.rows * width, length = kBias ? width : kRow;
    if (all == 0) return;
    parallel_for(threads, (all + length - 1) / length, kGrain / length + 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t start = row * length;
        body(start, all - start < length ? all - start : length);
      }
    });
  }

  void run_forward(const Threads& threads) const {
    for_rows(threads, [&](int64_t start, int64_t length) { forward(start, length); });
  }

  void run_backward(const Threads& threads) const {
    if (!args.grad_bias) {
      for_rows(threads, [&](int64_t start, int64_t length) { backward<false>(start, length, nullptr); });
      return;
    }
    const int64_t blocks = row_blocks(args.rows);
    parallel_for(threads, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        T* sums = block_sums<T>(args.scratch, block, width);
        std::memset(sums, 0, size_t(width) * sizeof(T));
        for (int64_t row = args.rows * block / blocks; row < args.rows * (block + 1) / blocks; ++row)
          backward<true>(row * width, width, sums);
      }
    });
    add_blocks<T>(threads, args.scratch, blocks, width,
                  [&](int64_t i, double sum) { static_cast<T*>(args.grad_bias)[i] = T(sum); });
  }
};

// body(pass) for the call's types, formula and whether it has a bias.
template <class Body>
void with_pass(const GeluArgs& args, const Body& body) {
  with_storage(args.dtype, [&]<class S>(S) {
    if (args.by_tanh)
      args.bias ? body(Pass<S, true, true>{args}) : body(Pass<S, true, false>{args});
    else
      args.bias ? body(Pass<S, false, true>{args}) : body(Pass<S, false, false>{args});
  });
}

}  // namespace
}  // namespace fastgan

extern "C" void FASTGAN_KERNEL(gelu_forward)(const fastgan::GeluArgs& args, const fastgan::Threads& threads) {
  fastgan::with_pass(args, [&](const auto& pass) { pass.run_forward(threads); });
}

extern "C" void FASTGAN_KERNEL(gelu_backward)(const fastgan::GeluArgs& args,
                                              const fastgan::Threads& threads) {
  fastgan::with_pass(args, [&](const auto& pass) { pass.run_backward(threads); });
}
