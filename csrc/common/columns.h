// Rows of a matrix, column by column: what kernels share that work on the last dimension, and sums over all
// rows, which are taken by blocks of rows that the shape alone cuts, so that their bits do not depend on the
// number of threads.
#pragma once
#include <type_traits>
#include <utility>

#include "common/threads.h"
#include "common/vector.h"

namespace fastgan {

// Blocks of rows that sum each for itself.
static inline int64_t row_blocks(int64_t rows) {
  const int64_t blocks = (rows + 31) / 32;
  return blocks < 128 ? blocks : 128;
}

namespace {

constexpr int kChains = 4;  // sums that run beside each other, so that none waits for its last addition

template <class T, class Body, int... U>
FASTGAN_INLINE void for_chains(int64_t i, const Body& body, std::integer_sequence<int, U...>) {
  (body(i + U * lanes<T>, lanes<T>, std::true_type{}, std::integral_constant<int, U>{}), ...);
}

// body(column, columns, whether that is a whole vector, which chain of sums is its) over [begin, end). The
// chain is a constant, or the sums would live in memory.
template <class T, class Body>
FASTGAN_INLINE void for_columns(int64_t begin, int64_t end, const Body& body) {
  constexpr int L = lanes<T>;
  constexpr std::integral_constant<int, 0> first;
  int64_t i = begin;
  for (; i + kChains * L <= end; i += kChains * L)
    for_chains<T>(i, body, std::make_integer_sequence<int, kChains>{});
  for (; i + L <= end; i += L) body(i, L, std::true_type{}, first);
  if (i < end) body(i, int(end - i), std::false_type{}, first);
}

template <class T, class S, bool kWhole>
FASTGAN_INLINE Vec<T> load_at(const S* p, int count, std::bool_constant<kWhole>) {
  if constexpr (kWhole)
    return load<T>(p);
  else
    return load_partial<T>(p, count);
}
template <class T, class S, bool kWhole>
FASTGAN_INLINE void store_at(S* p, Vec<T> v, int count, std::bool_constant<kWhole>) {
  if constexpr (kWhole)
    store(p, v);
  else
    store_partial<T>(p, v, count);
}

// The sums of a block, in scratch of `width` doubles for each.
template <class T>
FASTGAN_INLINE T* block_sums(double* scratch, int64_t block, int64_t width) {
  return reinterpret_cast<T*>(scratch + block * width);
}

// body(column, sum over the blocks)
template <class T, class Body>
inline void add_blocks(const Threads& threads, double* scratch, int64_t blocks, int64_t width,
                       const Body& body) {
  constexpr int64_t kColumns = 128;
  parallel_for(threads, (width + kColumns - 1) / kColumns, 4, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = strip * kColumns, left = width - first, count = left < kColumns ? left : kColumns;
      double all[kColumns] = {};
      for (int64_t block = 0; block < blocks; ++block) {
        const T* sums = block_sums<T>(scratch, block, width) + first;
        for (int64_t j = 0; j < count; ++j) all[j] += double(sums[j]);
      }
      for (int64_t j = 0; j < count; ++j) body(first + j, all[j]);
    }
  });
}

}  // namespace
}  // namespace fastgan
