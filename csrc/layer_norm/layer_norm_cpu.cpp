// Dropout, residual and layer norm on the CPU. What a layer of a Transformer does between its products is
// bound by memory: apart, dropout, sum and norm read and write a row seven times forward. Here a row, a few
// KB, is read once with its residual and written twice; its second and third pass find it in L1.
//
// Backward a row is read three times from L1: once for the two averages, with the sums for weight and bias,
// once for its gradient. Those sums are kept by blocks of rows, which the shape alone cuts, in double over
// blocks.
#include "layer_norm/layer_norm.h"

#include <cmath>

#include "common/columns.h"
#include "common/philox.h"

namespace fastgan {
namespace {

constexpr int64_t kStrip = 1024;   // columns whose random numbers are drawn at a time
constexpr int64_t kGrain = 16384;  // elements that are worth a thread

// Zero beyond `count`, where what was loaded there is zero but what was made of it is not.
template <class T>
FASTGAN_INLINE Vec<T> only(Vec<T> v, int count) {
  for (int i = 0; i < lanes<T>; ++i) v[i] = i < count ? v[i] : T(0);
  return v;
}

template <class S, bool kDrops>
struct LayerNorm {
  using T = Accumulate<S>;
  using V = Vec<T>;
  static constexpr int L = lanes<T>;
  const LayerNormArgs& args;
  const int64_t width = args.width;
  const T scale = T(args.scale);
  const T* const weight = static_cast<const T*>(args.weight);
  const T* const bias = static_cast<const T*>(args.bias);

  // The numbers of columns [begin, end) of a row, the first at what is returned.
  FASTGAN_INLINE const uint32_t* draw(uint32_t* words, int64_t row, int64_t begin, int64_t end) const {
    const uint64_t at = uint64_t(row) * uint64_t(width) + uint64_t(begin), first = at / 4;
    const int64_t before = int64_t(at % 4);
    philox_row(words, before + end - begin, args.seed, args.offset, 0, uint32_t(first >> 32),
               uint32_t(first));
    return words + before;
  }

  // Calls body(begin, end, numbers) on strips of a row, or on the whole row where nothing is drawn.
  template <class Body>
  FASTGAN_INLINE void for_strips(int64_t row, const Body& body) const {
    if constexpr (kDrops) {
      uint32_t words[kStrip + 4 + kPhiloxStep];
      for (int64_t begin = 0; begin < width; begin += kStrip) {
        const int64_t end = begin + kStrip < width ? begin + kStrip : width;
        body(begin, end, draw(words, row, begin, end) - begin);
      }
    } else {
      body(int64_t(0), width, static_cast<const uint32_t*>(nullptr));
    }
  }

  template <bool kWhole>
  FASTGAN_INLINE V dropped(V v, const uint32_t* words, int count, std::bool_constant<kWhole>) const {
    if constexpr (kDrops) {
      // A buffer, since numbers behind the last one need not be there.
      uint32_t last[L] = {};
      if constexpr (!kWhole) std::memcpy(last, words, size_t(count) * 4);
      return select(kept<T>(kWhole ? words : last, args.threshold), v * scale, V{});
    }
    return v;
  }

  void forward(int64_t row) const {
    const S* x = static_cast<const S*>(args.input) + row * width;
    const S* r = static_cast<const S*>(args.residual) + row * width;
    S* h = static_cast<S*>(args.sum) + row * width;
    S* y = static_cast<S*>(args.output) + row * width;
    V chains[kChains] = {};
    for_strips(row, [&](int64_t begin, int64_t end, const uint32_t* words) FASTGAN_INLINE_LAMBDA {
      for_columns<T>(begin, end, [&](int64_t i, int count, auto whole, auto chain) FASTGAN_INLINE_LAMBDA {
        V v = dropped(load_at<T>(x + i, count, whole), words + i, count, whole);
        v += load_at<T>(r + i, count, whole);
        store_at<T>(h + i, v, count, whole);
        // Statistics are those of what is stored: the backward sees no more.
        if constexpr (sizeof(S) < sizeof(T)) v = load_at<T>(h + i, count, whole);
        chains[decltype(chain)::value] += v;
      });
    });
    const T n = T(width);
    const T middle = total(chains) / n;
    V squares[kChains] = {}, firsts[kChains] = {};
    for_columns<T>(0, width, [&](int64_t i, int count, auto whole, auto chain) FASTGAN_INLINE_LAMBDA {
      V d = load_at<T>(h + i, count, whole) - middle;
      if constexpr (!decltype(whole)::value) d = only<T>(d, count);
      firsts[decltype(chain)::value] += d;
      squares[decltype(chain)::value] += d * d;
    });
    const double rest = double(total(firsts)) / double(n);
    double variance = double(total(squares)) / double(n) - rest * rest;
    if (variance < 0) variance = 0;
    const double rstd = 1.0 / std::sqrt(variance + args.eps);
    args.mean[row] = double(middle) + rest;
    args.rstd[row] = rstd;
    const T factor = T(rstd), shift = T(-rest * rstd);
    for_columns<T>(0, width, [&](int64_t i, int count, auto whole, auto) FASTGAN_INLINE_LAMBDA {
      V z = (load_at<T>(h + i, count, whole) - middle) * factor + shift;
      store_at<T>(y + i, z * load_at<T>(weight + i, count, whole) + load_at<T>(bias + i, count, whole), count,
                  whole);
    });
  }

  // (sum - mean) * rstd is (sum - middle) * factor + shift.
  struct Row {
    T middle, factor, shift, one, product;  // and the averages of g and of g * x
    FASTGAN_INLINE V normalised(V h) const { return (h - middle) * factor + shift; }
  };

  // The averages of neighbouring rows, whose shares of the gradients of weight and bias are added to `sums`,
  // (2, width), where they are wanted: four rows at a time load and store those once.
  template <int kRows, bool kSums>
  void averages(int64_t first, Row (&rows)[kRows], T* sums) const {
    const S* h = static_cast<const S*>(args.sum) + first * width;
    const S* g = static_cast<const S*>(args.grad_output) + first * width;
    V ones[kRows] = {}, products[kRows] = {};
    for (int r = 0; r < kRows; ++r) {
      const double mean = args.mean[first + r], rstd = args.rstd[first + r];
      rows[r].middle = T(mean), rows[r].factor = T(rstd);
      rows[r].shift = T(-(mean - double(rows[r].middle)) * rstd);
    }
    for_columns<T>(0, width, [&](int64_t i, int count, auto whole, auto) FASTGAN_INLINE_LAMBDA {
      const V factors = load_at<T>(weight + i, count, whole);
      V to_weight{}, to_bias{};
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        V dy = load_at<T>(g + r * width + i, count, whole);  // zero beyond the row, and so are the products
        V along = dy * rows[r].normalised(load_at<T>(h + r * width + i, count, whole));
        to_weight += along, to_bias += dy;
        ones[r] += dy * factors, products[r] += along * factors;
      }
      if constexpr (kSums) {
        T* w = sums + i;
        T* b = sums + width + i;
        store_at<T>(w, load_at<T>(w, count, whole) + to_weight, count, whole);
        store_at<T>(b, load_at<T>(b, count, whole) + to_bias, count, whole);
      }
    });
    for (int r = 0; r < kRows; ++r)
      rows[r].one = sum<T>(ones[r]) / T(width), rows[r].product = sum<T>(products[r]) / T(width);
  }

  template <bool kMore>
  void gradient(int64_t index, const Row& row) const {
    const S* h = static_cast<const S*>(args.sum) + index * width;
    const S* g = static_cast<const S*>(args.grad_output) + index * width;
    const S* more = static_cast<const S*>(args.grad_sum) + (kMore ? index * width : 0);
    S* to_residual = static_cast<S*>(args.grad_residual) + index * width;
    S* to_input = static_cast<S*>(args.grad_input) + (kDrops ? index * width : 0);
    for_strips(index, [&](int64_t begin, int64_t end, const uint32_t* words) FASTGAN_INLINE_LAMBDA {
      for_columns<T>(begin, end, [&](int64_t i, int count, auto whole, auto) FASTGAN_INLINE_LAMBDA {
        V z = row.normalised(load_at<T>(h + i, count, whole));
        V scaled = load_at<T>(g + i, count, whole) * load_at<T>(weight + i, count, whole);
        V dh = (scaled - row.one - z * row.product) * row.factor;
        if constexpr (kMore) dh += load_at<T>(more + i, count, whole);
        store_at<T>(to_residual + i, dh, count, whole);
        if constexpr (kDrops) store_at<T>(to_input + i, dropped(dh, words + i, count, whole), count, whole);
      });
    });
  }

  template <int kRows>
  void backward(int64_t first, T* sums) const {
    Row rows[kRows];
    if (sums)
      averages<kRows, true>(first, rows, sums);
    else
      averages<kRows, false>(first, rows, sums);
    for (int r = 0; r < kRows; ++r)
      args.grad_sum ? gradient<true>(first + r, rows[r]) : gradient<false>(first + r, rows[r]);
  }

  static FASTGAN_INLINE T total(const V (&chains)[kChains]) {
    return sum<T>((chains[0] + chains[1]) + (chains[2] + chains[3]));
  }

  void run_forward(const Threads& threads) const {
    const int64_t grain = kGrain / (width + 1) + 1;
    parallel_for(threads, args.rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) forward(row);
    });
  }

  void run_backward(const Threads& threads) const {
    const int64_t blocks = row_blocks(args.rows);
    const bool wants = args.grad_weight != nullptr;
    parallel_for(threads, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        T* sums = wants ? block_sums<T>(args.scratch, block, 2 * width) : nullptr;
        if (wants) std::memset(sums, 0, size_t(2 * width) * sizeof(T));
        int64_t row = args.rows * block / blocks;
        const int64_t stop = args.rows * (block + 1) / blocks;
        for (; row + 4 <= stop; row += 4) backward<4>(row, sums);
        for (; row < stop; ++row) backward<1>(row, sums);
      }
    });
    if (!wants) return;
    add_blocks<T>(threads, args.scratch, blocks, 2 * width, [&](int64_t i, double sum) {
      static_cast<T*>(i < width ? args.grad_weight : args.grad_bias)[i < width ? i : i - width] = T(sum);
    });
  }
};

// body(norm) for the call's types and whether it drops.
template <class Body>
void with_norm(const LayerNormArgs& args, const Body& body) {
  with_storage(args.dtype, [&]<class S>(S) {
    args.drops ? body(LayerNorm<S, true>{args}) : body(LayerNorm<S, false>{args});
  });
}

}  // namespace
}  // namespace fastgan

extern "C" void FASTGAN_KERNEL(layer_norm_forward)(const fastgan::LayerNormArgs& args,
                                                   const fastgan::Threads& threads) {
  fastgan::with_norm(args, [&](const auto& norm) { norm.run_forward(threads); });
}

extern "C" void FASTGAN_KERNEL(layer_norm_backward)(const fastgan::LayerNormArgs& args,
                                                    const fastgan::Threads& threads) {
  fastgan::with_norm(args, [&](const auto& norm) { norm.run_backward(threads); });
}
