// Products of bfloat16 with sums in float32 by AMX (Intel, from Sapphire Rapids on): eight registers, tiles,
// of 16 rows of 64 bytes. One instruction adds to a tile of 16×16 sums the product of 16 rows of 32 numbers
// of A and 32 rows of 16 numbers of B, in 16 cycles: 1,024 multiply-adds a cycle, where two units of AVX-512
// make 32 of float32. A tile is loaded in 8 cycles from the first cache, so that 2×2 tiles of sums on two
// tiles of A and two of B for each step of depth keep the multiplier busy.
//
// All sizes are those of whole tiles; what is beyond a matrix is zero in its depth and whatever elsewhere.
//
//   rows    A as it is read: rows of numbers, one behind the other
//   pairs   B as it is read: panels of 16 columns, in which a pair of rows is one row of 32 numbers: of row
//   2k and row
//           2k + 1 in turn
//
// A result is the hardware's: products exact, sums rounded to nearest even, denormal numbers 0 on both sides.
//
// Where the compiler is not told of AMX the instructions are loops of the same meaning: for tests on any
// machine and under sanitizers, which do not see what a tile's load reads. Unnamed namespace: see threads.h.
#pragma once
#include "common/gemm.h"

namespace fastgan {
namespace {

constexpr int64_t kTile = 16, kTileDepth = 32;  // rows and columns of a tile of sums; depth of a product

inline int64_t whole_tiles(int64_t n) { return (n + kTileDepth - 1) / kTileDepth * kTileDepth; }

// ---- the instructions ----

#if defined(__AMX_BF16__)

// Whoever multiplies says so first, once for a thread: all tiles whole; and leaves the unit clear.
inline void begin_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } configuration;
  asm volatile("ldtilecfg %0" ::"m"(configuration) : "memory");
}
inline void end_tiles() { asm volatile("tilerelease" ::: "memory"); }

// Not the compiler's own functions: gcc 12's do not say that they read and write memory.
template <int kTo>
FASTGAN_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTo));
}
template <int kTo>
FASTGAN_INLINE void tile_load(const void* from, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(kTo) : "memory");
}
template <int kFrom>
FASTGAN_INLINE void tile_store(void* to, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(kFrom) : "memory");
}
template <int kSums, int kA, int kB>
FASTGAN_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA), "i"(kB));
}

#else

inline thread_local uint32_t tiles[8][kTile][kTile];

inline void begin_tiles() {}
inline void end_tiles() {}
template <int kTo>
void tile_zero() {
  std::memset(tiles[kTo], 0, sizeof tiles[kTo]);
}
template <int kTo>
void tile_load(const void* from, int64_t stride_bytes) {
  for (int r = 0; r < kTile; ++r)
    std::memcpy(tiles[kTo][r], static_cast<const char*>(from) + r * stride_bytes, sizeof tiles[kTo][r]);
}
template <int kFrom>
void tile_store(void* to, int64_t stride_bytes) {
  for (int r = 0; r < kTile; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride_bytes, tiles[kFrom][r], sizeof tiles[kFrom][r]);
}
template <int kSums, int kA, int kB>
void tile_multiply() {
  const auto number = [](uint32_t pair, int which) {
    return to_float(bfloat16{uint16_t(which ? pair >> 16 : pair & 0xffff)});
  };
  for (int r = 0; r < kTile; ++r)
    for (int c = 0; c < kTile; ++c) {
      float total;
      std::memcpy(&total, &tiles[kSums][r][c], 4);
      for (int k = 0; k < kTile; ++k)
        for (int which = 0; which < 2; ++which)
          total += number(tiles[kA][r][k], which) * number(tiles[kB][k][c], which);
      std::memcpy(&tiles[kSums][r][c], &total, 4);
    }
}

#endif

// ---- products ----

struct TileProduct {
  int64_t rows, columns, depth;  // whole tiles
  const bfloat16* a;
  int64_t lda;
  const bfloat16* b;  // pairs
  int64_t panel_stride;
  float* c;
  int64_t ldc;
};

// kM × kN tiles of C = A B, or of C + A B.
template <int kM, int kN, bool kAdd>
FASTGAN_INLINE void multiply_block(const TileProduct& p, int64_t row, int64_t column) {
  const bfloat16* a = p.a + row * p.lda;
  const bfloat16* b = p.b + column / kTile * p.panel_stride;
  float* c = p.c + row * p.ldc + column;
  const int64_t lda = p.lda * 2, ldc = p.ldc * 4;
  const auto each = [&](auto of) {
    of.template operator()<0>(c);
    if constexpr (kN > 1) of.template operator()<1>(c + kTile);
    if constexpr (kM > 1) of.template operator()<2>(c + kTile * p.ldc);
    if constexpr (kM > 1 && kN > 1) of.template operator()<3>(c + kTile * p.ldc + kTile);
  };
  each([&]<int kSums>(const float* at) FASTGAN_INLINE_LAMBDA {
    if constexpr (kAdd)
      tile_load<kSums>(at, ldc);
    else
      (void)at, tile_zero<kSums>();
  });
  for (int64_t k = 0; k < p.depth; k += kTileDepth, a += kTileDepth, b += kTile * kTileDepth) {
    tile_load<4>(a, lda);
    tile_load<6>(b, 64);
    tile_multiply<0, 4, 6>();
    if constexpr (kN > 1) {
      tile_load<7>(b + p.panel_stride, 64);
      tile_multiply<1, 4, 7>();
    }
    if constexpr (kM > 1) {
      tile_load<5>(a + kTile * p.lda, lda);
      tile_multiply<2, 5, 6>();
    }
    if constexpr (kM > 1 && kN > 1) tile_multiply<3, 5, 7>();
  }
  each([&]<int kSums>(float* at) FASTGAN_INLINE_LAMBDA { tile_store<kSums>(at, ldc); });
}

template <bool kAdd>
void multiply_blocks(const TileProduct& p) {
  for (int64_t column = 0; column < p.columns; column += 2 * kTile)
    for (int64_t row = 0; row < p.rows; row += 2 * kTile) {
      const bool two_rows = row + kTile < p.rows, two_columns = column + kTile < p.columns;
      if (two_rows && two_columns)
        multiply_block<2, 2, kAdd>(p, row, column);
      else if (two_rows)
        multiply_block<2, 1, kAdd>(p, row, column);
      else if (two_columns)
        multiply_block<1, 2, kAdd>(p, row, column);
      else
        multiply_block<1, 1, kAdd>(p, row, column);
    }
}

// C = A B, or C + A B.
inline void multiply(bool add, const TileProduct& p) {
  (add ? multiply_blocks<true> : multiply_blocks<false>)(p);
}

// ---- packing ----

static_assert(lanes<float> == kTile, "a vector of float32 is a row of a tile");

// rows × columns of any strides -> rows of whole tiles, zero beyond.
inline void pack_tile_rows(const bfloat16* from, int64_t row_stride, int64_t column_stride, int64_t rows,
                           int64_t columns, bfloat16* to) {
  const int64_t width = whole_tiles(columns), height = whole_tiles(rows);
  for (int64_t r = 0; r < rows; ++r, to += width, from += row_stride) {
    if (column_stride == 1)
      std::memcpy(to, from, size_t(columns) * sizeof *to);
    else
      for (int64_t c = 0; c < columns; ++c) to[c] = from[c * column_stride];
    std::memset(to + columns, 0, size_t(width - columns) * sizeof *to);
  }
  std::memset(to, 0, size_t((height - rows) * width) * sizeof *to);
}

// The same as whole tiles: where it lies, if it is that already, or packed into `room`.
struct TileRows {
  const bfloat16* data;
  int64_t stride;
};
inline TileRows tile_rows(const bfloat16* from, int64_t row_stride, int64_t column_stride, int64_t rows,
                          int64_t columns, bfloat16* room) {
  if (column_stride == 1 && rows % kTileDepth == 0 && columns % kTileDepth == 0) return {from, row_stride};
  pack_tile_rows(from, row_stride, column_stride, rows, columns, room);
  return {room, whole_tiles(columns)};
}

// The transpose of 16 rows of 16 numbers of 32 bits; row(i) is the i-th.
template <class Row>
FASTGAN_INLINE void transpose_square(const Row& row, float* to, int64_t to_stride) {
  Vec<float> square[kTile];
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) square[i] = row(i);
  transpose<float>(square);
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) store(to + i * to_stride, square[i]);
}

// Numbers of two rows in turn, in 32 bits each: `first` in the lower half.
FASTGAN_INLINE Vec<float> pairs_of(const bfloat16* first, const bfloat16* second) {
  HalfBits low, high;
  std::memcpy(&low, first, sizeof low);
  std::memcpy(&high, second, sizeof high);
  return (Vec<float>)(__builtin_convertvector(low, WordBits) |
                      (__builtin_convertvector(high, WordBits) << 16));
}

// A matrix of rows -> its pairs.
inline void pack_pairs(const bfloat16* from, int64_t stride, int64_t rows, int64_t columns, bfloat16* to) {
  for (int64_t c = 0; c < columns; c += kTile)
    for (int64_t r = 0; r < rows; r += 2, to += 2 * kTile)
      store(reinterpret_cast<float*>(to), pairs_of(from + r * stride + c, from + (r + 1) * stride + c));
}

// A matrix of rows -> the pairs of its transpose.
inline void pack_transposed_pairs(const bfloat16* from, int64_t stride, int64_t rows, int64_t columns,
                                  bfloat16* to) {
  for (int64_t r = 0; r < rows; r += kTile)
    for (int64_t c = 0; c < columns; c += kTileDepth, to += kTile * kTileDepth)
      transpose_square(
          [&](int i) FASTGAN_INLINE_LAMBDA {
            return load<float>(reinterpret_cast<const float*>(from + (r + i) * stride + c));
          },
          reinterpret_cast<float*>(to), kTile);
}

// A matrix of rows -> its transpose, of rows, an even number apart.
inline void pack_transposed_rows(const bfloat16* from, int64_t stride, int64_t rows, int64_t columns,
                                 bfloat16* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += kTileDepth)
    for (int64_t c = 0; c < columns; c += kTile)
      transpose_square(
          [&](int i) FASTGAN_INLINE_LAMBDA {
            const bfloat16* row = from + (r + 2 * i) * stride + c;
            return pairs_of(row, row + stride);
          },
          reinterpret_cast<float*>(to + c * to_stride + r), to_stride / 2);
}

// Numbers of two rows in turn, rounded.
FASTGAN_INLINE Vec<float> rounded_pairs(Vec<float> first, Vec<float> second) {
#if defined(__AVX512BF16__)
  typedef uint16_t Halves __attribute__((vector_size(64)));
  constexpr Halves kInTurn{0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const Halves both = (Halves)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (Vec<float>)__builtin_shuffle(both, kInTurn);
#else
  bfloat16 rows[2][kTile];
  store(rows[0], first);
  store(rows[1], second);
  return pairs_of(rows[0], rows[1]);
#endif
}

}  // namespace
}  // namespace fastgan
