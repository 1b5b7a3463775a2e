// Attention on CUDA, backward. Registers: at most 255, no spills (nvcc 13: sm_80, sm_90a, sm_100).
//
// With D = rowsum(dO ∘ O):  P = 2^(s − lse),  dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ − D),  dQ = dS K,  dK = dSᵀ Q.
// Scores are recomputed in tiles; nothing of the size of the scores is stored, and nothing is added up by
// atomics, so that the bits are the same in every run. Three kernels, each of tiles A that stay with a block
// and tiles B that go by:
//
//   queries_kernel   A: queries and dO, B: keys and values    dQ
//   keys_kernel      A: keys and values, B: queries and dO    dK and dV, of the transposed scores, so that P
//                    and dS are a first factor again; the heads that share keys come one after the other
//   bias_kernel      a tile of the bias; all batches, heads, rows and keys that it was broadcast over go by
//
// against five products of a kernel that sums dQ by atomics these are seven, and two more for the bias. Where
// the sums of dK and dV together do not fit in registers the keys' kernel runs once for each.
//
// A kernel before them leaves three numbers of each row: lse in base 2, what its rounding took (at scores of
// 100 a float's step is 1e-5, which would be the relative error of P), and D. A dead row's lse is plus
// infinity there, and so is that of a row beyond the last: P is then 0. Rows of up to kWholeRow keys have D
// summed up from P ∘ dP instead (delta_kernel), the numbers that it is subtracted from: a weight of 1 then
// has a gradient of exactly 0, as it must, and a row's dS sum to 0. Short rows wait for launches, not for
// products.
#include "attention/attention_cuda_blocks.h"

namespace fastgan {
namespace {

constexpr int kRowThreads = 256;
constexpr int kWholeRow = int(kAttentionKeyBlock);

// What is kept of each row, (3, batch, heads, rows).
template <class T>
struct RowNumbers {
  T *lse, *rest, *delta;
};
template <class T>
FASTGAN_DEVICE RowNumbers<T> row_numbers(const AttentionArgs& args, int64_t batch, int64_t head) {
  const int64_t all = all_rows(args);
  T* first = static_cast<T*>(args.workspace) + rows_before(args, batch, head);
  return {first, first + all, first + 2 * all};
}

// A row's neighbours from `column` on, as many as a vector has; zeros beyond the row.
template <class S, class T>
FASTGAN_DEVICE void load_of_row(const AttentionInput& x, int64_t batch, int64_t head, int64_t row, int column,
                                int width, bool vectors, T (&values)[kChunk<S>]) {
  const S* from = head_of<S>(x, batch, head) + row * x.stride[2] + column * x.stride[3];
  if (vectors) return load_vector<kChunk<S>>(from, values);
#pragma unroll
  for (int e = 0; e < kChunk<S>; ++e) values[e] = column + e < width ? T(widen(from[e * x.stride[3]])) : T(0);
}

// Of rows of up to D numbers. Lanes that have a vector each share a row.
template <class S, int D>
constexpr int kLanesOfRow = D / kChunk<S> < kWarp ? D / kChunk<S> : kWarp;

template <class S, int D>
__global__ void __launch_bounds__(kRowThreads) rows_kernel(AttentionArgs args, Plan plan) {
  using T = Accumulate<S>;
  constexpr int E = kChunk<S>, lanes = kLanesOfRow<S, D>;
  int block, head;
  const int batch = divide(divide(int(blockIdx.x), plan.row_blocks, block), int(args.heads), head);
  const int64_t row = int64_t(block) * (kRowThreads / lanes) + threadIdx.x / lanes;
  const int lane = int(threadIdx.x) % lanes, width = int(args.value_width);
  const bool inside = row < args.rows;
  T sum = 0;
  for (int column = lane * E; inside && column < width; column += lanes * E) {
    T grad[E], output[E];
    load_of_row<S>(args.grad_output, batch, head, row, column, width, plan.vectors, grad);
    load_of_row<S>(args.saved_output, batch, head, row, column, width, plan.vectors, output);
#pragma unroll
    for (int e = 0; e < E; ++e) sum = fma(grad[e], output[e], sum);
  }
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) sum += shuffle_xor(sum, step);
  if (lane != 0 || !inside) return;
  const RowNumbers<T> to = row_numbers<T>(args, batch, head);
  const double natural = args.logsumexp[rows_before(args, batch, head) + row], lse = natural * kLog2e;
  const bool dead = natural == -double(INFINITY);
  to.lse[row] = dead ? T(INFINITY) : T(lse);
  to.rest[row] = dead ? T(0) : T(lse - double(T(lse)));
  to.delta[row] = sum;
}

// Shared memory of all three kernels: A's two tiles, B's in their stages, row numbers of B, weights.
template <class S, int D, class Tiling>
constexpr size_t backward_shared_bytes() {
  using T = Accumulate<S>;
  return SharedMemory::bytes<S>(2 * Tiling::rows * D) +
         SharedMemory::bytes<S>(2 * Tiling::stages * Tiling::N * D) +
         SharedMemory::bytes<T>(3 * Tiling::stages * Tiling::N) +
         SharedMemory::bytes<T>(Tiling::warps * kWeightsSize<S, Tiling::N, Tiling::R>);
}

template <class S, int D, class Tiling>
struct Memory {
  using T = Accumulate<S>;
  static constexpr int N = Tiling::N, R = Tiling::R, per_warp = kWeightsSize<S, N, R>;
  S *a, *b;
  T *numbers, *weights;
  FASTGAN_DEVICE Memory() {
    SharedMemory shared;
    a = shared.take<S>(2 * Tiling::rows * D);
    b = shared.take<S>(2 * Tiling::stages * N * D);
    numbers = shared.take<T>(3 * Tiling::stages * N);
    weights = per_warp ? shared.take<T>(Tiling::warps * per_warp) + threadIdx.x / kWarp * per_warp : nullptr;
  }
  // The first and the second tile of A; those of B in a stage.
  FASTGAN_DEVICE const S* rows(int which) const { return a + which * Tiling::rows * D; }
  FASTGAN_DEVICE S* tile(int stage, int which) const { return b + (2 * stage + which) * N * D; }
};

template <class T, int R>
FASTGAN_DEVICE void load_row_numbers(const AttentionArgs& args, int64_t batch, int64_t head, int first,
                                     T (&lse)[R][2], T (&rest)[R][2]) {
  const RowNumbers<T> from = row_numbers<T>(args, batch, head);
#pragma unroll
  for (int t = 0; t < R; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first + 16 * t + 8 * h + lane_row();
      lse[t][h] = row < args.rows ? from.lse[row] : T(INFINITY);
      rest[t][h] = row < args.rows ? from.rest[row] : T(0);
    }
}
template <class T, int R>
FASTGAN_DEVICE void load_deltas(const AttentionArgs& args, int64_t batch, int64_t head, int first,
                                T (&delta)[R][2]) {
  const T* from = row_numbers<T>(args, batch, head).delta;
#pragma unroll
  for (int t = 0; t < R; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first + 16 * t + 8 * h + lane_row();
      delta[t][h] = row < args.rows ? from[row] : T(0);
    }
}

// What is in registers of a tile.
template <class S, class Tiling>
using OfTile = Accumulate<S>[Tiling::R][Tiling::N / 8][4];
template <class S, class Tiling>
using OfRows = Accumulate<S>[Tiling::R][2];

// P and dO Vᵀ of a warp's queries, rows `row` on, and the keys of a tile, `key` on. What is dropped of the
// second is 0.
template <class S, int D, class Tiling>
FASTGAN_DEVICE void weights_of_queries(const AttentionArgs& args, const Memory<S, D, Tiling>& memory,
                                       int batch, int head, int row, int key, int stage, bool look,
                                       const OfRows<S, Tiling>& lse, const OfRows<S, Tiling>& rest,
                                       OfTile<S, Tiling>& weights, OfTile<S, Tiling>& grads) {
  using T = Accumulate<S>;
  constexpr int N = Tiling::N, R = Tiling::R;
  // Warpgroups make the second product while the first goes through exp2; others would lack the registers.
  constexpr bool beside = Tiling::warpgroups;
  start_products<S, D, Tiling>(weights, memory.rows(0), memory.tile(stage, 0), args.products);
  if (beside) start_products<S, D, Tiling>(grads, memory.rows(1), memory.tile(stage, 1), args.products);
  finish_products<Tiling, beside>(weights);
  const T factor =
      finish_scores<false, S, kScalesLater<S, Tiling>>(args, batch, head, row, key, look, weights);
  for_each_place<N, R>([&](int t, int j, int i) {
    weights[t][j][i] = quick_exp2(fma(weights[t][j][i], factor, -lse[t][i / 2]) - rest[t][i / 2]);
  });
  if (!beside) start_products<S, D, Tiling>(grads, memory.rows(1), memory.tile(stage, 1), args.products);
  finish_products<Tiling>(grads);
  if (!args.has_dropout) return;
  const T kept_scale = T(args.kept_scale);
  for_each_kept<false, N, R>(args, batch, head, row, key, [&](int t, int j, int i, bool kept) {
    grads[t][j][i] = kept ? grads[t][j][i] * kept_scale : T(0);
  });
}

// D of rows of up to kWholeRow keys.
template <class S, int D, bool Packed>
__global__ void __launch_bounds__(QueriesTiling<S, D>::threads, 2)
    delta_kernel(AttentionArgs given, Plan plan) {
  using Tiling = QueriesTiling<S, D>;
  using T = Accumulate<S>;
  constexpr int N = Tiling::N, R = Tiling::R, threads = Tiling::threads;
  const Memory<S, D, Tiling> memory;
  const RowsOfBlock<Tiling> of(given, plan);
  const AttentionArgs& args = sequence_of<Packed, S>(given, of.batch);
  if (Packed && of.row0 >= args.rows) return;
  const int batch = of.batch, head = of.head, kv_head = of.kv_head, row0 = of.row0, warp_row = of.warp_row;
  load_tile<S, D, Tiling::rows, threads>(memory.a, args.query, head_of<S>(args.query, batch, head), row0,
                                         args.rows, args.width, plan.vectors);
  load_tile<S, D, Tiling::rows, threads>(memory.a + Tiling::rows * D, args.grad_output,
                                         head_of<S>(args.grad_output, batch, head), row0, args.rows,
                                         args.value_width, plan.vectors);
  T lse[R][2], rest[R][2], delta[R][2] = {};
  load_row_numbers(args, batch, head, warp_row, lse, rest);
  for (int tile = 0; tile < args.columns; tile += N) {
    if (args.is_causal && tile >= row0 + Tiling::rows + int(args.diagonal)) break;
    const int seen = seen_of(plan.map, args, batch, head, row0, Tiling::rows, tile, N);
    if (seen == kNothing) continue;
    block_sync();
    load_tile<S, D, N, threads>(memory.tile(0, 0), args.key, head_of<S>(args.key, batch, kv_head), tile,
                                args.columns, args.width, plan.vectors);
    load_tile<S, D, N, threads>(memory.tile(0, 1), args.value, head_of<S>(args.value, batch, kv_head), tile,
                                args.columns, args.value_width, plan.vectors);
    async_commit();
    async_wait<0>();
    block_sync();
    T weights[R][N / 8][4], grads[R][N / 8][4];
    weights_of_queries<S, D, Tiling>(args, memory, batch, head, warp_row, tile, 0,
                                     args.mask.data && seen == kSome, lse, rest, weights, grads);
    for_each_place<N, R>([&](int t, int j, int i) {
      delta[t][i / 2] = fma(weights[t][j][i], grads[t][j][i], delta[t][i / 2]);
    });
  }
  T* to = row_numbers<T>(args, batch, head).delta;
#pragma unroll
  for (int t = 0; t < R; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      T sum = delta[t][h];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      const int row = warp_row + 16 * t + 8 * h + lane_row();
      if (lane_column() == 0 && row < args.rows) to[row] = sum;
    }
}

template <class S, int D, class Tiling, bool Packed>
FASTGAN_DEVICE void queries_of_block(const AttentionArgs& given, const Plan& plan) {
  using T = Accumulate<S>;
  constexpr int N = Tiling::N, R = Tiling::R, threads = Tiling::threads;
  constexpr bool panels = Tiling::warpgroups;
  const Memory<S, D, Tiling> memory;
  const RowsOfBlock<Tiling> of(given, plan, given.is_causal);
  const AttentionArgs& args = sequence_of<Packed, S>(given, of.batch);
  if (Packed && of.row0 >= args.rows) return;
  const int batch = of.batch, head = of.head, row0 = of.row0, warp_row = of.warp_row;
  const S *key = head_of<S>(args.key, batch, of.kv_head), *value = head_of<S>(args.value, batch, of.kv_head);
  auto load = [&](int tile, int stage) {
    load_tile<S, D, N, threads, panels>(memory.tile(stage, 0), args.key, key, tile, args.columns, args.width,
                                        plan.vectors);
    load_tile<S, D, N, threads, panels>(memory.tile(stage, 1), args.value, value, tile, args.columns,
                                        args.value_width, plan.vectors);
  };
  load_tile<S, D, Tiling::rows, threads, panels>(memory.a, args.query, head_of<S>(args.query, batch, head),
                                                 row0, args.rows, args.width, plan.vectors);
  load_tile<S, D, Tiling::rows, threads, panels>(memory.a + Tiling::rows * D, args.grad_output,
                                                 head_of<S>(args.grad_output, batch, head), row0, args.rows,
                                                 args.value_width, plan.vectors);
  const int behind = row0 + together<Tiling>() + kTogether<Tiling> + int(args.diagonal);
  T sums[R][D / 8][4] = {}, lse[R][2], rest[R][2], delta[R][2];
  load_row_numbers(args, batch, head, warp_row, lse, rest);
  load_deltas(args, batch, head, warp_row, delta);
  go_through<Tiling>(TilesOfKeys<Tiling>(args, plan, of), load, [&](int tile, int stage, bool look) {
    if (!args.is_causal || tile < behind) {
      T scores[R][N / 8][4], grads[R][N / 8][4];
      weights_of_queries<S, D, Tiling>(args, memory, batch, head, warp_row, tile, stage, look, lse, rest,
                                       scores, grads);
      for_each_place<N, R>([&](int t, int j, int i) { scores[t][j][i] *= grads[t][j][i] - delta[t][i / 2]; });
      add_weighted<S, D, Tiling>(sums, scores, memory.tile(stage, 0), memory.weights, args.products);
    }
  });
  T factor[R][2];
#pragma unroll
  for (int t = 0; t < R; ++t) factor[t][0] = factor[t][1] = T(args.scale);
  store_tile<S, D, R>(args.grad_query, batch, head, warp_row, args.rows, args.width, sums, factor);
}

template <class S, int D, class Tiling, bool Packed>
__global__ void __launch_bounds__(Tiling::threads, Tiling::blocks)
    queries_kernel(AttentionArgs args, Plan plan) {
  if constexpr (kCompiled<S, D, Tiling>) queries_of_block<S, D, Tiling, Packed>(args, plan);
}

template <class S, int D, class Tiling, bool Key, bool Value, bool Packed>
FASTGAN_DEVICE void keys_of_block(const AttentionArgs& given, const Plan& plan) {
  using T = Accumulate<S>;
  constexpr int N = Tiling::N, R = Tiling::R, threads = Tiling::threads;
  constexpr bool panels = Tiling::warpgroups;
  const Memory<S, D, Tiling> memory;
  using Tiles = TilesOfRows<Tiling>;
  const KeysOfBlock<Tiling> of(given, plan);
  const AttentionArgs& args = sequence_of<Packed, S>(given, of.batch);
  if (Packed && of.key0 >= args.columns) return;
  const int batch = of.batch, kv_head = of.kv_head, key0 = of.key0, warp_key = of.warp_key, group = of.group;
  auto load = [&](typename Tiles::At at, int stage) {
    const int head = kv_head * group + at.head;
    const AttentionArgs& now = sequence_of<Packed, S>(given, batch);
    load_tile<S, D, N, threads, panels>(memory.tile(stage, 0), now.query, head_of<S>(now.query, batch, head),
                                        at.tile, now.rows, now.width, plan.vectors);
    load_tile<S, D, N, threads, panels>(memory.tile(stage, 1), now.grad_output,
                                        head_of<S>(now.grad_output, batch, head), at.tile, now.rows,
                                        now.value_width, plan.vectors);
    const RowNumbers<T> from = row_numbers<T>(now, batch, head);
    T* numbers = memory.numbers + 3 * stage * N;
    for (int i = int(threadIdx.x); i < N; i += threads) {
      const int row = at.tile + i;
      const bool inside = row < int(now.rows);
      numbers[i] = inside ? from.lse[row] : T(INFINITY);
      numbers[N + i] = inside ? from.rest[row] : T(0);
      numbers[2 * N + i] = inside ? from.delta[row] : T(0);
    }
  };
  load_tile<S, D, Tiling::rows, threads, panels>(memory.a, args.key, head_of<S>(args.key, batch, kv_head),
                                                 key0, args.columns, args.width, plan.vectors);
  if (Key)
    load_tile<S, D, Tiling::rows, threads, panels>(memory.a + Tiling::rows * D, args.value,
                                                   head_of<S>(args.value, batch, kv_head), key0, args.columns,
                                                   args.value_width, plan.vectors);
  const int first_key = key0 + together<Tiling>() - int(args.diagonal);
  // Where one of them is not wanted its sums are never touched, and take no registers.
  T key_sums[R][D / 8][4] = {}, value_sums[R][D / 8][4] = {};
  go_through<Tiling>(Tiles(args, plan, of), load, [&](typename Tiles::At at, int stage, bool look) {
    const int head = kv_head * group + at.head;
    if (!args.is_causal || at.tile + N > first_key) {
      const T* numbers = memory.numbers + 3 * stage * N + 2 * lane_column();
      T scores[R][N / 8][4], grads[R][N / 8][4];
      start_products<S, D, Tiling>(scores, memory.rows(0), memory.tile(stage, 0), args.products);
      if (Key && panels)
        start_products<S, D, Tiling>(grads, memory.rows(1), memory.tile(stage, 1), args.products);
      finish_products<Tiling, Key && panels>(scores);
      constexpr bool later = kScalesLater<S, Tiling>;
      const T factor = finish_scores<true, S, later>(args, batch, head, warp_key, at.tile, look, scores);
      for_each_place<N, R>([&](int t, int j, int i) {
        scores[t][j][i] =
            quick_exp2(fma(scores[t][j][i], factor, -numbers[8 * j + i % 2]) - numbers[N + 8 * j + i % 2]);
      });
      if (Key && !panels)
        start_products<S, D, Tiling>(grads, memory.rows(1), memory.tile(stage, 1), args.products);
      if (Key) finish_products<Tiling>(grads);
      if (args.has_dropout) {
        // Dropped: P has no part in dV, and dS = P (0 − D). What is kept is one bit of each place.
        uint32_t kept[R][N / 32 ? N / 32 : 1] = {};
        for_each_kept<true, N, R>(args, batch, head, warp_key, at.tile,
                                  [&](int t, int j, int i, bool is_kept) {
                                    kept[t][j / 4] |= uint32_t(is_kept) << (j % 4 * 4 + i);
                                  });
        auto is_kept = [&](int t, int j, int i) { return kept[t][j / 4] >> (j % 4 * 4 + i) & 1; };
        const T kept_scale = T(args.kept_scale);
        if (Value) {
          T kept_scores[R][N / 8][4];
          for_each_place<N, R>(
              [&](int t, int j, int i) { kept_scores[t][j][i] = is_kept(t, j, i) ? scores[t][j][i] : T(0); });
          add_weighted<S, D, Tiling>(value_sums, kept_scores, memory.tile(stage, 1), memory.weights,
                                     args.products);
        }
        if (Key)
          for_each_place<N, R>([&](int t, int j, int i) {
            grads[t][j][i] = is_kept(t, j, i) ? grads[t][j][i] * kept_scale : T(0);
          });
      } else if (Value) {
        add_weighted<S, D, Tiling>(value_sums, scores, memory.tile(stage, 1), memory.weights, args.products);
      }
      if (Key) {
        for_each_place<N, R>(
            [&](int t, int j, int i) { scores[t][j][i] *= grads[t][j][i] - numbers[2 * N + 8 * j + i % 2]; });
        add_weighted<S, D, Tiling>(key_sums, scores, memory.tile(stage, 0), memory.weights, args.products);
      }
    }
  });
  T factor[R][2];
#pragma unroll
  for (int t = 0; t < R; ++t) factor[t][0] = factor[t][1] = T(args.scale);
  if (Key)
    store_tile<S, D, R>(args.grad_key, batch, kv_head, warp_key, args.columns, args.width, key_sums, factor);
#pragma unroll
  for (int t = 0; t < R; ++t) factor[t][0] = factor[t][1] = args.has_dropout ? T(args.kept_scale) : T(1);
  if (Value)
    store_tile<S, D, R>(args.grad_value, batch, kv_head, warp_key, args.columns, args.value_width, value_sums,
                        factor);
}

template <class S, int D, class Tiling, bool Key, bool Value, bool Packed>
__global__ void __launch_bounds__(Tiling::threads, Tiling::blocks)
    keys_kernel(AttentionArgs args, Plan plan) {
  if constexpr (kCompiled<S, D, Tiling>) keys_of_block<S, D, Tiling, Key, Value, Packed>(args, plan);
}

// A block has one tile of the bias.
template <class S, int D>
__global__ void __launch_bounds__(QueriesTiling<S, D>::threads, 2)
    bias_kernel(AttentionArgs args, Plan plan) {
  using Tiling = QueriesTiling<S, D>;
  using T = Accumulate<S>;
  constexpr int N = Tiling::N, R = Tiling::R, threads = Tiling::threads;
  const Memory<S, D, Tiling> memory;
  const BiasTile of(args, plan, Tiling::rows, N);
  const int warp = int(threadIdx.x) / kWarp, group = args.kv_heads ? int(args.heads / args.kv_heads) : 1;
  T sums[R][N / 8][4] = {};
  for (int batch = of.batch_begin; batch < of.batch_end; ++batch)
    for (int head = of.head_begin; head < of.head_end; ++head)
      for (int row0 = of.row_begin; row0 < of.row_end && row0 < args.rows; row0 += Tiling::rows) {
        bool has_rows = false;
        const int warp_row = row0 + warp * 16 * R;
        for (int key0 = of.key_begin; key0 < of.key_end && key0 < args.columns; key0 += N) {
          if (args.is_causal && key0 >= row0 + Tiling::rows) break;
          const int seen = seen_of(plan.map, args, batch, head, row0, Tiling::rows, key0, N);
          if (seen == kNothing) continue;
          block_sync();  // the former tiles may still be read
          if (!has_rows) {
            load_tile<S, D, Tiling::rows, threads>(memory.a, args.query, head_of<S>(args.query, batch, head),
                                                   row0, args.rows, args.width, plan.vectors);
            load_tile<S, D, Tiling::rows, threads>(memory.a + Tiling::rows * D, args.grad_output,
                                                   head_of<S>(args.grad_output, batch, head), row0, args.rows,
                                                   args.value_width, plan.vectors);
            has_rows = true;
          }
          load_tile<S, D, N, threads>(memory.tile(0, 0), args.key, head_of<S>(args.key, batch, head / group),
                                      key0, args.columns, args.width, plan.vectors);
          load_tile<S, D, N, threads>(memory.tile(0, 1), args.value,
                                      head_of<S>(args.value, batch, head / group), key0, args.columns,
                                      args.value_width, plan.vectors);
          async_commit();
          async_wait<0>();
          block_sync();
          T scores[R][N / 8][4], grads[R][N / 8][4], lse[R][2], rest[R][2], delta[R][2];
          load_row_numbers(args, batch, head, warp_row, lse, rest);
          weights_of_queries<S, D, Tiling>(args, memory, batch, head, warp_row, key0, 0,
                                           args.mask.data && seen == kSome, lse, rest, scores, grads);
          load_deltas(args, batch, head, warp_row, delta);
          for_each_place<N, R>([&](int t, int j, int i) {
            sums[t][j][i] = fma(scores[t][j][i], grads[t][j][i] - delta[t][i / 2], sums[t][j][i]);
          });
        }
      }
  store_bias_gradient<S, N, R, Tiling::warps>(args, of, sums, reinterpret_cast<T*>(memory.b));
}

// The gradients of query, key and value.
template <class S, int D, class OfQueries, class OfKeys, bool Packed>
Error launch_backward(const AttentionArgs& args, Plan plan, void* stream) {
  constexpr size_t shared = backward_shared_bytes<S, D, OfQueries>(),
                   shared_of_keys = backward_shared_bytes<S, D, OfKeys>();
  static_assert(shared <= kMostSharedOf<OfQueries> && shared_of_keys <= kMostSharedOf<OfKeys>);
  plan.row_blocks = int(ceil_div(args.rows, OfQueries::rows));
  plan.key_blocks = int(ceil_div(args.columns, OfKeys::rows));
  if (Error error = launch(queries_kernel<S, D, OfQueries, Packed>, args.batch * args.heads * plan.row_blocks,
                           OfQueries::threads, shared, stream, args, plan))
    return error;
  return launch_of_keys<OfKeys::split>([&](auto key, auto value) {
    return launch(keys_kernel<S, D, OfKeys, key.value, value.value, Packed>,
                  args.batch * args.kv_heads * plan.key_blocks, OfKeys::threads, shared_of_keys, stream, args,
                  plan);
  });
}

template <class S, int D, bool Packed>
Error backward_by_gpu(const AttentionArgs& args, const Plan& plan, void* stream) {
  if constexpr (kWarpgroups<S, D>) {
    using Tiling = BackwardWarpgroups;
    if (was_compiled(queries_kernel<S, D, Tiling, Packed>))
      return launch_backward<S, D, Tiling, Tiling, Packed>(args, plan, stream);
  }
  return launch_backward<S, D, QueriesTiling<S, D>, KeysTiling<S, D>, Packed>(args, plan, stream);
}

template <class S, int D, bool Packed>
Error backward_of(const AttentionArgs& args, void* stream) {
  using Tiling = QueriesTiling<S, D>;
  constexpr size_t shared = backward_shared_bytes<S, D, Tiling>();
  Plan plan{};
  plan.row_blocks = int(ceil_div(args.rows, Tiling::rows));
  plan.vectors = may_use_vectors<S>(args.query, args.width) && may_use_vectors<S>(args.key, args.width) &&
                 may_use_vectors<S>(args.value, args.value_width) &&
                 may_use_vectors<S>(args.grad_output, args.value_width);
  auto* map = static_cast<uint8_t*>(args.workspace) + row_numbers_size(args);
  Error error = make_map<S>(args, map, plan.map, stream);
  AttentionArgs in_rows = args;  // packed sequences are one to the kernel of the rows
  if (Packed) in_rows.row_offset = nullptr, in_rows.batch = 1, in_rows.rows = args.packed_rows;
  Plan of_rows = plan;
  of_rows.vectors = may_use_vectors<S>(args.grad_output, args.value_width) &&
                    may_use_vectors<S>(args.saved_output, args.value_width);
  of_rows.row_blocks = int(ceil_div(in_rows.rows, kRowThreads / kLanesOfRow<InMemory<S>, D>));
  if (!error)
    error = launch(rows_kernel<InMemory<S>, D>, in_rows.batch * args.heads * of_rows.row_blocks, kRowThreads,
                   0, stream, in_rows, of_rows);
  if (!error && args.columns <= kWholeRow)
    error = launch(delta_kernel<S, D, Packed>, args.batch * args.heads * plan.row_blocks, Tiling::threads,
                   shared, stream, args, plan);
  if (!error) error = backward_by_gpu<S, D, Packed>(args, plan, stream);
  if (error || !args.grad_bias) return error;
  const int64_t tiles = plan_bias_tiles(args, plan, Tiling::rows, Tiling::N);
  return launch(bias_kernel<S, D>, tiles, Tiling::threads, shared, stream, args, plan);
}

template <class S, int D>
Error backward(const AttentionArgs& args, void* stream) {
  return args.row_offset ? backward_of<S, D, true>(args, stream) : backward_of<S, D, false>(args, stream);
}

Error run_backward(const AttentionArgs& args, void* stream) {
  if (Error error = refuse(args)) return error;
  return FASTGAN_ATTENTION_BY_DTYPE(backward);
}

}  // namespace
}  // namespace fastgan

extern "C" const char* fastgan_attention_backward_cuda(const fastgan::AttentionArgs& args, void* stream) {
  return fastgan::run_backward(args, stream);
}
