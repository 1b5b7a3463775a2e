// Attention on CUDA, forward. Registers: at most 255, no spills (nvcc 13: sm_80, sm_90a, sm_100).
//
// A block has up to 128 query rows of one head, a warp 16 or 32 of them, and goes through the keys in tiles
// of 16 to 64: scores (in registers), running row maximum m, P = 2^(s − m), output ← output · 2^(old m − m) +
// P · values. At the end the output is divided by the row sums. Products are in attention_cuda_products.h:
// tensor cores for 16-bit elements with float32 sums, fused multiply-adds for float and double. Keys and
// values of the next tile come by asynchronous copies while this one is worked on, where two stages fit in
// shared memory; then a tile costs one barrier.
//
// Tiles in which nothing is visible are skipped: behind the diagonal by arithmetic, under a mask by a map
// that a kernel before this one makes, a byte for each 32 × 32 places (attention_cuda.h). Where the map says
// that all is visible the mask is not read again. Masks and bias are read where they lie, with any strides.
//
// A dead row (all scores minus infinity) has maximum minus infinity; 0 is subtracted there instead, so that P
// is exactly 0. A NaN score is no maximum, but goes through exp2 into the row's sum, and so to the whole row.
// Dropout: P is kept or dropped by Philox's word for its place, row sums are over what is not dropped yet.
// Work and the order of sums depend on shapes alone: the same bits in every run.
#include "attention/attention_cuda_blocks.h"

namespace fastgan {
namespace {

template <class S, int D>
constexpr size_t forward_shared_bytes() {
  using Tiling = ForwardTiling<S, D>;
  using T = Accumulate<S>;
  return SharedMemory::bytes<S>(Tiling::rows * D) +
         SharedMemory::bytes<S>(2 * Tiling::stages * Tiling::N * D) +
         SharedMemory::bytes<T>(Tiling::warps * kWeightsSize<S, Tiling::N, Tiling::R>);
}

// P = 2^(s − maximum) in place of the scores; the row's maximum, its sum (of this lane's columns) and the
// output follow.
template <class T, int N8, int R, int D8>
FASTGAN_DEVICE void soften(T (&scores)[R][N8][4], T (&maximum)[R][2], T (&total)[R][2],
                           T (&output)[R][D8][4]) {
#pragma unroll
  for (int t = 0; t < R; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      T top = maximum[t][h];
#pragma unroll
      for (int j = 0; j < N8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) top = fmax(top, scores[t][j][2 * h + i]);
      top = fmax(top, shuffle_xor(top, 1));
      top = fmax(top, shuffle_xor(top, 2));
      const T subtracted = top == -T(INFINITY) ? T(0) : top;
      const T scale = quick_exp2(maximum[t][h] - subtracted);
      maximum[t][h] = top;
      T sum = 0;
#pragma unroll
      for (int j = 0; j < N8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          T& p = scores[t][j][2 * h + i];
          p = quick_exp2(p - subtracted);
          sum += p;
        }
      total[t][h] = fma(total[t][h], scale, sum);
#pragma unroll
      for (int j = 0; j < D8; ++j) output[t][j][2 * h] *= scale, output[t][j][2 * h + 1] *= scale;
    }
}

template <class S, int D>
__global__ void __launch_bounds__(ForwardTiling<S, D>::threads, 2)
    forward_kernel(AttentionArgs args, Plan plan) {
  using Tiling = ForwardTiling<S, D>;
  using T = Accumulate<S>;
  constexpr int N = Tiling::N, R = Tiling::R, stages = Tiling::stages, threads = Tiling::threads;
  SharedMemory shared;
  S* queries = shared.take<S>(Tiling::rows * D);
  S* tiles = shared.take<S>(2 * stages * N * D);
  constexpr int per_warp = kWeightsSize<S, N, R>;
  const int warp = int(threadIdx.x) / kWarp;
  T* memory = per_warp ? shared.take<T>(Tiling::warps * per_warp) + warp * per_warp : nullptr;

  const RowsOfBlock<Tiling> of(args, plan, args.is_causal);
  const int batch = of.batch, head = of.head, warp_row = of.warp_row;
  const S *key = head_of<S>(args.key, batch, of.kv_head), *value = head_of<S>(args.value, batch, of.kv_head);
  auto load = [&](int tile, int stage) {
    S* to = tiles + stage * 2 * N * D;
    load_tile<S, D, N, threads>(to, args.key, key, tile, args.columns, args.width, plan.vectors);
    load_tile<S, D, N, threads>(to + N * D, args.value, value, tile, args.columns, args.value_width,
                                plan.vectors);
  };

  T output[R][D / 8][4] = {}, maximum[R][2], total[R][2] = {};
#pragma unroll
  for (int t = 0; t < R; ++t) maximum[t][0] = maximum[t][1] = -T(INFINITY);
  load_tile<S, D, Tiling::rows, threads>(queries, args.query, head_of<S>(args.query, batch, head), of.row0,
                                         args.rows, args.width, plan.vectors);
  go_through<stages>(TilesOfKeys<Tiling>(args, plan, of), load, [&](int tile, int stage, bool look) {
    const S* keys = tiles + stage * 2 * N * D;
    // A warp whose rows end before the diagonal has nothing to do here.
    if (!args.is_causal || tile < warp_row + 16 * R) {
      T scores[R][N / 8][4];
      products_of_rows<S, D, N, R>(scores, queries + warp * 16 * R * D, keys);
      finish_scores<false, S>(args, batch, head, warp_row, tile, look, scores);
      soften(scores, maximum, total, output);
      if (args.has_dropout)
        for_each_kept<false, N, R>(args, batch, head, warp_row, tile, [&](int t, int j, int i, bool kept) {
          if (!kept) scores[t][j][i] = 0;
        });
      add_weighted_rows<S, D, N, R>(output, scores, keys + N * D, memory);
    }
  });

  double* logsumexp = args.logsumexp + (int64_t(batch) * args.heads + head) * args.rows;
  const T kept_scale = args.has_dropout ? T(args.kept_scale) : T(1);
  T factor[R][2];
#pragma unroll
  for (int t = 0; t < R; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      T sum = total[t][h];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      const bool dead = sum == T(0);
      factor[t][h] = dead ? T(0) : kept_scale / sum;
      const int row = warp_row + 16 * t + 8 * h + lane_row();
      if (lane_column() == 0 && row < args.rows)
        logsumexp[row] = dead ? -double(INFINITY) : double(maximum[t][h]) * kLn2 + log(double(sum));
    }
  store_tile<S, D, R>(args.output, batch, head, warp_row, args.rows, args.value_width, output, factor);
}

template <class S, int D>
Error forward(const AttentionArgs& args, void* stream) {
  using Tiling = ForwardTiling<S, D>;
  static_assert(forward_shared_bytes<S, D>() <= kMostShared);
  Plan plan{};
  plan.row_blocks = int(ceil_div(args.rows, Tiling::rows));
  plan.vectors = may_use_vectors<S>(args.query, args.width) && may_use_vectors<S>(args.key, args.width) &&
                 may_use_vectors<S>(args.value, args.value_width);
  if (Error error = make_map<S>(args, static_cast<uint8_t*>(args.workspace), plan.map, stream)) return error;
  return launch(forward_kernel<S, D>, args.batch * args.heads * plan.row_blocks, Tiling::threads,
                forward_shared_bytes<S, D>(), stream, args, plan);
}

Error run_forward(const AttentionArgs& args, void* stream) {
  if (Error error = refuse(args)) return error;
  return FASTGAN_ATTENTION_BY_DTYPE(forward);
}

}  // namespace
}  // namespace fastgan

extern "C" const char* fastgan_attention_forward_cuda(const fastgan::AttentionArgs& args, void* stream) {
  return fastgan::run_forward(args, stream);
}

extern "C" int64_t fastgan_attention_workspace_cuda(const fastgan::AttentionArgs& args, bool backward) {
  return fastgan::map_size(args) + (backward ? fastgan::row_numbers_size(args) : 0);
}
