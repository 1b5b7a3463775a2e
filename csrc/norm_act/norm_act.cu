// Batch norm and activation on CUDA. Registers: at most 128, no spills (nvcc 13: sm_80, sm_90a, sm_100).
//
// What a thread sees of a call, and what it computes of it, is in norm_act_cuda.h.
//
// Work is in two phases, sums over the items of a channel and then a value for each item. Where a channel is
// small (up to kWholeItems items a thread) one block does both, one launch in all, the second read from the
// cache; or a cluster of blocks, on the GPUs that have them, each of which adds up what all have found, in
// the order of the blocks. A tile of channels_last is narrower there, down to the 32 bytes that memory moves,
// if there were too few blocks otherwise. Elsewhere the items are cut into splits and there are three
// launches: sums of each split, left in scratch; a warp for each channel that adds them up, always in the
// same order, and leaves coefficients; and the values. No atomics and no cleared counter: the bits are the
// same in every run. (Every block of the last adding the sums up for itself is a launch less, and reads them
// as often as there are blocks: with 64 channels beside each other in memory and 256 splits, 260 KB by each
// of 256 blocks.) The last launch goes through the blocks backwards, from what the first has left in the
// cache.
//
// Bytes, forward and backward, of a tensor larger than the cache, in three launches: x is read twice and y
// written, then x and dy read twice and dx written, eight passes. A cluster reads the second time what it has
// just read: 264 blocks at a time have 33 channels of at most 1 MB, or 2 MB with dy, in a cache of 50 MB. A
// thread has six to eight vectors under way, of 16 bytes (of 8 for 16-bit channels_last): 24 to 64 KB a
// processor, where 4 TB/s at 600 ns take 19 KB of each of 132.
#include "norm_act/norm_act_cuda.h"

namespace fastgan {
namespace {

// ---- a channel's sums and values by one block, or one cluster; in evaluation the values of a split ----

// A channel's coefficients are found by one thread and shared: square roots and divisions in double are long,
// and take many registers.
template <class S, int V, bool Last, bool Clustered>
FASTGAN_DEVICE void forward_of_block(const NormActArgs& args, const Plan& plan) {
  using W = Walk<S, V, Last>;
  using T = typename W::T;
  constexpr int K = W::K;
  SharedMemory shared;
  Coefficients<T>* of_tile = shared.take<Coefficients<T>>(plan.columns * K);
  const Where of(plan, int(blockIdx.x), Clustered);
  W walk(args, plan, of.tile);
  Sums joined = {};
  if (Clustered || args.batch_statistics) {
    Sums* memory = shared.take<Sums>(kThreads / kWarp * plan.columns * K);
    Sums moments[K] = {};
    if (walk.is_inside()) walk.moments(of.group, of.split, moments);
    joined = join_rows(moments, plan.columns, memory);
    if constexpr (Clustered) {
      Sums* of_block = shared.take<Sums>(plan.columns * K);
      joined = join_blocks(joined, plan.columns * K, plan.splits, of_block);
    }
  }
  int i = int(threadIdx.x);
  int64_t c = walk.first_channel(of.tile) + i, at = of.group * args.channels + c;
  if (i < plan.columns * K && c < args.channels) {
    Statistics found = {};
    if (Clustered || args.batch_statistics) {
      found = walk.statistics(of.group, c, joined);
      if (!Clustered || of.split == 0) found.store(args, at);
    } else {
      found = {args.mean[at], args.var[at]};
    }
    of_tile[i] = walk.affine(c, found.mean, found.var);
  }
  block_sync();
  if (walk.is_inside()) {
    Coefficients<T> coefficients[K];
    load_coefficients(of_tile, walk.column, coefficients);
    walk.outputs(of.group, of.split, coefficients);
  }
  if constexpr (Clustered) cluster_wait();
}
template <class S, int V, bool Last, bool Clustered>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(NormActArgs args, Plan plan) {
  if constexpr (!Clustered || kHasClusters) forward_of_block<S, V, Last, Clustered>(args, plan);
}

// Weight and bias gradients join all groups: a block, or cluster, that has all of a channel walks through
// them itself.
template <class S, int V, bool Last, bool Clustered>
FASTGAN_DEVICE void backward_of_block(const NormActArgs& args, const Plan& plan, bool needs_sums) {
  using W = Walk<S, V, Last>;
  using T = typename W::T;
  constexpr int K = W::K;
  SharedMemory shared;
  Coefficients<T>* of_tile = shared.take<Coefficients<T>>(plan.columns * K);
  Sums* memory = shared.take<Sums>(kThreads / kWarp * plan.columns * K);
  // Of thread i's channel: registers are scarce.
  ParameterSums* of_parameters = shared.take<ParameterSums>(plan.columns * K);
  Sums* of_block = Clustered ? shared.take<Sums>(plan.columns * K) : nullptr;
  const Where of(plan, int(blockIdx.x), Clustered);
  const bool all_groups = Clustered || plan.whole;
  int group = all_groups ? 0 : int(of.group), end = all_groups ? int(args.groups) : group + 1;
  W walk(args, plan, of.tile);
  int i = int(threadIdx.x);
  int c = int(walk.first_channel(of.tile)) + i;
  bool has_channel = i < plan.columns * K && c < args.channels;
  if (has_channel) of_parameters[i] = {};
  for (; group < end; ++group) {
    const int64_t at = group * args.channels + c;
    Coefficients<T> coefficients[K];
    block_sync();  // the former group's coefficients may still be read
    if (has_channel) of_tile[i] = walk.affine(c, args.mean[at], args.var[at]);
    block_sync();
    if (Clustered || needs_sums) {
      Sums sums[K] = {};
      if (walk.is_inside()) {
        load_coefficients(of_tile, walk.column, coefficients);
        walk.sums(group, of.split, coefficients, sums);
      }
      Sums joined = join_rows(sums, plan.columns, memory);
      if constexpr (Clustered) {
        if (group > 0) cluster_wait();
        joined = join_blocks(joined, plan.columns * K, plan.splits, of_block);
      }
      if (has_channel) {
        of_parameters[i].add(walk, at, of_tile[i], joined);
        walk.gradient(of_tile[i], c, at, joined);
      }
      block_sync();
    }
    if (!args.grad_input || !walk.is_inside()) continue;
    load_coefficients(of_tile, walk.column, coefficients);
    walk.gradients(group, of.split, coefficients);
  }
  if constexpr (Clustered) cluster_wait();
  if (needs_sums && has_channel && (!Clustered || of.split == 0)) of_parameters[i].template store<T>(args, c);
}
template <class S, int V, bool Last, bool Clustered>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(NormActArgs args, Plan plan, bool needs_sums) {
  if constexpr (!Clustered || kHasClusters) backward_of_block<S, V, Last, Clustered>(args, plan, needs_sums);
}

// ---- the same in three launches ----

// The sums of a split.
template <class S, int V, bool Last, bool Backward>
__global__ void __launch_bounds__(kThreads, 2) sums_kernel(NormActArgs args, Plan plan) {
  using W = Walk<S, V, Last>;
  using T = typename W::T;
  constexpr int K = W::K;
  SharedMemory shared;
  Sums* memory = shared.take<Sums>(kThreads / kWarp * plan.columns * K);
  const Where of(plan, int(blockIdx.x));
  W walk(args, plan, of.tile);
  Sums sums[K] = {};
  if constexpr (Backward) {
    Coefficients<T>* of_tile = shared.take<Coefficients<T>>(plan.columns * K);
    int i = int(threadIdx.x);
    int64_t c = walk.first_channel(of.tile) + i, at = of.group * args.channels + c;
    if (i < plan.columns * K && c < args.channels) of_tile[i] = walk.affine(c, args.mean[at], args.var[at]);
    block_sync();
    if (walk.is_inside()) {
      Coefficients<T> coefficients[K];
      load_coefficients(of_tile, walk.column, coefficients);
      walk.sums(of.group, of.split, coefficients, sums);
    }
  } else if (walk.is_inside()) {
    walk.moments(of.group, of.split, sums);
  }
  store_partial(walk, of.group, of.split, of.tile, join_rows(sums, plan.columns, memory));
}

// Between sums and values: a warp for each channel.
template <class S, bool Last, bool Backward>
__global__ void __launch_bounds__(kThreads) prepare_kernel(NormActArgs args, Plan plan) {
  using W = Walk<S, 1, Last>;
  using T = typename W::T;
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t c = int64_t(blockIdx.x) * (kThreads / kWarp) + int(threadIdx.x) / kWarp;
  if (c >= args.channels) return;
  const W walk(args, plan, 0);
  ParameterSums of_parameters;
  for (int64_t group = 0; group < args.groups; ++group) {
    const Sums* from = partials(args, plan, group, c);
    Sums sums = {};
#pragma unroll 4
    for (int split = lane; split < plan.splits; split += kWarp) sums.merge(from[split]);
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2)
      sums.merge({shuffle_xor(sums.first, step), shuffle_xor(sums.second, step)});
    if (lane != 0) continue;
    const int64_t at = group * args.channels + c;
    if (!Backward) walk.statistics(group, c, sums).store(args, at);
    Coefficients<T> out = walk.affine(c, args.mean[at], args.var[at]);
    if (Backward) {
      of_parameters.add(walk, at, out, sums);
      walk.gradient(out, c, at, sums);
    }
    *prepared<T>(args, plan, group, c) = out;
  }
  if (Backward && lane == 0) of_parameters.template store<T>(args, c);
}

// The values of a split, by coefficients that are prepared. From the last block to the first: of a tensor
// larger than the cache, that still has what the sums read last.
template <class S, int V, bool Last, bool Backward>
__global__ void __launch_bounds__(kThreads, 2) values_kernel(NormActArgs args, Plan plan) {
  using W = Walk<S, V, Last>;
  const Where of(plan, int(gridDim.x) - 1 - int(blockIdx.x));
  W walk(args, plan, of.tile);
  if (!walk.is_inside()) return;
  Coefficients<typename W::T> coefficients[W::K];
  load_coefficients(prepared<typename W::T>(args, plan, of.group, walk.channel), 0, coefficients);
  if (Backward)
    walk.gradients(of.group, of.split, coefficients);
  else
    walk.outputs(of.group, of.split, coefficients);
}

template <class R>
__global__ void __launch_bounds__(kThreads) move_kernel(NormActMoveArgs args) {
  int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= args.channels) return;
  for (int which = 0; which < 2; ++which) {
    R& running = static_cast<R*>(args.running[which])[c * args.stride[which]];
    double factor = which == 0 ? 1.0 : args.factor;
    R now = running;
    for (int64_t g = 0; g < args.groups; ++g)
      now = R(double(now) * (1 - args.momentum) +
              args.statistic[which][g * args.channels + c] * (factor * args.momentum));
    running = now;
  }
}

// ---- host ----

template <class S>
constexpr int vector_width(bool channels_last) {
  return channels_last && sizeof(S) == 2 ? 4 : 16 / int(sizeof(S));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kWholeItems = 32;  // items a thread, up to which one block does a channel alone
constexpr int kSplitItems = 8;   // items a thread, of a split, at least
constexpr int kBlocks = 1056;    // of a launch, at most: four for each place that 132 processors have
constexpr int kFewBlocks = 128;  // of clusters, below which a tile is narrower

bool clusters_run() {
  constexpr size_t most = 16 * 1024;  // of shared memory
  return runs_clusters(forward_kernel<float, 4, true, true>, kMostBlocks, kThreads, most);
}

// A tile is one channel or, of channels_last, `bytes` wide.
template <class S>
void set_tiles(const NormActArgs& args, int width, int bytes, Plan& plan) {
  plan.columns = 1;
  if (args.channels_last)
    while (plan.columns * width * int(sizeof(S)) < bytes && plan.columns * width < args.channels &&
           plan.columns < kWarp)
      plan.columns *= 2;
  plan.rows = kThreads / plan.columns;
  plan.tiles = int(args.channels_last ? ceil_div(args.channels, plan.columns * width) : args.channels);
}

// Whether clusters take a call whose plan has its items: as many blocks as have something to do.
template <class S>
bool plan_clusters(const NormActArgs& args, int width, Plan& plan) {
  Plan tried = plan;
  for (int bytes = 128; bytes >= 32 && plan.tiles * int64_t(plan.splits) < kFewBlocks; bytes /= 2) {
    set_tiles<S>(args, width, bytes, tried);
    int blocks = kMostBlocks;
    while (blocks > 1 && tried.items < int64_t(kSplitItems) * tried.rows * blocks) blocks /= 2;
    if (blocks == 1 || tried.items > int64_t(kWholeItems) * tried.rows * blocks) continue;
    if (tried.tiles * blocks <= plan.tiles * plan.splits) continue;  // `splits` is 0 at first
    tried.split_items = ceil_div(tried.items, blocks), tried.splits = blocks, tried.clustered = true;
    plan = tried;
  }
  return plan.clustered;
}

template <class S>
Plan plan_of(const NormActArgs& args, bool may_use_vectors) {
  Plan plan{};
  plan.group_images = args.batch / args.groups;
  int64_t rows_of_group = plan.group_images * args.spatial;
  int width = vector_width<S>(args.channels_last);
  int64_t run = args.channels_last ? args.channels : args.spatial, bytes = width * int64_t(sizeof(S));
  plan.vectors = may_use_vectors && run % width == 0 && is_aligned(args.input, bytes) &&
                 is_aligned(args.output, bytes) && is_aligned(args.grad_output, bytes) &&
                 is_aligned(args.grad_input, bytes);
  if (!plan.vectors) width = 1;
  set_tiles<S>(args, width, 128, plan);
  plan.items = args.channels_last ? rows_of_group : rows_of_group / width;
  plan.whole = plan.items <= int64_t(kWholeItems) * plan.rows;
  if (args.batch_statistics && !plan.whole && plan.vectors && clusters_run() &&
      plan_clusters<S>(args, width, plan))
    return plan;
  int64_t splits = plan.whole ? 1 : ceil_div(plan.items, int64_t(kSplitItems) * plan.rows);
  int64_t most = kBlocks / (plan.tiles * args.groups);
  if (splits > most) splits = most < 1 ? 1 : most;
  plan.split_items = ceil_div(plan.items, splits);
  plan.splits = int(ceil_div(plan.items, plan.split_items));
  return plan;
}

template <class S, int V, bool Last, bool Backward>
Error in_three(const NormActArgs& args, const Plan& plan, void* stream) {
  using W = Walk<S, V, Last>;
  const int64_t grid = args.groups * plan.splits * plan.tiles;
  const size_t shared =
      join_bytes(plan.columns, W::K) +
      (Backward ? SharedMemory::bytes<Coefficients<typename W::T>>(plan.columns * W::K) : 0);
  Error error = launch(sums_kernel<S, V, Last, Backward>, grid, kThreads, shared, stream, args, plan);
  if (!error)
    error = launch(prepare_kernel<S, Last, Backward>, ceil_div(args.channels, kThreads / kWarp), kThreads, 0,
                   stream, args, plan);
  if (error || (Backward && !args.grad_input)) return error;
  return launch(values_kernel<S, V, Last, Backward>, grid, kThreads, 0, stream, args, plan);
}

template <class S, int V, bool Last>
Error forward(const NormActArgs& args, const Plan& plan, void* stream) {
  using W = Walk<S, V, Last>;
  if (args.batch_statistics && !plan.in_one()) return in_three<S, V, Last, false>(args, plan, stream);
  const int64_t grid = args.groups * plan.splits * plan.tiles;
  const size_t shared = SharedMemory::bytes<Coefficients<typename W::T>>(plan.columns * W::K) +
                        (args.batch_statistics ? join_bytes(plan.columns, W::K) : size_t(0));
  if constexpr (V > 1)
    if (plan.clustered)
      return launch_clusters(forward_kernel<S, V, Last, true>, grid, plan.splits, kThreads,
                             shared + SharedMemory::bytes<Sums>(plan.columns * W::K), stream, args, plan);
  return launch(forward_kernel<S, V, Last, false>, grid, kThreads, shared, stream, args, plan);
}

template <class S, int V, bool Last>
Error backward(const NormActArgs& args, const Plan& plan, void* stream) {
  using W = Walk<S, V, Last>;
  const bool needs_sums = args.grad_weight || args.grad_bias || (args.grad_input && args.batch_statistics);
  if (needs_sums && !plan.in_one()) return in_three<S, V, Last, true>(args, plan, stream);
  const size_t shared = SharedMemory::bytes<Coefficients<typename W::T>>(plan.columns * W::K) +
                        join_bytes(plan.columns, W::K) +
                        SharedMemory::bytes<ParameterSums>(plan.columns * W::K);
  if constexpr (V > 1)
    if (plan.clustered)
      return launch_clusters(backward_kernel<S, V, Last, true>, int64_t(plan.splits) * plan.tiles,
                             plan.splits, kThreads, shared + SharedMemory::bytes<Sums>(plan.columns * W::K),
                             stream, args, plan, needs_sums);
  const int64_t grid = (plan.whole ? 1 : args.groups) * plan.splits * plan.tiles;
  return launch(backward_kernel<S, V, Last, false>, grid, kThreads, shared, stream, args, plan, needs_sums);
}

template <class S>
Error run(const NormActArgs& args, void* stream, bool is_backward) {
  Plan plan = plan_of<S>(args, true);
  if (plan.items > 0x7fffffff) return "a channel has more than 2^31 values";
  constexpr int last = vector_width<S>(true), planes = vector_width<S>(false);
#define FASTGAN_BY_WIDTH(V, Last) \
  (is_backward ? backward<S, V, Last>(args, plan, stream) : forward<S, V, Last>(args, plan, stream))
  if (args.channels_last) return plan.vectors ? FASTGAN_BY_WIDTH(last, true) : FASTGAN_BY_WIDTH(1, true);
  return plan.vectors ? FASTGAN_BY_WIDTH(planes, false) : FASTGAN_BY_WIDTH(1, false);
#undef FASTGAN_BY_WIDTH
}

Error by_dtype(const NormActArgs& args, void* stream, bool is_backward) {
  switch (args.dtype) {
    case Dtype::float32:
      return run<float>(args, stream, is_backward);
    case Dtype::float64:
      return run<double>(args, stream, is_backward);
    case Dtype::bfloat16:
      return run<bfloat16>(args, stream, is_backward);
    case Dtype::float16:
      return run<float16>(args, stream, is_backward);
  }
  return "no such dtype";
}

}  // namespace
}  // namespace fastgan

extern "C" const char* fastgan_norm_act_forward_cuda(const fastgan::NormActArgs& args, void* stream) {
  return fastgan::by_dtype(args, stream, false);
}

extern "C" const char* fastgan_norm_act_backward_cuda(const fastgan::NormActArgs& args, void* stream) {
  return fastgan::by_dtype(args, stream, true);
}

extern "C" const char* fastgan_norm_act_move_cuda(const fastgan::NormActMoveArgs& args, void* stream) {
  using namespace fastgan;
  int64_t grid = ceil_div(args.channels, kThreads);
  if (args.dtype == Dtype::float64) return launch(move_kernel<double>, grid, kThreads, 0, stream, args);
  return launch(move_kernel<float>, grid, kThreads, 0, stream, args);
}

extern "C" int64_t fastgan_norm_act_scratch_cuda(const fastgan::NormActArgs& args) {
  using namespace fastgan;
  int64_t splits = 0;  // of the plan with or without vectors: which it will be, the pointers tell
  for (bool vectors : {false, true}) {
    bool half = args.dtype == Dtype::bfloat16 || args.dtype == Dtype::float16;
    Plan plan = args.dtype == Dtype::float64 ? plan_of<double>(args, vectors)
                : half                       ? plan_of<bfloat16>(args, vectors)
                                             : plan_of<float>(args, vectors);
    if (!plan.in_one() && plan.splits > splits) splits = plan.splits;
  }
  return splits ? args.groups * args.channels * (2 * splits + 5) : 0;  // five coefficients
}
