// Attention on CUDA, forward. Registers: at most 255, no spills (nvcc 13: sm_80, sm_90a, sm_100).
//
// A block has up to 128 query rows of one head, a warp 16 or 32 of them, and goes through the keys in tiles
// of 16 to 128: scores (in registers), running row maximum m, P = 2^(s − m), output ← output · 2^(old m − m)
// + P · values. At the end the output is divided by the row sums. Products are in attention_cuda_products.h:
// tensor cores for 16-bit elements with float32 sums, and for floats in three terms or by choice one; fused
// multiply-adds for double, and for floats of wide heads or where they shall be exact; on sm_90a
// 16-bit heads up to 128 wide go by warpgroups (attention_cuda_warpgroups.h), in the backward too. Keys and
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
//
// Few rows and many keys are cut by the keys, into a number of parts that the number of multiprocessors has a
// say in (attention_cuda_parts.h): a block of parts_kernel has one part and leaves its output undivided, its
// rows' maxima and sums; join_kernel scales them to the greatest maximum and adds them up, part after part. A
// part of which a row sees nothing has maximum minus infinity and adds 0.
//
// Packed sequences (attention.h) have instances of the kernels of their own, with a grid for the longest: a
// block beyond the end of its sequence leaves at once.
#include "attention/attention_cuda_blocks.h"
#include "attention/attention_cuda_parts.h"

namespace fastgan {
namespace {

template <class S, int D, class Tiling>
constexpr size_t forward_shared_bytes() {
  using T = Accumulate<S>;
  return SharedMemory::bytes<S>(Tiling::rows * D) +
         SharedMemory::bytes<S>(2 * Tiling::stages * Tiling::N * D) +
         SharedMemory::bytes<T>(Tiling::warps * kWeightsSize<S, Tiling::N, Tiling::R>);
}

// P = 2^(s factor − maximum) in place of the scores s; the row's maximum, its sum (of this lane's columns)
// and the output follow.
template <class T, int N8, int R, int D8>
FASTGAN_DEVICE void soften(T (&scores)[R][N8][4], T factor, T (&maximum)[R][2], T (&total)[R][2],
                           T (&output)[R][D8][4]) {
#pragma unroll
  for (int t = 0; t < R; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      T top = -T(INFINITY);
#pragma unroll
      for (int j = 0; j < N8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) top = fmax(top, scores[t][j][2 * h + i]);
      top = fmax(top, shuffle_xor(top, 1));
      top = fmax(maximum[t][h], fmax(top, shuffle_xor(top, 2)) * factor);
      const T subtracted = top == -T(INFINITY) ? T(0) : top;
      const T scale = quick_exp2(maximum[t][h] - subtracted);
      maximum[t][h] = top;
      T sum = 0;
#pragma unroll
      for (int j = 0; j < N8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          T& p = scores[t][j][2 * h + i];
          p = quick_exp2(fma(p, factor, -subtracted));
          sum += p;
        }
      total[t][h] = fma(total[t][h], scale, sum);
#pragma unroll
      for (int j = 0; j < D8; ++j) output[t][j][2 * h] *= scale, output[t][j][2 * h + 1] *= scale;
    }
}

// Σ P values of a block's rows and of the keys of its tiles; the rows' maxima and, of a lane's columns, their
// sums. `Few`: rows of which a warp may have none, and not causal. `args` are those of the block's sequence,
// made again for every tile from the call's, which are `given`: registers are scarce.
template <bool Few, bool Packed, class S, int D, class Tiling, class T = Accumulate<S>>
FASTGAN_DEVICE void attend(const AttentionArgs& given, const AttentionArgs& args, const Plan& plan,
                           const RowsOfBlock<Tiling>& of, const TilesOfKeys<Tiling>& tiles,
                           T (&output)[Tiling::R][D / 8][4], T (&maximum)[Tiling::R][2],
                           T (&total)[Tiling::R][2]) {
  constexpr int N = Tiling::N, R = Tiling::R, stages = Tiling::stages, threads = Tiling::threads;
  constexpr bool panels = Tiling::warpgroups;
  SharedMemory shared;
  S* queries = shared.take<S>(Tiling::rows * D);
  S* pairs = shared.take<S>(2 * stages * N * D);
  constexpr int per_warp = kWeightsSize<S, N, R>;
  const int warp = int(threadIdx.x) / kWarp;
  T* memory = per_warp ? shared.take<T>(Tiling::warps * per_warp) + warp * per_warp : nullptr;

  const int batch = of.batch, head = of.head, warp_row = of.warp_row,
            behind = of.row0 + together<Tiling>() + kTogether<Tiling>;  // the rows multiplied together
  auto load = [&](int tile, int stage) {
    const AttentionArgs& now = sequence_of<Packed, S>(given, batch);
    S* to = pairs + stage * 2 * N * D;
    load_tile<S, D, N, threads, panels>(to, now.key, head_of<S>(now.key, batch, of.kv_head), tile,
                                        now.columns, now.width, plan.vectors);
    load_tile<S, D, N, threads, panels>(to + N * D, now.value, head_of<S>(now.value, batch, of.kv_head), tile,
                                        now.columns, now.value_width, plan.vectors);
  };
#pragma unroll
  for (int t = 0; t < R; ++t) maximum[t][0] = maximum[t][1] = -T(INFINITY);
  load_tile<S, D, Tiling::rows, threads, panels>(queries, args.query, head_of<S>(args.query, batch, head),
                                                 of.row0, args.rows, args.width, plan.vectors);
  go_through<Tiling>(tiles, load, [&](int tile, int stage, bool look) {
    const AttentionArgs& now = sequence_of<Packed, S>(given, batch);
    const S* keys = pairs + stage * 2 * N * D;
    // Whose rows end before the diagonal has nothing to do here, nor a warp of few rows that has none.
    if (Few ? warp_row < args.rows : !args.is_causal || tile < behind + int(now.diagonal)) {
      T scores[R][N / 8][4];
      start_products<S, D, Tiling>(scores, queries, keys, args.products);
      finish_products<Tiling>(scores);
      constexpr bool later = kScalesLater<S, Tiling>;
      const T factor = finish_scores<false, S, later>(now, batch, head, warp_row, tile, look, scores);
      soften(scores, factor, maximum, total, output);
      if (args.has_dropout)
        for_each_kept<false, N, R>(args, batch, head, warp_row, tile, [&](int t, int j, int i, bool kept) {
          if (!kept) scores[t][j][i] = 0;
        });
      add_weighted<S, D, Tiling>(output, scores, keys + N * D, memory, args.products);
    }
  });
}

// A row's sum over its four lanes.
template <class T>
FASTGAN_DEVICE T sum_of_row(T sum) {
  sum += shuffle_xor(sum, 1);
  return sum + shuffle_xor(sum, 2);
}

// Of a row: what its output has to be multiplied by. Dead: nothing takes part in it.
template <class T>
FASTGAN_DEVICE T finish_row(const AttentionArgs& args, double* logsumexp, bool writes, T maximum, T sum) {
  const bool dead = sum == T(0);
  if (writes) *logsumexp = dead ? -double(INFINITY) : double(maximum) * kLn2 + log(double(sum));
  return dead ? T(0) : (args.has_dropout ? T(args.kept_scale) : T(1)) / sum;
}

// Packed sequences have no map, which the compiler shall know: its code would take registers.
template <bool Packed>
FASTGAN_DEVICE decltype(auto) plan_of_sequence(const Plan& plan) {
  if constexpr (!Packed) {
    return (plan);
  } else {
    Plan one = plan;
    one.map.cells = nullptr;
    return one;
  }
}

template <class S, int D, class Tiling, bool Packed>
FASTGAN_DEVICE void forward_of_block(const AttentionArgs& given, const Plan& of_call) {
  using T = Accumulate<S>;
  constexpr int R = Tiling::R;
  const Plan& plan = plan_of_sequence<Packed>(of_call);
  const RowsOfBlock<Tiling> of(given, plan, given.is_causal);
  const AttentionArgs& args = sequence_of<Packed, S>(given, of.batch);
  if (Packed && of.row0 >= args.rows) return;
  T output[R][D / 8][4] = {}, maximum[R][2], total[R][2] = {}, factor[R][2];
  attend<false, Packed, S, D, Tiling>(given, args, plan, of, TilesOfKeys<Tiling>(args, plan, of), output,
                                      maximum, total);
  const AttentionArgs& now = sequence_of<Packed, S>(given, of.batch);
  double* logsumexp = now.logsumexp + rows_before(now, of.batch, of.head);
#pragma unroll
  for (int t = 0; t < R; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = of.warp_row + 16 * t + 8 * h + lane_row();
      factor[t][h] = finish_row(now, logsumexp + row, lane_column() == 0 && row < now.rows, maximum[t][h],
                                sum_of_row(total[t][h]));
    }
  store_tile<S, D, R>(now.output, of.batch, of.head, of.warp_row, now.rows, now.value_width, output, factor);
}

template <class S, int D, class Tiling, bool Packed>
__global__ void __launch_bounds__(Tiling::threads, Tiling::blocks)
    forward_kernel(AttentionArgs args, Plan plan) {
  if constexpr (kCompiled<S, D, Tiling>) forward_of_block<S, D, Tiling, Packed>(args, plan);
}

// ---- in parts ----

// In the workspace: outputs (parts, batch · heads · rows, value_width), then maxima and sums, (parts, batch ·
// heads · rows) each.
template <class T>
struct PartsOfRows {
  T *outputs, *maxima, *sums;
  int64_t rows;  // of a part
  FASTGAN_DEVICE PartsOfRows(const AttentionArgs& args, const Plan& plan)
      : rows(args.batch * args.heads * args.rows) {
    outputs = static_cast<T*>(args.workspace);
    maxima = outputs + plan.parts * rows * args.value_width;
    sums = maxima + plan.parts * rows;
  }
};

// A block's place: ((batch · heads + head) · row blocks + row block) · parts + part.
template <class S, int D>
__global__ void __launch_bounds__(PartTiling<S, D>::threads, 2) parts_kernel(AttentionArgs args, Plan plan) {
  using Tiling = PartTiling<S, D>;
  using T = Accumulate<S>;
  int part;
  const int number = divide(int(blockIdx.x), plan.parts, part);
  const RowsOfBlock<Tiling> of(args, plan, false, number);
  TilesOfKeys<Tiling> tiles(args, plan, of);
  tiles.begin = part * plan.part_keys;
  if (tiles.begin + plan.part_keys < tiles.end) tiles.end = tiles.begin + plan.part_keys;
  T output[1][D / 8][4] = {}, maximum[1][2], total[1][2] = {};
  attend<true, false, S, D, Tiling>(args, args, plan, of, tiles, output, maximum, total);

  const PartsOfRows<T> to(args, plan);
  const int64_t first = part * to.rows + (int64_t(of.batch) * args.heads + of.head) * args.rows;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = of.warp_row + 8 * h + lane_row();
    const T sum = sum_of_row(total[0][h]);
    if (lane_column() != 0 || row >= args.rows) continue;
    to.maxima[first + row] = maximum[0][h];
    to.sums[first + row] = sum;
  }
  AttentionOutput x;
  x.data = to.outputs + first * args.value_width;
  x.stride[2] = args.value_width;
  const T one[1][2] = {{T(1), T(1)}};
  store_tile<S, D, 1, T>(x, 0, 0, of.warp_row, args.rows, args.value_width, output, one);
}

constexpr int kJoinThreads = 128;

// A block for each row: every warp finds the greatest maximum and the sum, a thread a part's share of it, and
// then a column of the output.
template <class S>
__global__ void __launch_bounds__(kJoinThreads) join_kernel(AttentionArgs args, Plan plan) {
  using T = Accumulate<S>;
  SharedMemory shared;
  T* shares = shared.take<T>(int(kMostParts));
  const PartsOfRows<T> from(args, plan);
  const int64_t row = blockIdx.x;
  const int thread = int(threadIdx.x), lane = thread % kWarp;
  T top = -T(INFINITY);
  for (int part = lane; part < plan.parts; part += kWarp)
    top = fmax(top, from.maxima[part * from.rows + row]);
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) top = fmax(top, shuffle_xor(top, step));
  const T subtracted = top == -T(INFINITY) ? T(0) : top;
  T sum = 0;
  for (int part = lane; part < plan.parts; part += kWarp) {
    const int64_t at = part * from.rows + row;
    sum = fma(quick_exp2(from.maxima[at] - subtracted), from.sums[at], sum);
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) sum += shuffle_xor(sum, step);
  const T factor = finish_row(args, args.logsumexp + row, thread == 0, top, sum);
  for (int part = thread; part < plan.parts; part += kJoinThreads)
    shares[part] = quick_exp2(from.maxima[part * from.rows + row] - subtracted) * factor;
  block_sync();

  int in_head, head;
  const int batch = divide(divide(int(row), int(args.rows), in_head), int(args.heads), head);
  const AttentionOutput& x = args.output;
  S* to = static_cast<S*>(x.data) + batch * x.stride[0] + head * x.stride[1] + in_head * x.stride[2];
  for (int column = thread; column < args.value_width; column += kJoinThreads) {
    const T* output = from.outputs + row * args.value_width + column;
    T out = 0;
#pragma unroll 8
    for (int part = 0; part < plan.parts; ++part)
      out = fma(shares[part], output[part * from.rows * args.value_width], out);
    narrow(to[column], out);
  }
}

template <class S, int D, class Tiling, bool Packed>
Error launch_forward(const AttentionArgs& args, Plan plan, void* stream) {
  constexpr size_t shared = forward_shared_bytes<S, D, Tiling>();
  static_assert(shared <= kMostSharedOf<Tiling>);
  plan.row_blocks = int(ceil_div(args.rows, Tiling::rows));
  return launch(forward_kernel<S, D, Tiling, Packed>, args.batch * args.heads * plan.row_blocks,
                Tiling::threads, shared, stream, args, plan);
}

template <class S, int D, bool Packed>
Error whole_forward(const AttentionArgs& args, const Plan& plan, void* stream) {
  if constexpr (kWarpgroups<S, D>) {
    if (was_compiled(forward_kernel<S, D, ForwardWarpgroups<D>, Packed>))
      return launch_forward<S, D, ForwardWarpgroups<D>, Packed>(args, plan, stream);
  }
  return launch_forward<S, D, ForwardTiling<S, D>, Packed>(args, plan, stream);
}

template <class S, int D>
Error forward(const AttentionArgs& args, void* stream) {
  using OfParts = PartTiling<S, D>;
  constexpr size_t shared_of_parts = forward_shared_bytes<S, D, OfParts>();
  static_assert(shared_of_parts <= kMostShared);
  static_assert(kFewRows % OfParts::N == 0);  // no tile crosses from one part to the next
  const Parts parts = parts_of(args, multiprocessors());
  Plan plan{};
  plan.vectors = may_use_vectors<S>(args.query, args.width) && may_use_vectors<S>(args.key, args.width) &&
                 may_use_vectors<S>(args.value, args.value_width);
  auto* map = static_cast<uint8_t*>(args.workspace) + parts_size(args, parts);
  if (Error error = make_map<S>(args, map, plan.map, stream)) return error;
  if (parts.count == 1)
    return args.row_offset ? whole_forward<S, D, true>(args, plan, stream)
                           : whole_forward<S, D, false>(args, plan, stream);
  plan.row_blocks = int(ceil_div(args.rows, OfParts::rows));
  plan.parts = int(parts.count), plan.part_keys = int(parts.keys);
  if (Error error = launch(parts_kernel<S, D>, args.batch * args.heads * plan.row_blocks * parts.count,
                           OfParts::threads, shared_of_parts, stream, args, plan))
    return error;
  return launch(join_kernel<InMemory<S>>, args.batch * args.heads * args.rows, kJoinThreads,
                SharedMemory::bytes<Accumulate<S>>(int(kMostParts)), stream, args, plan);
}

Error run_forward(const AttentionArgs& given, void* stream) {
  if (Error error = refuse(given)) return error;
  const AttentionArgs args = fold_group(given);
  return FASTGAN_ATTENTION_BY_DTYPE(forward);
}

}  // namespace
}  // namespace fastgan

extern "C" const char* fastgan_attention_forward_cuda(const fastgan::AttentionArgs& args, void* stream) {
  return fastgan::run_forward(args, stream);
}

extern "C" int64_t fastgan_attention_workspace_cuda(const fastgan::AttentionArgs& args, bool backward) {
  using namespace fastgan;
  if (backward) return map_size(args) + row_numbers_size(args);
  if (!args.output.data) return map_size(args);  // not the forward
  const AttentionArgs folded = fold_group(args);
  return map_size(folded) + parts_size(folded, parts_of(folded, multiprocessors()));
}
