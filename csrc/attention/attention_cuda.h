// What the CUDA kernels of attention share: how a call is cut, tiles from memory to shared memory and back,
// bias, masks and dropout on a tile of scores, and the map of what a mask hides.
//
// Scores are kept in base 2, s = (query · key) scale log2(e) + bias log2(e), so that exp is one instruction;
// the log-sum-exp that leaves the kernels is the natural one, in double.
#pragma once
#include "attention/attention.h"
#include "attention/attention_cuda_warpgroups.h"
#include "common/cuda_philox.h"

namespace fastgan {
namespace {

constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;
constexpr int kCell = 32;  // rows and columns of a cell of the map
constexpr int kMapThreads = 256;
constexpr size_t kMostShared = 99 * 1024;  // of a block, on the GPUs that have the least
template <class Tiling>
constexpr size_t kMostSharedOf = Tiling::warpgroups ? 227 * 1024 : kMostShared;
enum Seen : uint8_t { kNothing = 0, kSome = 1, kAll = 2 };

// What of a cell of the scores takes part, a byte each; a dimension that mask and bias are broadcast over has
// stride 0. The bias is looked at, for minus infinity, where all rows share it (padding): elsewhere reading
// it once more would cost what is saved.
struct TileMap {
  uint8_t* cells;  // null: all takes part
  int64_t size[4], stride[4];
  bool with_mask, with_bias;
};

struct Plan {
  int row_blocks, key_blocks;
  bool vectors;  // all inputs may be read 16 bytes at a time
  TileMap map;
  int parts, part_keys;  // of the keys (attention_cuda_parts.h)
};

// A pair of tiles is in one of two stages of shared memory while the next pair comes into the other, where
// there is room for two in the 99 KiB that every GPU of sm_80 and later has. R: 16 rows each of a warp.
template <class S, int D>
struct ForwardTiling {
  static constexpr bool half = sizeof(S) == 2, wide = D * sizeof(Accumulate<S>) >= 1024;
  static constexpr bool warpgroups = false;
  static constexpr int blocks = 2;
  static constexpr int warps = !half && wide ? 2 : 4,
                       R = (half && D <= 128) || (sizeof(S) == 4 && D == 64) ? 2 : 1;
  static constexpr int N = half ? (D == 64 ? 64 : 32) : sizeof(S) == 4 ? (wide ? 16 : 32) : wide ? 8 : 16;
  static constexpr int stages = half || (sizeof(S) == 4 && D == 64) ? 2 : 1;
  static constexpr int threads = warps * kWarp, rows = 16 * R * warps;
};
template <int D>
struct ForwardTiling<tf32, D> {
  static constexpr bool warpgroups = false;
  static constexpr int blocks = 2, stages = 2, warps = 4, R = D == 64 ? 2 : 1, N = 16;
  static constexpr int threads = warps * kWarp, rows = 16 * R * warps;
};
template <class S, int D>
struct QueriesTiling {
  static constexpr bool half = sizeof(S) == 2, wide = D * sizeof(Accumulate<S>) >= 1024;
  static constexpr bool warpgroups = false;
  static constexpr int blocks = 2;
  static constexpr int warps = half || !wide ? 4 : sizeof(S) == 4 ? 2 : 1, R = half && D == 64 ? 2 : 1;
  static constexpr int N = half || (sizeof(S) == 4 && D == 64) ? 32 : sizeof(S) == 8 && wide ? 8 : 16;
  static constexpr int stages = (half && D <= 128) || (sizeof(S) == 4 && D == 64) ? 2 : 1;
  static constexpr int threads = warps * kWarp, rows = 16 * R * warps;
};
template <int D>
struct QueriesTiling<tf32, D> {
  static constexpr bool warpgroups = false;
  static constexpr int blocks = 2, stages = 2, warps = 4, R = 1, N = D == 64 ? 32 : 16;
  static constexpr int threads = warps * kWarp, rows = 16 * R * warps;
};
// Two sums of D columns: where they do not fit in registers together they have a launch each.
template <class S, int D>
struct KeysTiling : QueriesTiling<S, D> {
  using Base = QueriesTiling<S, D>;
  static constexpr int R = 1, rows = 16 * Base::warps;
  static constexpr bool split = Base::wide || sizeof(S) == 8;
};
template <int D>
struct KeysTiling<tf32, D> : QueriesTiling<tf32, D> {
  static constexpr int N = D == 64 ? 16 : 8;
  static constexpr bool split = false;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Quotient in 32 bits, which a grid is bounded to.
FASTGAN_DEVICE int divide(int index, int size, int& rest) {
  uint32_t quotient = uint32_t(index) / uint32_t(size);
  rest = int(uint32_t(index) - quotient * uint32_t(size));
  return int(quotient);
}

template <class S>
FASTGAN_DEVICE const S* head_of(const AttentionInput& x, int64_t batch, int64_t head) {
  return static_cast<const S*>(x.data) + batch * x.stride[0] + head * x.stride[1];
}

// ---- packed sequences ----

// Of 32 bits, and the compiler knows it: 64 take two registers.
FASTGAN_DEVICE uint32_t offset_of(const AttentionArgs& args, const int64_t* offsets, int n, uint32_t least,
                                  int64_t most) {
  const int64_t at = args.offsets_are_int32 ? reinterpret_cast<const int32_t*>(offsets)[n] : offsets[n];
  return at < int64_t(least) ? least : uint32_t(at > most ? most : at);
}

template <class S>
FASTGAN_DEVICE void advance(AttentionInput& x, int64_t rows) {
  if (x.data) x.data = static_cast<const S*>(x.data) + rows * x.stride[2];
}
template <class S>
FASTGAN_DEVICE void advance(AttentionOutput& x, int64_t rows) {
  if (x.data) x.data = static_cast<S*>(x.data) + rows * x.stride[2];
}

// The arguments of a block's own sequence, `Packed`, or the call's, which then stay in constant memory: a
// copy would take registers. Those of a sequence do: loops that are short of them make them again. Offsets
// that are none cannot lead out of the tensors: nobody has looked at them.
template <bool Packed, class S>
FASTGAN_DEVICE decltype(auto) sequence_of(const AttentionArgs& args, int batch) {
  if constexpr (!Packed) {
    return (args);
  } else {
    AttentionArgs one = args;
    const uint32_t row = offset_of(args, args.row_offset, batch, 0, args.packed_rows),
                   column = offset_of(args, args.column_offset, batch, 0, args.packed_columns),
                   rows = offset_of(args, args.row_offset, batch + 1, row, args.packed_rows) - row,
                   columns =
                       offset_of(args, args.column_offset, batch + 1, column, args.packed_columns) - column;
    one.rows = rows, one.columns = columns, one.diagonal = int(columns) - int(rows);
    one.first_row = row;
    one.mask.data = one.bias.data = one.tangent_bias.data =
        nullptr;  // known here, and their code is left out
    advance<S>(one.query, row), advance<S>(one.output, row), advance<S>(one.saved_output, row);
    advance<S>(one.grad_output, row), advance<S>(one.grad_query, row), advance<S>(one.tangent_query, row);
    advance<S>(one.tangent_output, row);
    advance<S>(one.key, column), advance<S>(one.value, column), advance<S>(one.tangent_key, column);
    advance<S>(one.tangent_value, column), advance<S>(one.grad_key, column);
    advance<S>(one.grad_value, column);
    return one;
  }
}

// Of the numbers that are kept of every row: where those of a head begin, and how many there are.
FASTGAN_DEVICE int64_t rows_before(const AttentionArgs& args, int64_t batch, int64_t head) {
  return args.row_offset ? head * args.packed_rows + args.first_row : (batch * args.heads + head) * args.rows;
}
FASTGAN_DEVICE int64_t all_rows(const AttentionArgs& args) {
  return args.heads * (args.row_offset ? args.packed_rows : args.batch * args.rows);
}

// ---- tiles to and from memory ----

// Rows `first` on, `Rows` of them, in the order of place() or, `Panels`, of place_in_panels(); zeros beyond
// `count` and `width`.
template <class S, int D, int Rows, int Threads, bool Panels = false>
FASTGAN_DEVICE void load_tile(S* to, const AttentionInput& x, const S* head, int first, int64_t count,
                              int64_t width, bool vectors) {
  constexpr int E = kChunk<S>, chunks = D / E,
                step = Threads / chunks;  // rows from a thread's chunk to its next
  auto place_of = [](int row, int chunk) {
    return Panels ? place_in_panels<S, Rows>(row, chunk) : place<S, D>(row, chunk);
  };
  const int thread = int(threadIdx.x);
  if (!vectors) {
#pragma unroll 1
    for (int i = thread; i < Rows * chunks; i += Threads) {
      const int row = i / chunks, chunk = i % chunks;
      const bool inside = first + row < count;
      const S* from = head + int64_t(first + row) * x.stride[2] + int64_t(chunk * E) * x.stride[3];
      Packed<S, E> values;
#pragma unroll
      for (int e = 0; e < E; ++e)
        values.values[e] = inside && chunk * E + e < width ? from[e * x.stride[3]] : S{};
      *reinterpret_cast<Packed<S, E>*>(to + place_of(row, chunk)) = values;
    }
  } else if constexpr (Threads % chunks == 0) {
    // A thread keeps its chunk and, for steps of eight rows, its place within them: a copy costs an addition
    // and a comparison.
    const int row = thread / chunks, chunk = thread % chunks;
    S* at = to + place_of(row, chunk);
    const S* from = head + int64_t(first + row) * x.stride[2] + chunk * E;
    const int64_t along = step * x.stride[2];
    const int rows = chunk * E < width ? int(count) - first - row : 0;
    constexpr int unrolled = Rows / step > 8 ? 4 : 8;
#pragma unroll unrolled
    for (int r = 0; r < Rows; r += step) {
      S* here = step % 8 == 0 ? at + r * (Panels ? kPanel : D) : to + place_of(row + r, chunk);
      if (Rows % step == 0 || row + r < Rows) async_copy16(here, from, r < rows);
      from += along;
    }
  } else {
#pragma unroll 1
    for (int i = thread; i < Rows * chunks; i += Threads) {
      const int row = i / chunks, chunk = i % chunks;
      const S* from = head + int64_t(first + row) * x.stride[2] + chunk * E;
      async_copy16(to + place_of(row, chunk), from, first + row < count && chunk * E < width);
    }
  }
}

// A warp's sums, rows `first` on, times a factor for each row, to elements Out.
template <class S, int D, int R, class Out = S>
FASTGAN_DEVICE void store_tile(const AttentionOutput& x, int64_t batch, int64_t head, int first,
                               int64_t count, int64_t width, const Accumulate<S> (&sums)[R][D / 8][4],
                               const Accumulate<S> (&factor)[R][2]) {
  Out* base = static_cast<Out*>(x.data) + batch * x.stride[0] + head * x.stride[1];
#pragma unroll
  for (int t = 0; t < R; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first + 16 * t + 8 * h + lane_row();
      if (row >= count) continue;
      Out* to = base + int64_t(row) * x.stride[2];
      if constexpr (kInTerms<S> && sizeof(Out) == 4) {  // a lane has four neighbours
        if (width % 4 == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
#pragma unroll
          for (int j = 0; j < D / 8; j += 4)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int column = output_column<S>(j, i);
              float four[4];
#pragma unroll
              for (int e = 0; e < 4; ++e) four[e] = sums[t][j + e][2 * h + i] * factor[t][h];
              if (column < width) store_vector<4>(to + column, four);
            }
          continue;
        }
      }
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = output_column<S>(j, i);
          if (column < width) narrow(to[column], sums[t][j][2 * h + i] * factor[t][h]);
        }
    }
}

// ---- scores ----

// Which of query and key a place (a, b) of a warp's tile is: a in rows, b in columns, or, `Transposed`, the
// other way round.
template <bool Transposed>
FASTGAN_DEVICE int query_of(int a, int b) {
  return Transposed ? b : a;
}
template <bool Transposed>
FASTGAN_DEVICE int key_of(int a, int b) {
  return Transposed ? a : b;
}

// f(t, j, i) for each of a lane's numbers of a tile.
template <int N, int R, class F>
FASTGAN_DEVICE void for_each_place(F f) {
#pragma unroll
  for (int t = 0; t < R; ++t)
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) f(t, j, i);
}

// f(t, j, i, query, key) for each of a lane's numbers of the tile that begins at (a0, b0).
template <bool Transposed, int N, int R, class F>
FASTGAN_DEVICE void for_each(int a0, int b0, F f) {
  const int r = lane_row(), q = lane_column();
#pragma unroll
  for (int t = 0; t < R; ++t)
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int a = a0 + 16 * t + i / 2 * 8 + r, b = b0 + 8 * j + 2 * q + i % 2;
        f(t, j, i, query_of<Transposed>(a, b), key_of<Transposed>(a, b));
      }
}

// f(t, j, i, element) for each of them that lies within the scores. An address goes along a row step by step:
// one for each column would take the registers that the sums are in.
template <bool Transposed, class B, int N, int R, class F>
FASTGAN_DEVICE void for_each_element(const AttentionArgs& args, const AttentionInput& x, int64_t batch,
                                     int64_t head, int a0, int b0, F f) {
  const int r = lane_row(), q = lane_column();
  const int64_t along_a = x.stride[Transposed ? 3 : 2], along_b = x.stride[Transposed ? 2 : 3];
  const int end_a = int(Transposed ? args.columns : args.rows),
            end_b = int(Transposed ? args.rows : args.columns);
  const int b = b0 + 2 * q;
  const B* at = head_of<B>(x, batch, head) + (a0 + r) * along_a + b * along_b;
#pragma unroll
  for (int t = 0; t < R; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const B* from = at;
      if (a0 + 16 * t + 8 * h + r < end_a) {
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
          if (b + 8 * j < end_b) f(t, j, 2 * h, *from);
          if (b + 8 * j + 1 < end_b) f(t, j, 2 * h + 1, from[along_b]);
          from += 8 * along_b;
        }
      }
      at += 8 * along_a;
    }
}

// From products to scores: scale, bias, and minus infinity where a mask, is_causal or the end of the keys
// hides something. `mask`: whether the mask has to be looked at. Returns what the scores have yet to be
// multiplied by: 1 or, `Later`, the scale, which exp2's argument takes by a fused multiplication. In float
// and double all kernels do so: rounded in one and not in another, a score of 1000 would differ by 1e-4. Of
// 16 bits those that mma.sync makes lack the register.
template <bool Transposed, class S, bool Later = !kHalf<S>, int N8, int R, class T>
FASTGAN_DEVICE T finish_scores(const AttentionArgs& args, int64_t batch, int64_t head, int a0, int b0,
                               bool mask, T (&scores)[R][N8][4]) {
  constexpr int N = 8 * N8, keys = Transposed ? 16 * R : N;
  const int query0 = query_of<Transposed>(a0, b0), key0 = key_of<Transposed>(a0, b0);
  const T scale = T(args.scale * kLog2e), hidden = -T(INFINITY);
  const bool later = Later && !args.bias.data && scale > 0;  // minus infinity stays what it is
  if (!later) {
#pragma unroll
    for (int t = 0; t < R; ++t)
#pragma unroll
      for (int j = 0; j < N8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[t][j][i] *= scale;
  }
  if (args.bias.data) {
    if (sizeof(S) == 2 && args.bias_dtype == Dtype::float32)
      for_each_element<Transposed, float, N, R>(args, args.bias, batch, head, a0, b0,
                                                [&](int t, int j, int i, float bias) {
                                                  scores[t][j][i] = fma(T(bias), T(kLog2e), scores[t][j][i]);
                                                });
    else
      for_each_element<Transposed, S, N, R>(args, args.bias, batch, head, a0, b0,
                                            [&](int t, int j, int i, S bias) {
                                              scores[t][j][i] = fma(widen(bias), T(kLog2e), scores[t][j][i]);
                                            });
  }
  if (mask) {
    for_each_element<Transposed, uint8_t, N, R>(args, args.mask, batch, head, a0, b0,
                                                [&](int t, int j, int i, uint8_t seen) {
                                                  if (!seen) scores[t][j][i] = hidden;
                                                });
  }
  const int diagonal = int(args.diagonal);
  const bool crosses = args.is_causal && key0 + keys - 1 > query0 + diagonal;
  if (crosses || key0 + keys > args.columns) {
    const int end = int(args.columns);
    for_each<Transposed, N, R>(a0, b0, [&](int t, int j, int i, int query, int key) {
      if (key >= end || (crosses && key > query + diagonal)) scores[t][j][i] = hidden;
    });
  }
  return later ? scale : T(1);
}

// ---- dropout ----

struct Dropout {
  uint64_t seed;
  uint32_t offset, threshold;
  FASTGAN_DEVICE explicit Dropout(const AttentionArgs& args)
      : seed(uint64_t(args.philox[0])),
        offset(uint32_t(uint64_t(args.philox[args.philox_stride]))),
        threshold(args.threshold) {}
};

// The words of a lane's four places of the 16 x 8 tile at (a0, b0), both multiples of 8. Four neighbouring
// keys share a counter; the lanes that hold them compute a counter each and exchange words.
template <bool Transposed>
FASTGAN_DEVICE void dropout_words(const Dropout& dropout, uint32_t pair, int a0, int b0,
                                  uint32_t (&words)[4]) {
  const int r = lane_row(), q = lane_column();
  if constexpr (!Transposed) {
    const bool odd = q % 2;  // of two lanes one takes row r, the other row r + 8
    uint32_t x[4] = {dropout.offset, pair, uint32_t(a0 + r + (odd ? 8 : 0)), uint32_t(b0 / 4 + q / 2)};
    philox4x32(x, dropout.seed);
    const uint32_t got0 = shuffle_xor(odd ? x[0] : x[2], 1), got1 = shuffle_xor(odd ? x[1] : x[3], 1);
    words[0] = odd ? got0 : x[0];
    words[1] = odd ? got1 : x[1];
    words[2] = odd ? x[2] : got0;
    words[3] = odd ? x[3] : got1;
  } else {
    // Of four lanes, keys 4 n to 4 n + 3, the m-th takes the counter of place m; a 4 x 4 transpose gives each
    // its own word of every counter.
    const int m = r % 4;
    uint32_t x[4] = {dropout.offset, pair, uint32_t(b0 + 2 * q + m % 2),
                     uint32_t((a0 + m / 2 * 8) / 4 + r / 4)};
    philox4x32(x, dropout.seed);
    const bool one = m & 1, two = m & 2;
    uint32_t got0 = shuffle_xor(one ? x[0] : x[1], 4), got1 = shuffle_xor(one ? x[2] : x[3], 4);
    uint32_t y[4] = {one ? got0 : x[0], one ? x[1] : got0, one ? got1 : x[2], one ? x[3] : got1};
    got0 = shuffle_xor(two ? y[0] : y[2], 8), got1 = shuffle_xor(two ? y[1] : y[3], 8);
    words[0] = two ? got0 : y[0];
    words[1] = two ? got1 : y[1];
    words[2] = two ? y[2] : got0;
    words[3] = two ? y[3] : got1;
  }
}

// f(t, j, i, kept) for each of a lane's numbers.
template <bool Transposed, int N, int R, class F>
FASTGAN_DEVICE void for_each_kept(const AttentionArgs& args, int64_t batch, int64_t head, int a0, int b0,
                                  F f) {
  const Dropout dropout(args);  // read again for each tile: four registers that nobody else needs
  const uint32_t pair = uint32_t(batch * args.heads + head);
#pragma unroll
  for (int t = 0; t < R; ++t)
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      uint32_t words[4];
      dropout_words<Transposed>(dropout, pair, a0 + 16 * t, b0 + 8 * j, words);
#pragma unroll
      for (int i = 0; i < 4; ++i) f(t, j, i, words[i] >= dropout.threshold);
    }
}

// ---- what a mask hides ----

// Of rows × keys from (row, key) on, of which there is at least one.
FASTGAN_DEVICE int seen_of(const TileMap& map, const AttentionArgs& args, int64_t batch, int64_t head,
                           int row, int rows, int key, int keys) {
  if (!map.cells) return kAll;
  const uint8_t* cells = map.cells + batch * map.stride[0] + head * map.stride[1];
  int last_row = int(args.rows) - 1, last_key = int(args.columns) - 1;
  if (row + rows - 1 < last_row) last_row = row + rows - 1;
  if (key + keys - 1 < last_key) last_key = key + keys - 1;
  int least = kAll, most = kNothing;
  for (int r = map.stride[2] ? row / kCell : 0; r <= (map.stride[2] ? last_row / kCell : 0); ++r)
    for (int k = map.stride[3] ? key / kCell : 0; k <= (map.stride[3] ? last_key / kCell : 0); ++k) {
      const int cell = cells[r * map.stride[2] + k * map.stride[3]];
      if (cell < least) least = cell;
      if (cell > most) most = cell;
    }
  return most == kNothing ? kNothing : least == kAll ? kAll : kSome;
}

template <class S>
FASTGAN_DEVICE bool is_hidden_by_bias(const AttentionArgs& args, int64_t batch, int64_t head, int64_t key) {
  const AttentionInput& x = args.bias;
  const int64_t at = key * x.stride[3];
  if (sizeof(S) == 2 && args.bias_dtype == Dtype::float32)
    return head_of<float>(x, batch, head)[at] == -INFINITY;
  return widen(head_of<S>(x, batch, head)[at]) == -Accumulate<S>(INFINITY);
}

// A warp for each cell.
template <class S>
__global__ void __launch_bounds__(kMapThreads) map_kernel(AttentionArgs args, TileMap map, int64_t count) {
  const int64_t cell = int64_t(blockIdx.x) * (kMapThreads / kWarp) + threadIdx.x / kWarp;
  if (cell >= count) return;
  const int64_t key_cell = cell % map.size[3], row_cell = cell / map.size[3] % map.size[2],
                head = cell / map.size[3] / map.size[2] % map.size[1],
                batch = cell / map.size[3] / map.size[2] / map.size[1];
  const int64_t key = key_cell * kCell + threadIdx.x % kWarp;
  const int64_t rows = map.stride[2] ? kCell : 1, keys = map.stride[3] ? args.columns : 1;
  int any = 0, all = 1;
  if (key < keys) {
    const bool hidden = map.with_bias && is_hidden_by_bias<S>(args, batch, head, key);
    const uint8_t* mask = map.with_mask ? head_of<uint8_t>(args.mask, batch, head) : nullptr;
    for (int64_t row = row_cell * kCell; row < row_cell * kCell + rows && row < args.rows; ++row) {
      const bool seen =
          !hidden && (!mask || mask[row * args.mask.stride[2] + key * args.mask.stride[3]] != 0);
      any |= seen, all &= seen;
    }
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    any |= shuffle_xor(any, step);
    all &= shuffle_xor(all, step);
  }
  if (threadIdx.x % kWarp == 0) map.cells[cell] = uint8_t(!any ? kNothing : all ? kAll : kSome);
}

// ---- the gradient of the bias ----

// What a block sums up: a tile of the bias, and of a dimension of size 1 all places one after the other.
struct BiasTile {
  int batch, head;  // of the bias
  int batch_begin, batch_end, head_begin, head_end;
  int row_begin, row_end, key_begin, key_end;  // gone through in steps of a tile
  FASTGAN_DEVICE BiasTile(const AttentionArgs& args, const Plan& plan, int rows, int keys) {
    const int64_t* size = args.bias_size;
    int row_block, key_block;
    int rest = divide(int(blockIdx.x), plan.key_blocks, key_block);
    rest = divide(rest, plan.row_blocks, row_block);
    batch = divide(rest, int(size[1]), head);
    batch_begin = batch, batch_end = size[0] == 1 ? int(args.batch) : batch + 1;
    head_begin = head, head_end = size[1] == 1 ? int(args.heads) : head + 1;
    row_begin = row_block * rows, row_end = size[2] == 1 ? int(args.rows) : row_begin + 1;
    key_begin = key_block * keys, key_end = size[3] == 1 ? int(args.columns) : key_begin + 1;
  }
};

// Sums over what the warps have of a dimension of size 1, and the tile's gradient; memory for N numbers of
// each warp, which may still be read.
template <class S, int N, int R, int Warps, class T>
FASTGAN_DEVICE void store_bias_gradient(const AttentionArgs& args, const BiasTile& of, T (&sums)[R][N / 8][4],
                                        T* memory) {
  const int64_t* size = args.bias_size;
  const int warp = int(threadIdx.x) / kWarp;
  auto store = [&](int row, int key, T sum) {
    const int64_t at = ((int64_t(of.batch) * size[1] + of.head) * size[2] + row) * size[3] + key;
    if (sizeof(S) == 2 && args.bias_dtype == Dtype::float32)
      narrow(static_cast<float*>(args.grad_bias)[at], float(sum));
    else
      narrow(static_cast<S*>(args.grad_bias)[at], sum);
  };
  // Sums over what this warp has of a dimension of size 1; they end in its first row and column.
  if (size[2] == 1) {
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        T sum = 0;
#pragma unroll
        for (int t = 0; t < R; ++t) sum += sums[t][j][i] + sums[t][j][i + 2];
#pragma unroll
        for (int step = 4; step < kWarp; step *= 2) sum += shuffle_xor(sum, step);
        sums[0][j][i] = sum;
      }
  }
  if (size[3] == 1) {
#pragma unroll
    for (int t = 0; t < R; ++t)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        T sum = 0;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) sum += sums[t][j][2 * h] + sums[t][j][2 * h + 1];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        sums[t][0][2 * h] = sum;
      }
  }
  if (size[2] == 1) {  // the warps' rows as well, in order
    block_sync();
    if (lane_row() == 0)
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) memory[warp * N + 8 * j + 2 * lane_column() + i] = sums[0][j][i];
    block_sync();
    const int column = int(threadIdx.x);
    if (column < N && of.key_begin + column < size[3]) {
      T sum = 0;
      for (int w = 0; w < Warps; ++w) sum += memory[w * N + column];
      store(0, of.key_begin + column, sum);
    }
    return;
  }
  for_each<false, N, R>(of.row_begin + warp * 16 * R, of.key_begin,
                        [&](int t, int j, int i, int row, int key) {
                          if (row < size[2] && key < size[3]) store(row, key, sums[t][j][i]);
                        });
}

// ---- host ----

inline TileMap map_of(const AttentionArgs& args) {
  TileMap map{};
  map.with_mask = args.mask.data != nullptr;
  map.with_bias = args.bias.data != nullptr && args.bias.stride[2] == 0;
  const int64_t whole[4] = {args.batch, args.heads, ceil_div(args.rows, kCell),
                            ceil_div(args.columns, kCell)};
  int64_t stride = 1;
  for (int i = 3; i >= 0; --i) {
    const bool varies =
        (map.with_mask && args.mask.stride[i] != 0) || (map.with_bias && args.bias.stride[i] != 0);
    map.size[i] = varies ? whole[i] : 1;
    map.stride[i] = varies ? stride : 0;
    stride *= map.size[i];
  }
  return map;
}

inline int64_t map_size(const AttentionArgs& args) {
  const TileMap map = map_of(args);
  if (!map.with_mask && !map.with_bias) return 0;
  return map.size[0] * map.size[1] * map.size[2] * map.size[3];
}

// Numbers that the backward needs of each row: the log-sum-exp in base 2, what rounding took of it, and
// rowsum(grad_output · output).
inline int64_t row_numbers_size(const AttentionArgs& args) {
  const int64_t size = args.dtype == Dtype::float64 ? 8 : 4;
  return ceil_div(3 * row_count(args) * size, 16) * 16;
}

template <class S>
bool may_use_vectors(const AttentionInput& x, int64_t width) {
  bool fits = is_aligned(x.data, 16) && x.stride[3] == 1 && width % kChunk<S> == 0;
  for (int i = 0; i < 3; ++i) fits = fits && x.stride[i] % kChunk<S> == 0;
  return fits;
}

template <class S>
Error make_map(const AttentionArgs& args, uint8_t* cells, TileMap& map, void* stream) {
  map = map_of(args);
  const int64_t count = map_size(args);
  if (count == 0) return nullptr;
  map.cells = cells;
  return launch(map_kernel<InMemory<S>>, ceil_div(count, kMapThreads / kWarp), kMapThreads, 0, stream, args,
                map, count);
}

inline Error refuse(const AttentionArgs& args) {
  const int64_t widest = args.dtype == Dtype::float64 ? 128 : 256;
  if (args.width > widest || args.value_width > widest)
    return args.dtype == Dtype::float64 ? "a head of float64 may be at most 128 wide"
                                        : "a head may be at most 256 wide";
  if (args.rows > 0x3fffffff || args.columns > 0x3fffffff || args.packed_rows > 0x3fffffff ||
      args.packed_columns > 0x3fffffff)
    return "a sequence, or all packed ones, have more than 2^30 places";
  return nullptr;
}

// How the tiles of a bias are cut, and how many there are.
inline int64_t plan_bias_tiles(const AttentionArgs& args, Plan& plan, int rows, int keys) {
  const int64_t* size = args.bias_size;
  plan.row_blocks = int(ceil_div(size[2], rows));
  plan.key_blocks = int(ceil_div(size[3], keys));
  return size[0] * size[1] * plan.row_blocks * plan.key_blocks;
}

inline int64_t widest(const AttentionArgs& args) {
  return args.width > args.value_width ? args.width : args.value_width;
}

// f<S, D>(args, stream), D the narrowest that both widths fit in. Heads of floats wider than 128 are exact:
// their sums leave no registers for the terms.
#define FASTGAN_ATTENTION_BY_WIDTH(S, f)           \
  (widest(args) <= 64    ? f<S, 64>(args, stream)  \
   : widest(args) <= 128 ? f<S, 128>(args, stream) \
                         : f<S, 256>(args, stream))
#define FASTGAN_ATTENTION_BY_WIDTH_IN_TERMS(f)        \
  (widest(args) <= 64    ? f<tf32, 64>(args, stream)  \
   : widest(args) <= 128 ? f<tf32, 128>(args, stream) \
                         : f<float, 256>(args, stream))
#define FASTGAN_ATTENTION_BY_DTYPE(f)                                             \
  (args.dtype == Dtype::float32    ? args.products == Float32Products::exact      \
                                         ? FASTGAN_ATTENTION_BY_WIDTH(float, f)   \
                                         : FASTGAN_ATTENTION_BY_WIDTH_IN_TERMS(f) \
   : args.dtype == Dtype::bfloat16 ? FASTGAN_ATTENTION_BY_WIDTH(bfloat16, f)      \
   : args.dtype == Dtype::float16  ? FASTGAN_ATTENTION_BY_WIDTH(float16, f)       \
   : widest(args) <= 64            ? f<double, 64>(args, stream)                  \
                                   : f<double, 128>(args, stream))

}  // namespace
}  // namespace fastgan
