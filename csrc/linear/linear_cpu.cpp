// A linear layer on few rows. What it costs is reading the weight once from memory, 154 MB for GPT-2's head,
// for a few multiplications a number. General matrix products pack the weight first, which for a few rows
// takes longer than multiplying. Here the weight streams past, fetched ahead into L2 (alone, the processor
// sees one or two rows ahead: half the speed), while input and sums stay in L1 and registers.
//
// Weight by outputs (torch's Linear): dot products of up to 4 rows of the input with up to 8 of the weight, a
// vector along depth for each pair, added up across the lanes at the end of a piece of depth. Further rows
// find these rows of the weight in L1. Tried: 8 rows of the input at once (twice as slow: nine loads for
// eight multiply-adds).
//
// Weight by depth (transformers' Conv1D): vectors go across outputs. Eight rows of the weight are multiplied
// by eight numbers of each row of the input and added to sums in L1, which are read and written once for
// these.
//
// The order of additions for a number of the output does not depend on threads, rows or blocks.
#include <cstring>

#include "common/vector.h"
#include "linear/linear.h"

namespace fastgan {
namespace {

constexpr int kRows = 8;  // of the input at once, where the weight is by depth
constexpr int kMostRows = kLinearMostRows;
constexpr int kSums = kVectorBytes == 64 ? 24 : 12;  // of 32 or 16 registers
constexpr int64_t kDepth = 768;                      // 8 rows of the input: 24 KB
constexpr int64_t kOutputs = 64, kColumns = 128;     // what a thread takes at least
constexpr int kUnroll = 8;
constexpr int64_t kAhead = 4096;  // numbers: into L2, well before they are needed

constexpr int at_once(int rows) { return kSums / rows < 8 ? kSums / rows : 8; }

// sums[j * kMostRows + r] += the products along `depth` of output j and row r.
template <class T, int R, int J>
FASTGAN_INLINE void dots(const T* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t depth, T* sums) {
  Vec<T> total[J][R];
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) total[j][r] = Vec<T>{};
  int64_t k = 0;
  for (; k + lanes<T> <= depth; k += lanes<T>) {
    Vec<T> from[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) __builtin_prefetch(w + j * w_stride + k + kAhead, 0, 2);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) from[j] = load<T>(w + j * w_stride + k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec<T> own = load<T>(x + r * x_stride + k);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) total[j][r] += own * from[j];
    }
  }
  int rest = int(depth - k);
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (rest)
        total[j][r] +=
            load_partial<T>(x + r * x_stride + k, rest) * load_partial<T>(w + j * w_stride + k, rest);
      sums[j * kMostRows + r] += sum<T>(total[j][r]);
    }
}

// A piece of depth of all rows, for `count` outputs; G rows at a time, J outputs.
template <class T, int G, int J>
void by_outputs(const LinearArgs& args, int64_t k, int64_t depth, int64_t first, int64_t count, T* sums) {
  const T* x = static_cast<const T*>(args.input) + k;
  const T* w = static_cast<const T*>(args.weight) + first * args.weight_stride + k;
  const int64_t rows = args.rows, stride = args.weight_stride;
  for (int64_t n = 0; n < count;) {
    const bool whole = n + J <= count;
    for (int64_t r = 0; r < rows; r += G) {
      const T* from = x + r * args.depth;
      const T* of = w + n * stride;
      T* to = sums + n * kMostRows + r;
      const int64_t left = rows - r < G ? rows - r : G;
      if (whole) {
        if (left == G)
          dots<T, G, J>(from, args.depth, of, stride, depth, to);
        else if (left == 3)
          dots<T, 3, J>(from, args.depth, of, stride, depth, to);
        else if (left == 2)
          dots<T, 2, J>(from, args.depth, of, stride, depth, to);
        else
          dots<T, 1, J>(from, args.depth, of, stride, depth, to);
      } else {
        for (int64_t i = 0; i < left; ++i)
          dots<T, 1, 1>(from + i * args.depth, args.depth, of, stride, depth, to + i);
      }
    }
    n += whole ? J : 1;
  }
}

// sums[r * pitch + n] += the products along a depth of U, of `columns` outputs from `first`.
template <class T, int R, int U>
void by_depth(const LinearArgs& args, int64_t row, int64_t k, int64_t first, int64_t columns, T* sums,
              int64_t pitch) {
  const T* w = static_cast<const T*>(args.weight) + k * args.weight_stride + first;
  const T* from[U];
  T x[R][U];
  for (int u = 0; u < U; ++u) {
    from[u] = w + u * args.weight_stride;
    for (int r = 0; r < R; ++r) x[r][u] = static_cast<const T*>(args.input)[(row + r) * args.depth + k + u];
  }
  const int64_t ahead = U * args.weight_stride;
  int64_t n = 0;
  for (; n + lanes<T> <= columns; n += lanes<T>) {
    Vec<T> of[U];
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      of[u] = load<T>(from[u] + n);
      __builtin_prefetch(from[u] + n + ahead, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec<T> sum = broadcast(x[r][0]) * of[0];
#pragma GCC unroll 8
      for (int u = 1; u < U; ++u) sum += broadcast(x[r][u]) * of[u];
      T* to = sums + r * pitch + n;
      store(to, load<T>(to) + sum);
    }
  }
  if (int rest = int(columns - n)) {
    for (int r = 0; r < R; ++r) {
      Vec<T> sum = broadcast(x[r][0]) * load_partial<T>(from[0] + n, rest);
      for (int u = 1; u < U; ++u) sum += broadcast(x[r][u]) * load_partial<T>(from[u] + n, rest);
      T* to = sums + r * pitch + n;
      store_partial<T>(to, load_partial<T>(to, rest) + sum, rest);
    }
  }
}

template <class T>
using ByDepth = void (*)(const LinearArgs&, int64_t, int64_t, int64_t, int64_t, T*, int64_t);
template <class T, int U>
constexpr ByDepth<T> kByDepth[] = {by_depth<T, 1, U>, by_depth<T, 2, U>, by_depth<T, 3, U>,
                                   by_depth<T, 4, U>, by_depth<T, 5, U>, by_depth<T, 6, U>,
                                   by_depth<T, 7, U>, by_depth<T, 8, U>};

FASTGAN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
void outputs_of(const LinearArgs& args, int64_t first, int64_t count) {
  T sums[kOutputs * kMostRows];
  std::memset(sums, 0, sizeof sums);
  for (int64_t k = 0; k < args.depth; k += kDepth) {
    const int64_t depth = least(kDepth, args.depth - k);
    if (args.rows == 1)
      by_outputs<T, 1, at_once(1)>(args, k, depth, first, count, sums);
    else if (args.rows == 2)
      by_outputs<T, 2, at_once(2)>(args, k, depth, first, count, sums);
    else if (args.rows == 3)
      by_outputs<T, 3, at_once(3)>(args, k, depth, first, count, sums);
    else
      by_outputs<T, 4, at_once(4)>(args, k, depth, first, count, sums);
  }
  for (int64_t r = 0; r < args.rows; ++r)
    for (int64_t n = 0; n < count; ++n)
      static_cast<T*>(args.output)[r * args.outputs + first + n] =
          sums[n * kMostRows + r] + (args.bias ? static_cast<const T*>(args.bias)[first + n] : T(0));
}

FASTGAN_INLINE int64_t wide(int64_t rows) { return rows <= 8 ? 512 : rows <= 16 ? 256 : 128; }

template <class T>
void columns_of(const LinearArgs& args, int64_t first, int64_t count) {
  // Not added up in the output itself: its rows and the weight's, as far apart from each other, would fall on
  // the same places of the cache.
  T sums[kRows * (512 + 64)];
  const int64_t pitch = wide(args.rows) + 16;
  for (int64_t r = 0; r < args.rows; ++r)
    for (int64_t n = 0; n < count; ++n)
      sums[r * pitch + n] = args.bias ? static_cast<const T*>(args.bias)[first + n] : T(0);
  for (int64_t k = 0; k < args.depth;) {
    const bool whole = k + kUnroll <= args.depth;
    for (int64_t row = 0; row < args.rows; row += kRows)
      (whole ? kByDepth<T, kUnroll> : kByDepth<T, 1>)[least(kRows, args.rows - row) - 1](
          args, row, k, first, count, sums + row* pitch, pitch);
    k += whole ? kUnroll : 1;
  }
  for (int64_t r = 0; r < args.rows; ++r)
    std::memcpy(static_cast<T*>(args.output) + r * args.outputs + first, sums + r * pitch,
                size_t(count) * sizeof(T));
}

template <class T>
void run(const LinearArgs& args, const Threads& threads) {
  int64_t block = args.by_outputs ? kOutputs : kColumns;
  int64_t work = block * (args.depth + 1) * args.rows, grain = 65536 / work + 1;
  parallel_for(threads, (args.outputs + block - 1) / block, grain, [&](int64_t begin, int64_t end) {
    int64_t last = least(end * block, args.outputs), step = args.by_outputs ? block : wide(args.rows);
    for (int64_t n = begin * block; n < last; n += step)
      (args.by_outputs ? outputs_of<T> : columns_of<T>)(args, n, least(step, last - n));
  });
}

}  // namespace
}  // namespace fastgan

extern "C" void FASTGAN_KERNEL(linear_forward)(const fastgan::LinearArgs& args,
                                               const fastgan::Threads& threads) {
  if (args.rows == 0) return;
  (args.dtype == fastgan::Dtype::float64 ? fastgan::run<double> : fastgan::run<float>)(args, threads);
}
