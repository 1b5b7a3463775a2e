// Attention on CUDA, second order. Registers: at most 255, no spills (nvcc 13: sm_80, sm_90a, sm_100).
//
// The derivative of output, and of the backward's four gradients, along a direction (t of each input). With t
// the tangent of the scores, m = Σ P t its mean in a row, and what is dropped of dO Vᵀ and dO tVᵀ set to 0:
//
//   P' = P ∘ (t − m)                         O'  = P' V + P tV
//   dS = P ∘ (dO Vᵀ − D)                     dS' = P' ∘ (dO Vᵀ − D) + P ∘ (dO tVᵀ − D'),  D' = rowsum(dO ∘
//   O') dQ' = dS' K + dS tK                      dK' = dS'ᵀ Q + dSᵀ tQ        dV' = P'ᵀ dO
//
// (of dropout P and P' are dropped in O' and dV'). tangent_kernel gives O' as Σ (P t) V + P tV − m O, for m
// is known at the end of a row, and leaves m, D and D' of each row; then queries, keys and bias as in
// attention_backward.cu, with more tiles at a time and therefore smaller ones, in one stage. Absent tangents
// cost nothing. D and D' come from the output as it was stored: of half precision a row's dS' sums to 0 but
// for its rounding, in short rows as well (the first order has D of those from P ∘ dP). All in memory linear
// in the sequence, and the same bits in every run.
#include "attention/attention_cuda_blocks.h"

namespace fastgan {
namespace {

template <class S, int D>
struct SecondTiling {
  static constexpr int bytes = D * int(sizeof(S));                       // of a row
  static constexpr int warps = bytes <= 256 ? 4 : bytes <= 512 ? 2 : 1;  // of 16 rows
  static constexpr int N = bytes <= 256 && !kInTerms<S> ? 32 : bytes <= 512 ? 16 : 8;
  static constexpr int threads = warps * kWarp, rows = 16 * warps;
  static constexpr bool split = D * sizeof(Accumulate<S>) >= 512;  // dK' and dV' have a launch each
};
template <class S, int D>
using OfTile = Accumulate<S>[1][SecondTiling<S, D>::N / 8][4];

constexpr int kNumbers = 5;  // of a row: lse in base 2, its rest, m, D, D'

template <class S, int D, int As, int Bs>
constexpr size_t second_shared_bytes() {
  using Tiling = SecondTiling<S, D>;
  using T = Accumulate<S>;
  return SharedMemory::bytes<S>(As * Tiling::rows * D) + SharedMemory::bytes<S>(Bs * Tiling::N * D) +
         SharedMemory::bytes<T>(kNumbers * Tiling::N) +
         SharedMemory::bytes<T>(Tiling::warps * kWeightsSize<S, Tiling::N, 1>);
}

// As tiles of the block's rows, Bs tiles that go by.
template <class S, int D, int As, int Bs>
struct Memory {
  using Tiling = SecondTiling<S, D>;
  using T = Accumulate<S>;
  static constexpr int N = Tiling::N, per_warp = kWeightsSize<S, N, 1>;
  S *a, *b;
  T *numbers, *weights;
  FASTGAN_DEVICE Memory() {
    SharedMemory shared;
    a = shared.take<S>(As * Tiling::rows * D);
    b = shared.take<S>(Bs * N * D);
    numbers = shared.take<T>(kNumbers * N);
    weights = per_warp ? shared.take<T>(Tiling::warps * per_warp) + threadIdx.x / kWarp * per_warp : nullptr;
  }
  FASTGAN_DEVICE S* block(int which) const { return a + which * Tiling::rows * D; }
  FASTGAN_DEVICE const S* rows(int which) const { return block(which) + int(threadIdx.x) / kWarp * 16 * D; }
  FASTGAN_DEVICE S* tile(int which) const { return b + which * N * D; }
};

// Numbers of a row, each found where it is wanted.
template <class T>
FASTGAN_DEVICE void row_number(const AttentionArgs& args, int64_t batch, int64_t head, int64_t row, bool sums,
                               T (&out)[kNumbers]) {
  out[0] = T(INFINITY), out[1] = out[2] = out[3] = out[4] = T(0);
  if (row >= args.rows) return;
  const int64_t at = rows_before(args, batch, head) + row, all = all_rows(args);
  const double natural = args.logsumexp[at], lse = natural * kLog2e;
  if (natural != -double(INFINITY)) out[0] = T(lse), out[1] = T(lse - double(T(lse)));
  if (!sums) return;
  const T* from = static_cast<const T*>(args.row_sums) + at;
#pragma unroll
  for (int i = 0; i < 3; ++i) out[2 + i] = from[i * all];
}

// Of a lane's two rows.
template <class T>
FASTGAN_DEVICE void row_numbers(const AttentionArgs& args, int64_t batch, int64_t head, int first, bool sums,
                                T (&out)[2][kNumbers]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) row_number(args, batch, head, first + 8 * h + lane_row(), sums, out[h]);
}

// The tangent of a tile's scores, and P, from the tiles of rows and columns and those of their tangents.
// number(j, i, which) of the query of a place.
template <bool Transposed, class S, int D, class F>
FASTGAN_DEVICE void weights_and_tangents(const AttentionArgs& args, int batch, int head, int a0, int b0,
                                         bool look, const S* a, const S* tangent_a, const S* b,
                                         const S* tangent_b, F number, OfTile<S, D>& weights,
                                         OfTile<S, D>& tangents) {
  using T = Accumulate<S>;
  constexpr int N = SecondTiling<S, D>::N;
  products_of_rows<S, D, N, 1>(weights, a, b, args.products);
  const T factor = finish_scores<Transposed, S>(args, batch, head, a0, b0, look, weights);
  for_each_place<N, 1>([&](int, int j, int i) {
    weights[0][j][i] = quick_exp2(fma(weights[0][j][i], factor, -number(j, i, 0)) - number(j, i, 1));
    tangents[0][j][i] = 0;
  });
  const AttentionInput &of_a = Transposed ? args.tangent_key : args.tangent_query,
                       &of_b = Transposed ? args.tangent_query : args.tangent_key;
  if (of_a.data) products_of_rows<S, D, N, 1, true>(tangents, tangent_a, b, args.products);
  if (of_b.data) products_of_rows<S, D, N, 1, true>(tangents, a, tangent_b, args.products);
  const T scale = T(args.scale);
  for_each_place<N, 1>([&](int, int j, int i) { tangents[0][j][i] *= scale; });
  if (!args.tangent_bias.data) return;
  if (sizeof(S) == 2 && args.bias_dtype == Dtype::float32)
    for_each_element<Transposed, float, N, 1>(
        args, args.tangent_bias, batch, head, a0, b0,
        [&](int, int j, int i, float bias) { tangents[0][j][i] += T(bias); });
  else
    for_each_element<Transposed, S, N, 1>(
        args, args.tangent_bias, batch, head, a0, b0,
        [&](int, int j, int i, S bias) { tangents[0][j][i] += widen(bias); });
}

// dS and dS' in place of dO Vᵀ and dO tVᵀ, of which what is dropped is 0.
template <class S, int D, class F>
FASTGAN_DEVICE void score_gradients(const OfTile<S, D>& weights, const OfTile<S, D>& tangents, F number,
                                    OfTile<S, D>& grads, OfTile<S, D>& moved) {
  using T = Accumulate<S>;
  for_each_place<SecondTiling<S, D>::N, 1>([&](int, int j, int i) {
    const T p = weights[0][j][i], centred = grads[0][j][i] - number(j, i, 3);
    grads[0][j][i] = p * centred;
    moved[0][j][i] =
        p * ((tangents[0][j][i] - number(j, i, 2)) * centred + (moved[0][j][i] - number(j, i, 4)));
  });
}

// Loads a tile of an input that may be absent.
template <class S, int D, int Rows, int Threads>
FASTGAN_DEVICE void load_tile_of(S* to, const AttentionInput& x, int64_t batch, int64_t head, int first,
                                 int64_t count, int64_t width, bool vectors) {
  if (x.data) load_tile<S, D, Rows, Threads>(to, x, head_of<S>(x, batch, head), first, count, width, vectors);
}

// Keys, values and their tangents.
template <class S, int D, class M>
FASTGAN_DEVICE void load_keys(const AttentionArgs& args, const Plan& plan, const M& memory, int batch,
                              int kv_head, int tile) {
  constexpr int N = SecondTiling<S, D>::N, threads = SecondTiling<S, D>::threads;
  load_tile_of<S, D, N, threads>(memory.tile(0), args.key, batch, kv_head, tile, args.columns, args.width,
                                 plan.vectors);
  load_tile_of<S, D, N, threads>(memory.tile(1), args.tangent_key, batch, kv_head, tile, args.columns,
                                 args.width, plan.vectors);
  load_tile_of<S, D, N, threads>(memory.tile(2), args.value, batch, kv_head, tile, args.columns,
                                 args.value_width, plan.vectors);
  load_tile_of<S, D, N, threads>(memory.tile(3), args.tangent_value, batch, kv_head, tile, args.columns,
                                 args.value_width, plan.vectors);
  async_commit();
}
template <class S, int D, class M>
FASTGAN_DEVICE void load_queries(const AttentionArgs& args, const Plan& plan, const M& memory, int batch,
                                 int head, int row0) {
  constexpr int rows = SecondTiling<S, D>::rows, threads = SecondTiling<S, D>::threads;
  load_tile_of<S, D, rows, threads>(memory.block(0), args.query, batch, head, row0, args.rows, args.width,
                                    plan.vectors);
  load_tile_of<S, D, rows, threads>(memory.block(1), args.tangent_query, batch, head, row0, args.rows,
                                    args.width, plan.vectors);
}

// ---- the tangent of the output ----

template <class S, int D, bool Packed>
__global__ void __launch_bounds__(SecondTiling<S, D>::threads, 2)
    tangent_kernel(AttentionArgs given, Plan plan) {
  using Tiling = SecondTiling<S, D>;
  using T = Accumulate<S>;
  constexpr int N = Tiling::N;
  const Memory<S, D, 2, 4> memory;
  const RowsOfBlock<Tiling> of(given, plan);
  const AttentionArgs& args = sequence_of<Packed, S>(given, of.batch);
  if (Packed && of.row0 >= args.rows) return;
  const int batch = of.batch, head = of.head, kv_head = of.kv_head, row0 = of.row0, warp_row = of.warp_row;
  load_queries<S, D>(args, plan, memory, batch, head, row0);
  T numbers[2][kNumbers], sums[1][D / 8][4] = {}, mean[2] = {};
  row_numbers(args, batch, head, warp_row, false, numbers);
  auto number = [&](int, int i, int which) { return numbers[i / 2][which]; };
  for (int tile = 0; tile < args.columns; tile += N) {
    if (args.is_causal && tile >= row0 + Tiling::rows + int(args.diagonal)) break;
    const int seen = seen_of(plan.map, args, batch, head, row0, Tiling::rows, tile, N);
    if (seen == kNothing) continue;
    block_sync();  // the former tiles may still be read
    load_keys<S, D>(sequence_of<Packed, S>(given, batch), plan, memory, batch, kv_head, tile);
    async_wait<0>();
    block_sync();
    T weights[1][N / 8][4], tangents[1][N / 8][4];
    weights_and_tangents<false, S, D>(args, batch, head, warp_row, tile, args.mask.data && seen == kSome,
                                      memory.rows(0), memory.rows(1), memory.tile(0), memory.tile(1), number,
                                      weights, tangents);
    for_each_place<N, 1>([&](int, int j, int i) {
      tangents[0][j][i] *= weights[0][j][i];
      mean[i / 2] += tangents[0][j][i];
    });
    if (args.has_dropout)
      for_each_kept<false, N, 1>(args, batch, head, warp_row, tile, [&](int, int j, int i, bool kept) {
        if (!kept) weights[0][j][i] = tangents[0][j][i] = 0;
      });
    add_weighted_rows<S, D, N, 1>(sums, tangents, memory.tile(2), memory.weights, args.products);
    if (args.tangent_value.data)
      add_weighted_rows<S, D, N, 1>(sums, weights, memory.tile(3), memory.weights, args.products);
  }
  const AttentionArgs& now = sequence_of<Packed, S>(given, batch);
  const T kept_scale = args.has_dropout ? T(args.kept_scale) : T(1);
  const S* output = head_of<S>(now.saved_output, batch, head);
  const S* grad = args.row_sums ? head_of<S>(now.grad_output, batch, head) : nullptr;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    mean[h] += shuffle_xor(mean[h], 1);
    mean[h] += shuffle_xor(mean[h], 2);
    const int64_t row = warp_row + 8 * h + lane_row();
    T delta = 0, moved = 0;
    if (row < args.rows)
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = output_column<S>(j, i);
          if (column >= args.value_width) continue;
          const T out =
              widen(output[row * args.saved_output.stride[2] + column * args.saved_output.stride[3]]);
          T& sum = sums[0][j][2 * h + i];
          sum = sum * kept_scale - mean[h] * out;
          if (!grad) continue;
          const T dy = widen(grad[row * args.grad_output.stride[2] + column * args.grad_output.stride[3]]);
          delta = fma(dy, out, delta);
          moved = fma(dy, sum, moved);
        }
    if (!args.row_sums) continue;
    delta += shuffle_xor(delta, 1);
    delta += shuffle_xor(delta, 2);
    moved += shuffle_xor(moved, 1);
    moved += shuffle_xor(moved, 2);
    if (lane_column() == 0 && row < args.rows) {
      const int64_t all = all_rows(args);
      T* to = static_cast<T*>(args.row_sums) + rows_before(now, batch, head) + row;
      to[0] = mean[h], to[all] = delta, to[2 * all] = moved;
    }
  }
  const T one[1][2] = {{T(1), T(1)}};
  store_tile<S, D, 1>(now.tangent_output, batch, head, warp_row, now.rows, args.value_width, sums, one);
}

// ---- the tangents of the gradients ----

// dS and dS' of a warp's queries and a tile of keys, all tiles being there.
template <class S, int D, class M>
FASTGAN_DEVICE void gradients_of_queries(const AttentionArgs& args, const M& memory, int batch, int head,
                                         int row, int key, bool look,
                                         const Accumulate<S> (&numbers)[2][kNumbers], OfTile<S, D>& grads,
                                         OfTile<S, D>& moved) {
  using T = Accumulate<S>;
  constexpr int N = SecondTiling<S, D>::N;
  auto number = [&](int, int i, int which) { return numbers[i / 2][which]; };
  OfTile<S, D> weights, tangents;
  weights_and_tangents<false, S, D>(args, batch, head, row, key, look, memory.rows(0), memory.rows(1),
                                    memory.tile(0), memory.tile(1), number, weights, tangents);
  products_of_rows<S, D, N, 1>(grads, memory.rows(2), memory.tile(2), args.products);
  for_each_place<N, 1>([&](int, int j, int i) { moved[0][j][i] = 0; });
  if (args.tangent_value.data)
    products_of_rows<S, D, N, 1, true>(moved, memory.rows(2), memory.tile(3), args.products);
  if (args.has_dropout) {
    const T kept_scale = T(args.kept_scale);
    for_each_kept<false, N, 1>(args, batch, head, row, key, [&](int, int j, int i, bool kept) {
      grads[0][j][i] = kept ? grads[0][j][i] * kept_scale : T(0);
      moved[0][j][i] = kept ? moved[0][j][i] * kept_scale : T(0);
    });
  }
  score_gradients<S, D>(weights, tangents, number, grads, moved);
}

template <class S, int D, bool Packed>
__global__ void __launch_bounds__(SecondTiling<S, D>::threads, 2)
    second_queries_kernel(AttentionArgs given, Plan plan) {
  using Tiling = SecondTiling<S, D>;
  using T = Accumulate<S>;
  constexpr int N = Tiling::N;
  const Memory<S, D, 3, 4> memory;
  const RowsOfBlock<Tiling> of(given, plan);
  const AttentionArgs& args = sequence_of<Packed, S>(given, of.batch);
  if (Packed && of.row0 >= args.rows) return;
  const int batch = of.batch, head = of.head, kv_head = of.kv_head, row0 = of.row0, warp_row = of.warp_row;
  load_queries<S, D>(args, plan, memory, batch, head, row0);
  load_tile_of<S, D, Tiling::rows, Tiling::threads>(memory.block(2), args.grad_output, batch, head, row0,
                                                    args.rows, args.value_width, plan.vectors);
  T numbers[2][kNumbers], sums[1][D / 8][4] = {};
  row_numbers(args, batch, head, warp_row, true, numbers);
  for (int tile = 0; tile < args.columns; tile += N) {
    if (args.is_causal && tile >= row0 + Tiling::rows + int(args.diagonal)) break;
    const int seen = seen_of(plan.map, args, batch, head, row0, Tiling::rows, tile, N);
    if (seen == kNothing) continue;
    block_sync();
    load_keys<S, D>(sequence_of<Packed, S>(given, batch), plan, memory, batch, kv_head, tile);
    async_wait<0>();
    block_sync();
    OfTile<S, D> grads, moved;
    gradients_of_queries<S, D>(args, memory, batch, head, warp_row, tile, args.mask.data && seen == kSome,
                               numbers, grads, moved);
    add_weighted_rows<S, D, N, 1>(sums, moved, memory.tile(0), memory.weights, args.products);
    if (args.tangent_key.data)
      add_weighted_rows<S, D, N, 1>(sums, grads, memory.tile(1), memory.weights, args.products);
  }
  const AttentionArgs& now = sequence_of<Packed, S>(given, batch);
  const T factor[1][2] = {{T(args.scale), T(args.scale)}};
  store_tile<S, D, 1>(now.grad_query, batch, head, warp_row, now.rows, args.width, sums, factor);
}

template <class S, int D, bool Key, bool Value, bool Packed>
__global__ void __launch_bounds__(SecondTiling<S, D>::threads, 2)
    second_keys_kernel(AttentionArgs given, Plan plan) {
  using Tiling = SecondTiling<S, D>;
  using T = Accumulate<S>;
  constexpr int N = Tiling::N, rows = Tiling::rows, threads = Tiling::threads;
  const Memory<S, D, 4, 3> memory;
  const KeysOfBlock<Tiling> of(given, plan);
  const AttentionArgs& args = sequence_of<Packed, S>(given, of.batch);
  if (Packed && of.key0 >= args.columns) return;
  const int batch = of.batch, kv_head = of.kv_head, key0 = of.key0, warp_key = of.warp_key, group = of.group;
  load_tile_of<S, D, rows, threads>(memory.block(0), args.key, batch, kv_head, key0, args.columns, args.width,
                                    plan.vectors);
  load_tile_of<S, D, rows, threads>(memory.block(1), args.tangent_key, batch, kv_head, key0, args.columns,
                                    args.width, plan.vectors);
  load_tile_of<S, D, rows, threads>(memory.block(2), args.value, batch, kv_head, key0, args.columns,
                                    args.value_width, plan.vectors);
  load_tile_of<S, D, rows, threads>(memory.block(3), args.tangent_value, batch, kv_head, key0, args.columns,
                                    args.value_width, plan.vectors);
  T key_sums[1][D / 8][4] = {}, value_sums[1][D / 8][4] = {};
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (int tile = first_row_that_sees<N>(args, key0); tile < args.rows; tile += N) {
      const int seen = seen_of(plan.map, args, batch, head, tile, N, key0, rows);
      if (seen == kNothing) continue;
      block_sync();
      const AttentionArgs& now = sequence_of<Packed, S>(given, batch);
      load_tile_of<S, D, N, threads>(memory.tile(0), now.query, batch, head, tile, now.rows, now.width,
                                     plan.vectors);
      load_tile_of<S, D, N, threads>(memory.tile(1), now.tangent_query, batch, head, tile, now.rows,
                                     now.width, plan.vectors);
      load_tile_of<S, D, N, threads>(memory.tile(2), now.grad_output, batch, head, tile, now.rows,
                                     now.value_width, plan.vectors);
      async_commit();
      for (int n = int(threadIdx.x); n < N; n += threads) {
        T of_row[kNumbers];
        row_number(now, batch, head, tile + n, true, of_row);
#pragma unroll
        for (int i = 0; i < kNumbers; ++i) memory.numbers[i * N + n] = of_row[i];
      }
      async_wait<0>();
      block_sync();
      const T* numbers = memory.numbers + 2 * lane_column();
      auto number = [&](int j, int i, int which) { return numbers[which * N + 8 * j + i % 2]; };
      OfTile<S, D> weights, tangents;
      weights_and_tangents<true, S, D>(args, batch, head, warp_key, tile, args.mask.data && seen == kSome,
                                       memory.rows(0), memory.rows(1), memory.tile(0), memory.tile(1), number,
                                       weights, tangents);
      uint32_t kept = 0xffffffffu;  // a bit for each place
      if (args.has_dropout) {
        kept = 0;
        for_each_kept<true, N, 1>(args, batch, head, warp_key, tile, [&](int, int j, int i, bool is_kept) {
          kept |= uint32_t(is_kept) << (4 * j + i);
        });
      }
      if (Value) {
        OfTile<S, D> used;
        for_each_place<N, 1>([&](int, int j, int i) {
          used[0][j][i] =
              kept >> (4 * j + i) & 1 ? weights[0][j][i] * (tangents[0][j][i] - number(j, i, 2)) : T(0);
        });
        add_weighted_rows<S, D, N, 1>(value_sums, used, memory.tile(2), memory.weights, args.products);
      }
      if (Key) {
        OfTile<S, D> grads, moved;
        products_of_rows<S, D, N, 1>(grads, memory.rows(2), memory.tile(2), args.products);
        for_each_place<N, 1>([&](int, int j, int i) { moved[0][j][i] = 0; });
        if (args.tangent_value.data)
          products_of_rows<S, D, N, 1, true>(moved, memory.rows(3), memory.tile(2), args.products);
        const T kept_scale = args.has_dropout ? T(args.kept_scale) : T(1);
        for_each_place<N, 1>([&](int, int j, int i) {
          const bool is_kept = kept >> (4 * j + i) & 1;
          grads[0][j][i] = is_kept ? grads[0][j][i] * kept_scale : T(0);
          moved[0][j][i] = is_kept ? moved[0][j][i] * kept_scale : T(0);
        });
        score_gradients<S, D>(weights, tangents, number, grads, moved);
        add_weighted_rows<S, D, N, 1>(key_sums, moved, memory.tile(0), memory.weights, args.products);
        if (args.tangent_query.data)
          add_weighted_rows<S, D, N, 1>(key_sums, grads, memory.tile(1), memory.weights, args.products);
      }
    }
  const T scale = T(args.scale), kept_scale = args.has_dropout ? T(args.kept_scale) : T(1);
  const T of_keys[1][2] = {{scale, scale}}, of_values[1][2] = {{kept_scale, kept_scale}};
  const AttentionArgs& now = sequence_of<Packed, S>(given, batch);
  if (Key)
    store_tile<S, D, 1>(now.grad_key, batch, kv_head, warp_key, now.columns, args.width, key_sums, of_keys);
  if (Value)
    store_tile<S, D, 1>(now.grad_value, batch, kv_head, warp_key, now.columns, args.value_width, value_sums,
                        of_values);
}

template <class S, int D>
__global__ void __launch_bounds__(SecondTiling<S, D>::threads, 2)
    second_bias_kernel(AttentionArgs args, Plan plan) {
  using Tiling = SecondTiling<S, D>;
  using T = Accumulate<S>;
  constexpr int N = Tiling::N;
  const Memory<S, D, 3, 4> memory;
  const BiasTile of(args, plan, Tiling::rows, N);
  const int warp_offset = int(threadIdx.x) / kWarp * 16,
            group = args.kv_heads ? int(args.heads / args.kv_heads) : 1;
  OfTile<S, D> sums = {};
  for (int batch = of.batch_begin; batch < of.batch_end; ++batch)
    for (int head = of.head_begin; head < of.head_end; ++head)
      for (int row0 = of.row_begin; row0 < of.row_end && row0 < args.rows; row0 += Tiling::rows) {
        bool has_rows = false;
        T numbers[2][kNumbers];
        for (int key0 = of.key_begin; key0 < of.key_end && key0 < args.columns; key0 += N) {
          if (args.is_causal && key0 >= row0 + Tiling::rows) break;
          const int seen = seen_of(plan.map, args, batch, head, row0, Tiling::rows, key0, N);
          if (seen == kNothing) continue;
          block_sync();
          if (!has_rows) {
            load_queries<S, D>(args, plan, memory, batch, head, row0);
            load_tile_of<S, D, Tiling::rows, Tiling::threads>(memory.block(2), args.grad_output, batch, head,
                                                              row0, args.rows, args.value_width,
                                                              plan.vectors);
            row_numbers(args, batch, head, row0 + warp_offset, true, numbers);
            has_rows = true;
          }
          load_keys<S, D>(args, plan, memory, batch, head / group, key0);
          async_wait<0>();
          block_sync();
          OfTile<S, D> grads, moved;
          gradients_of_queries<S, D>(args, memory, batch, head, row0 + warp_offset, key0,
                                     args.mask.data && seen == kSome, numbers, grads, moved);
          for_each_place<N, 1>([&](int t, int j, int i) { sums[t][j][i] += moved[t][j][i]; });
        }
      }
  store_bias_gradient<S, N, 1, Tiling::warps>(args, of, sums, reinterpret_cast<T*>(memory.b));
}

// ---- host ----

template <class S, int D>
Error plan_of(const AttentionArgs& args, void* stream, Plan& plan) {
  using Tiling = SecondTiling<S, D>;
  plan.row_blocks = int(ceil_div(args.rows, Tiling::rows));
  plan.key_blocks = int(ceil_div(args.columns, Tiling::rows));
  auto fits = [](const AttentionInput& x, int64_t width) { return !x.data || may_use_vectors<S>(x, width); };
  plan.vectors = fits(args.query, args.width) && fits(args.key, args.width) &&
                 fits(args.value, args.value_width) && fits(args.grad_output, args.value_width) &&
                 fits(args.tangent_query, args.width) && fits(args.tangent_key, args.width) &&
                 fits(args.tangent_value, args.value_width);
  return make_map<S>(args, static_cast<uint8_t*>(args.workspace), plan.map, stream);
}

template <class S, int D>
Error tangent(const AttentionArgs& args, void* stream) {
  using Tiling = SecondTiling<S, D>;
  constexpr size_t shared = second_shared_bytes<S, D, 2, 4>();
  static_assert(shared <= kMostShared);
  Plan plan{};
  if (Error error = plan_of<S, D>(args, stream, plan)) return error;
  const auto kernel = args.row_offset ? tangent_kernel<S, D, true> : tangent_kernel<S, D, false>;
  return launch(kernel, args.batch * args.heads * plan.row_blocks, Tiling::threads, shared, stream, args,
                plan);
}

template <class S, int D, bool Packed>
Error double_backward_of(const AttentionArgs& args, void* stream) {
  using Tiling = SecondTiling<S, D>;
  constexpr size_t shared = second_shared_bytes<S, D, 3, 4>(), of_keys = second_shared_bytes<S, D, 4, 3>();
  static_assert(shared <= kMostShared && of_keys <= kMostShared);
  Plan plan{};
  Error error = plan_of<S, D>(args, stream, plan);
  const int64_t keys = args.batch * args.kv_heads * plan.key_blocks;
  if (!error)
    error = launch(second_queries_kernel<S, D, Packed>, args.batch * args.heads * plan.row_blocks,
                   Tiling::threads, shared, stream, args, plan);
  if (!error)
    error = launch_of_keys<Tiling::split>([&](auto key, auto value) {
      return launch(second_keys_kernel<S, D, key.value, value.value, Packed>, keys, Tiling::threads, of_keys,
                    stream, args, plan);
    });
  if (error || !args.grad_bias) return error;
  const int64_t tiles = plan_bias_tiles(args, plan, Tiling::rows, Tiling::N);
  return launch(second_bias_kernel<S, D>, tiles, Tiling::threads, shared, stream, args, plan);
}

template <class S, int D>
Error double_backward(const AttentionArgs& args, void* stream) {
  return args.row_offset ? double_backward_of<S, D, true>(args, stream)
                         : double_backward_of<S, D, false>(args, stream);
}

Error run_tangent(const AttentionArgs& args, void* stream) {
  if (Error error = refuse(args)) return error;
  return FASTGAN_ATTENTION_BY_DTYPE(tangent);
}
Error run_double_backward(const AttentionArgs& args, void* stream) {
  if (Error error = refuse(args)) return error;
  return FASTGAN_ATTENTION_BY_DTYPE(double_backward);
}

}  // namespace
}  // namespace fastgan

extern "C" const char* fastgan_attention_jvp_cuda(const fastgan::AttentionArgs& args, void* stream) {
  return fastgan::run_tangent(args, stream);
}
extern "C" const char* fastgan_attention_double_backward_cuda(const fastgan::AttentionArgs& args,
                                                              void* stream) {
  return fastgan::run_double_backward(args, stream);
}
