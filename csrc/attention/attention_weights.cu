// Attention on CUDA, the weights for whoever wants to look at them: of each head, or their mean over the
// heads, which is all that leaves the kernel then. Registers: at most 255, no spills (nvcc 13: sm_80, sm_90a,
// sm_100).
//
// P = 2^(s − lse), from the log-sum-exp that the forward has computed. A block has one tile of the result,
// and the heads go by: of each its queries and keys, the next head's by asynchronous copies while this one is
// worked on. Sums over the heads are in registers, in the order of the heads, so that the bits are the same
// in every run. Of a head that the mask hides from the tile nothing is loaded; behind the diagonal a tile is
// written as zeros at once. A dead row's log-sum-exp is minus infinity, plus infinity here, and P exactly 0.
// Dropout is not applied: these are the weights before it, as torch's are.
#include "attention/attention_cuda_blocks.h"

namespace fastgan {
namespace {

// Two stages of queries and keys where they fit in shared memory. R: 16 rows each of a warp.
template <class S, int D>
struct WeightsTiling {
  static constexpr bool warpgroups = false;
  static constexpr int bytes = D * int(sizeof(S));  // of a row
  static constexpr int warps = 4, R = bytes <= 256 && sizeof(S) <= 4 ? 2 : 1;
  static constexpr int N = 128 / int(sizeof(S));
  static constexpr int threads = warps * kWarp, rows = 16 * R * warps;
  static constexpr int stages = 2 * (rows + N) * bytes <= int(kMostShared) ? 2 : 1;
};

// The heads whose weights a tile of the result is made of, `begin` to `end`, of which it sees something.
template <class Tiling>
struct HeadsOfTile {
  using At = int;
  const AttentionArgs& args;
  const TileMap& map;
  int batch, row0, key0, begin, end;
  FASTGAN_DEVICE At first() const { return begin; }
  FASTGAN_DEVICE At after(At at) const { return at + 1; }
  FASTGAN_DEVICE bool has(At at) const { return at < end; }
  FASTGAN_DEVICE At find(At at, int& seen) const {
    for (; at < end; ++at) {
      seen = seen_of(map, args, batch, at, row0, Tiling::rows, key0, Tiling::N);
      if (seen != kNothing) break;
    }
    return at;
  }
};

template <class S, int D>
__global__ void __launch_bounds__(WeightsTiling<S, D>::threads, 2)
    weights_kernel(AttentionArgs args, Plan plan) {
  using Tiling = WeightsTiling<S, D>;
  using T = Accumulate<S>;
  constexpr int N = Tiling::N, R = Tiling::R, stages = Tiling::stages, threads = Tiling::threads;
  SharedMemory shared;
  S* queries = shared.take<S>(stages * Tiling::rows * D);
  S* keys = shared.take<S>(stages * N * D);

  // The block's place: ((batch · heads of the result + head) · row blocks + row block) · key blocks + key
  // block
  const int heads = int(args.heads), results = args.average_weights ? 1 : heads;
  int key_block, row_block, head;
  const int batch = divide(
      divide(divide(int(blockIdx.x), plan.key_blocks, key_block), plan.row_blocks, row_block), results, head);
  const int row0 = row_block * Tiling::rows, key0 = key_block * N;
  const int warp = int(threadIdx.x) / kWarp, warp_row = row0 + warp * 16 * R;
  const int group = args.kv_heads ? heads / int(args.kv_heads) : 1;
  const bool behind = args.is_causal && key0 >= row0 + Tiling::rows;
  const int begin = args.average_weights ? 0 : head, end = args.average_weights ? heads : head + 1;
  const HeadsOfTile<Tiling> tiles{args, plan.map, batch, row0, key0, begin, behind ? begin : end};

  auto load = [&](int at, int stage) {
    load_tile<S, D, Tiling::rows, threads>(queries + stage * Tiling::rows * D, args.query,
                                           head_of<S>(args.query, batch, at), row0, args.rows, args.width,
                                           plan.vectors);
    load_tile<S, D, N, threads>(keys + stage * N * D, args.key, head_of<S>(args.key, batch, at / group), key0,
                                args.columns, args.width, plan.vectors);
  };
  T sums[R][N / 8][4] = {};
  go_through<Tiling>(tiles, load, [&](int at, int stage, bool look) {
    if (args.is_causal && key0 >= warp_row + 16 * R) return;  // this warp's rows end before the diagonal
    T scores[R][N / 8][4];
    products_of_rows<S, D, N, R>(scores, queries + (stage * Tiling::rows + warp * 16 * R) * D,
                                 keys + stage * N * D, args.products);
    const T factor = finish_scores<false, S>(args, batch, at, warp_row, key0, look, scores);
    const double* logsumexp = args.logsumexp + (int64_t(batch) * heads + at) * args.rows;
#pragma unroll
    for (int t = 0; t < R; ++t)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = warp_row + 16 * t + 8 * h + lane_row();
        const double natural = row < args.rows ? logsumexp[row] : -double(INFINITY), exact = natural * kLog2e;
        const bool dead = natural == -double(INFINITY);
        // At scores of 100 a float's step is 1e-5: what rounding took is subtracted as well.
        const T lse = dead ? T(INFINITY) : T(exact), rest = dead ? T(0) : T(exact - double(lse));
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
#pragma unroll
          for (int i = 2 * h; i < 2 * h + 2; ++i)
            sums[t][j][i] += quick_exp2(fma(scores[t][j][i], factor, -lse) - rest);
      }
  });

  const T share = T(1) / T(end - begin);
  const AttentionOutput& x = args.weights;
  S* to = static_cast<S*>(x.data) + int64_t(batch) * x.stride[0] + int64_t(head) * x.stride[1];
  const bool pairs = args.columns % 2 == 0;  // neighbours lie together, aligned
#pragma unroll
  for (int t = 0; t < R; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row + 16 * t + 8 * h + lane_row();
      if (row >= args.rows) continue;
      S* of_row = to + int64_t(row) * x.stride[2];
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const int key = key0 + 8 * j + 2 * lane_column();
        const T pair[2] = {sums[t][j][2 * h] * share, sums[t][j][2 * h + 1] * share};
        if (pairs) {
          if (key < args.columns) store_vector<2>(of_row + key, pair);
        } else {
          if (key < args.columns) narrow(of_row[key], pair[0]);
          if (key + 1 < args.columns) narrow(of_row[key + 1], pair[1]);
        }
      }
    }
}

template <class S, int D>
Error weights(const AttentionArgs& args, void* stream) {
  using Tiling = WeightsTiling<S, D>;
  constexpr size_t shared = SharedMemory::bytes<S>(Tiling::stages * Tiling::rows * D) +
                            SharedMemory::bytes<S>(Tiling::stages * Tiling::N * D);
  static_assert(shared <= kMostShared);
  Plan plan{};
  plan.row_blocks = int(ceil_div(args.rows, Tiling::rows));
  plan.key_blocks = int(ceil_div(args.columns, Tiling::N));
  plan.vectors = may_use_vectors<S>(args.query, args.width) && may_use_vectors<S>(args.key, args.width);
  if (Error error = make_map<S>(args, static_cast<uint8_t*>(args.workspace), plan.map, stream)) return error;
  const int64_t results = args.average_weights ? 1 : args.heads;
  return launch(weights_kernel<S, D>, args.batch * results * plan.row_blocks * plan.key_blocks,
                Tiling::threads, shared, stream, args, plan);
}

Error run_weights(const AttentionArgs& args, void* stream) {
  if (Error error = refuse(args)) return error;
  return FASTGAN_ATTENTION_BY_DTYPE(weights);
}

}  // namespace
}  // namespace fastgan

extern "C" const char* fastgan_attention_weights_cuda(const fastgan::AttentionArgs& args, void* stream) {
  return fastgan::run_weights(args, stream);
}
