// Batch norm and activation on CUDA. Registers: at most 128, no spills (nvcc 13: sm_80, sm_90a, sm_100).
//
// One kernel for both layouts and both directions. A block has 256 threads: X columns of channels and 256 / X
// rows. In (batch, spatial, channels) a thread owns V neighbouring channels, one vector of each row that it
// visits, and X columns make 128 bytes, so that a warp reads whole lines of memory. In (batch, channels,
// spatial) a block owns one channel, X is 1, and the threads take neighbouring vectors of its planes.
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
//
// Numerics: as the CPU kernel (norm_act_cpu.cpp). A thread takes a chunk of values into registers, and sums
// squares about the chunk's own mean; beyond a chunk all sums are in double and about one pivot, the
// channel's first value, so that they are simply added. That value being one of n, the variance is at least
// its distance from the mean squared over n, and the final difference loses no more than log2(n) of 53 bits.
// The sums of a backward are in the accumulate type within a chunk, double beyond it. The output is fma(x -
// float(mean), scale, shift) with the mean's rest in the shift; the mask is recomputed by the same two
// instructions.
#include "norm_act/norm_act.h"

#include "common/cuda_cluster.h"
#include "common/cuda_types.h"

namespace fastgan {
namespace {

constexpr int kThreads = 256;
constexpr int kWholeItems = 32;   // items a thread, up to which one block does a channel alone
constexpr int kSplitItems = 8;    // items a thread, of a split, at least
constexpr int kBlocks = 1056;     // of a launch, at most: four for each place that 132 processors have
constexpr int kFewBlocks = 128;   // of clusters, below which a tile is narrower
constexpr int kMostChannels = 4;  // of a thread

// How a call is cut: from shapes, alignment and whether the GPU has clusters. An item is a vector of V
// elements.
struct Plan {
  int columns, rows;     // of threads; columns is X above
  int tiles;             // of channels
  int splits;            // of the items
  int64_t items;         // of a channel (or of a tile's row) in a group
  int64_t split_items;   // the last split may have fewer
  bool vectors;          // V elements an item; one otherwise
  int64_t group_images;  // the batch of a group
  bool whole;            // both phases in one launch by one block
  bool clustered;        // or by a cluster of `splits` blocks
};

template <class S>
constexpr int vector_width(bool channels_last) {
  return channels_last && sizeof(S) == 2 ? 4 : 16 / int(sizeof(S));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Two sums over a channel. Forward: of x - pivot and of its square, the pivot being the channel's first value
// in the group. Backward: of dz, and of dz (x - T(mean)).
struct alignas(16) Sums {
  double first, second;
  FASTGAN_DEVICE void merge(const Sums& other) {
    first += other.first;
    second += other.second;
  }
};

struct Statistics {
  double mean, var;
  FASTGAN_DEVICE void store(const NormActArgs& args, int64_t at) const {
    args.mean[at] = mean, args.var[at] = var;
  }
};

// z = (x - mean) * scale + shift; dx = dz * scale - (x - mean) * along - constant
template <class T>
struct Coefficients {
  T mean, scale, shift, along, constant;
};

template <class T>
FASTGAN_DEVICE T preactivation(T x, const Coefficients<T>& c) {
  return fma(x - c.mean, c.scale, c.shift);
}
// By selections alone: a branch for each value, though all threads take the same, costs more than it skips.
// `none` is a slope of one. The comparisons keep a NaN.
template <class T>
struct Act {
  bool is_relu;
  T slope;
  FASTGAN_DEVICE explicit Act(const NormActArgs& args)
      : is_relu(args.act == Activation::relu),
        slope(args.act == Activation::leaky_relu ? T(args.negative_slope) : T(1)) {}
  FASTGAN_DEVICE T operator()(T z) const {
    T other = z > T(0) ? z : z * slope;
    return is_relu & (z < T(0)) ? T(0) : other;
  }
  FASTGAN_DEVICE T masked(T grad, T z) const {
    T other = z > T(0) ? grad : grad * slope;
    return is_relu & (z <= T(0)) ? T(0) : other;
  }
};

// What one thread sees of a call: its channels, its items, and the ways to their memory.
template <class S, int V, bool Last>
struct Walk {
  using T = Accumulate<S>;
  static constexpr int K = Last ? V : 1;                                              // channels of a thread
  static constexpr int U = 8 / (sizeof(T) == 8 ? 2 : 1) / (!Last && V == 8 ? 2 : 1);  // items of a chunk
  static constexpr int G = V == 4 ? 3 : U > 1 ? U / 2 : 1;  // where two tensors are read
  static_assert(K <= kMostChannels);

  const NormActArgs& args;
  const Plan& plan;
  int column, row;
  int64_t channel;  // the first of K; those beyond the last are not touched

  FASTGAN_DEVICE Walk(const NormActArgs& a, const Plan& p, int tile) : args(a), plan(p) {
    column = int(threadIdx.x) % p.columns, row = int(threadIdx.x) / p.columns;
    channel = first_channel(tile) + column * K;
  }
  FASTGAN_DEVICE int64_t first_channel(int tile) const { return int64_t(tile) * plan.columns * K; }
  FASTGAN_DEVICE bool is_inside() const { return channel < args.channels; }
  FASTGAN_DEVICE int64_t group_images() const { return plan.group_images; }
  FASTGAN_DEVICE double count() const { return double(group_images()) * double(args.spatial); }

  // Where an item of a group lies. In planes, a division an item: memory waits longer. There are fewer than
  // 2^31 items (the host looks), and a division in 64 bits would be a call.
  FASTGAN_DEVICE int64_t offset(int64_t group, int64_t item) const {
    if (Last) return (group * group_images() * args.spatial + item) * args.channels + channel;
    uint32_t per_plane = uint32_t(args.spatial / V), plane = uint32_t(item) / per_plane;
    return ((group * group_images() + plane) * args.channels + channel) * args.spatial +
           int64_t(uint32_t(item) - plane * per_plane) * V;
  }

  // The channel's first value in a group, about which the sums of a forward are.
  FASTGAN_DEVICE double pivot(int64_t group, int64_t c) const {
    int64_t image = group * group_images() * args.channels * args.spatial;
    return double(widen(static_cast<const S*>(args.input)[image + (Last ? c : c * args.spatial)]));
  }

  // Which of the thread's channels element e of a vector belongs to.
  static FASTGAN_DEVICE int owner(int e) { return Last ? e : 0; }

  FASTGAN_DEVICE void range(int split, int64_t& begin, int64_t& end) const {
    begin = split * plan.split_items;
    end = begin + plan.split_items < plan.items ? begin + plan.split_items : plan.items;
  }

  // Where up to N items from `first` on lie, a block's rows apart, and how many there are: in (batch,
  // spatial, channels) a step apart, otherwise anywhere.
  template <int N>
  struct Chunk {
    int items;
    int64_t at[Last ? 1 : N], step;
    FASTGAN_DEVICE Chunk(const Walk& walk, int64_t group, int64_t first, int64_t end) {
      step = walk.plan.rows * walk.args.channels, items = 0;
      if (Last) at[0] = walk.offset(group, first);
#pragma unroll
      for (int u = 0; u < N; ++u) {
        int64_t item = first + int64_t(u) * walk.plan.rows;
        if (item >= end) continue;
        if (!Last) at[Last ? 0 : u] = walk.offset(group, item);
        items = u + 1;
      }
    }
    FASTGAN_DEVICE int64_t operator[](int u) const { return Last ? at[0] + u * step : at[Last ? 0 : u]; }
    // All loads of a chunk come before the first use: enough are under way to fill the memory's latency.
    FASTGAN_DEVICE void load(const S* from, T (&values)[N][V]) const {
#pragma unroll
      for (int u = 0; u < N; ++u)
        if (u < items) load_vector<V>(from + (*this)[u], values[u]);
    }
  };

  // Of the values about the pivots; each chunk about its own mean first, in which nothing cancels.
  FASTGAN_DEVICE void moments(int64_t group, int split, Sums (&out)[K]) const {
    const S* x = static_cast<const S*>(args.input);
    T pivots[V];
    load_vector<V>(x + offset(group, 0), pivots);
    int64_t begin, end;
    range(split, begin, end);
#pragma unroll 1
    for (int64_t first = begin + row; first < end; first += int64_t(U) * plan.rows) {
      T values[U][V];
      const Chunk<U> at(*this, group, first, end);
      at.load(x, values);
      T number = T(at.items * (Last ? 1 : V)), inverse = quick_divide(T(1), number);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        T mean = values[0][k], sum = 0, s1 = 0, s2 = 0;
#pragma unroll
        for (int u = 0; u < U; ++u)
#pragma unroll
          for (int e = 0; e < V; ++e)
            if (owner(e) == k && u < at.items) sum += values[u][e] - mean;
        mean += sum * inverse;
#pragma unroll
        for (int u = 0; u < U; ++u)
#pragma unroll
          for (int e = 0; e < V; ++e)
            if (owner(e) == k && u < at.items) {
              T d = values[u][e] - mean;
              s1 += d;
              s2 = fma(d, d, s2);
            }
        // The mean is rounded; s1 is what is left of it, `number` times.
        double apart = double(mean) - double(pivots[k]), along = double(s1);
        out[k].first += fma(double(number), apart, along);
        out[k].second += fma(apart, fma(double(number), apart, 2 * along), double(s2));
      }
    }
  }

  FASTGAN_DEVICE void sums(int64_t group, int split, const Coefficients<T> (&c)[K], Sums (&out)[K]) const {
    const S *x = static_cast<const S*>(args.input), *dy = static_cast<const S*>(args.grad_output);
    const Act<T> act(args);
    int64_t begin, end;
    range(split, begin, end);
#pragma unroll 1
    for (int64_t first = begin + row; first < end; first += int64_t(G) * plan.rows) {
      T values[G][V], grads[G][V], dz[K] = {}, along[K] = {};
      const Chunk<G> at(*this, group, first, end);
      at.load(x, values);
      at.load(dy, grads);
#pragma unroll
      for (int u = 0; u < G; ++u)
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const int k = owner(e);
          if (u >= at.items) continue;
          T d = act.masked(grads[u][e], preactivation(values[u][e], c[k]));
          dz[k] += d;
          along[k] = fma(d, values[u][e] - c[k].mean, along[k]);
        }
#pragma unroll
      for (int k = 0; k < K; ++k) out[k].merge({double(dz[k]), double(along[k])});
    }
  }

  FASTGAN_DEVICE void outputs(int64_t group, int split, const Coefficients<T> (&c)[K]) const {
    const S* x = static_cast<const S*>(args.input);
    S* y = static_cast<S*>(args.output);
    const Act<T> act(args);
    int64_t begin, end;
    range(split, begin, end);
#pragma unroll 1
    for (int64_t first = begin + row; first < end; first += int64_t(U) * plan.rows) {
      T values[U][V];
      const Chunk<U> at(*this, group, first, end);
      at.load(x, values);
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (u >= at.items) continue;
#pragma unroll
        for (int e = 0; e < V; ++e) values[u][e] = act(preactivation(values[u][e], c[owner(e)]));
        store_global<V>(y + at[u], values[u]);
      }
    }
  }

  FASTGAN_DEVICE void gradients(int64_t group, int split, const Coefficients<T> (&c)[K]) const {
    const S *x = static_cast<const S*>(args.input), *dy = static_cast<const S*>(args.grad_output);
    S* dx = static_cast<S*>(args.grad_input);
    const Act<T> act(args);
    int64_t begin, end;
    range(split, begin, end);
#pragma unroll 1
    for (int64_t first = begin + row; first < end; first += int64_t(G) * plan.rows) {
      T values[G][V], grads[G][V];
      const Chunk<G> at(*this, group, first, end);
      at.load(x, values);
      at.load(dy, grads);
#pragma unroll
      for (int u = 0; u < G; ++u) {
        if (u >= at.items) continue;
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const Coefficients<T>& of = c[owner(e)];
          T dz = act.masked(grads[u][e], preactivation(values[u][e], of));
          // In evaluation x - mean has no part in it: infinity times the zero coefficient would be NaN.
          values[u][e] = args.batch_statistics
                             ? dz * of.scale - (values[u][e] - of.mean) * of.along - of.constant
                             : dz * of.scale;
        }
        store_global<V>(dx + at[u], values[u]);
      }
    }
  }

  // ---- coefficients ----

  template <class Parameter>
  FASTGAN_DEVICE static double parameter(const void* p, int64_t c, double absent) {
    return p ? double(static_cast<const Parameter*>(p)[c]) : absent;
  }
  FASTGAN_DEVICE double invstd(double var) const { return 1.0 / sqrt(var + args.eps); }

  FASTGAN_DEVICE Coefficients<T> affine(int64_t c, double mean, double var) const {
    double scale = parameter<T>(args.weight, c, 1.0) * invstd(var), shift = parameter<T>(args.bias, c, 0.0);
    T high = T(mean);
    double rest = mean - double(high);
    // An infinite mean has no remainder; x - mean is then NaN or infinite by itself.
    return {high, T(scale), T(rest == rest ? shift - rest * scale : shift), T(0), T(0)};
  }

  // The pivot is one of the values, so that at most log2(count) bits of the second sum cancel.
  FASTGAN_DEVICE Statistics statistics(int64_t group, int64_t c, const Sums& sums) const {
    double apart = sums.first / count(), square = sums.second / count() - apart * apart;
    return {pivot(group, c) + apart, square < 0 ? 0 : square};  // NaN stays
  }

  // `at`: of channel c in its group.
  FASTGAN_DEVICE void gradient(Coefficients<T>& out, int64_t c, int64_t at, const Sums& sums) const {
    if (!args.batch_statistics) return;
    double inverse = invstd(args.var[at]), scale = parameter<T>(args.weight, c, 1.0) * inverse;
    double rest = args.mean[at] - double(out.mean);
    double along = scale * inverse * inverse * (sums.second - rest * sums.first) / count();
    out.along = T(along);
    out.constant = T(scale * sums.first / count() - rest * along);
  }
};

// The gradients of a channel's weight and bias, over the groups.
struct ParameterSums {
  double weight = 0, bias = 0;
  template <class W, class T>
  FASTGAN_DEVICE void add(const W& walk, int64_t at, const Coefficients<T>& c, const Sums& sums) {
    weight +=
        (sums.second - (walk.args.mean[at] - double(c.mean)) * sums.first) * walk.invstd(walk.args.var[at]);
    bias += sums.first;
  }
  template <class T>
  FASTGAN_DEVICE void store(const NormActArgs& args, int64_t c) const {
    if (args.grad_weight) static_cast<T*>(args.grad_weight)[c] = T(weight);
    if (args.grad_bias) static_cast<T*>(args.grad_bias)[c] = T(bias);
  }
};

// All rows' values of each column and channel, joined, in one order: lanes of a warp by shuffles, warps in
// shared memory. Thread i gets those of channel i of the tile; the others something.
template <int K>
FASTGAN_DEVICE Sums join_rows(const Sums (&values)[K], int columns, Sums* memory) {
  int thread = int(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  block_sync();  // the memory may still be read from a former call
#pragma unroll
  for (int k = 0; k < K; ++k) {
    Sums mine = values[k];
    for (int step = columns; step < kWarp; step *= 2)
      mine.merge({shuffle_xor(mine.first, step), shuffle_xor(mine.second, step)});
    if (lane < columns) memory[(warp * columns + lane) * K + k] = mine;
  }
  block_sync();
  Sums joined = {};
  if (thread < columns * K)
#pragma unroll
    for (int w = 0; w < kThreads / kWarp; ++w) joined.merge(memory[w * columns * K + thread]);
  return joined;
}
// Of its memory.
inline size_t join_bytes(int columns, int channels) {
  return SharedMemory::bytes<Sums>(kThreads / kWarp * columns * channels);
}

// The sums of thread i's channel that the cluster's blocks have found, added up in the order of the blocks:
// each block gets the same bits. The caller waits for the cluster before the memory is written again, and
// before it ends.
FASTGAN_DEVICE Sums join_blocks(const Sums& mine, int channels, int blocks, Sums* memory) {
  int thread = int(threadIdx.x);
  if (thread < channels) memory[thread] = mine;
  cluster_arrive();
  cluster_wait();
  Sums joined = {};
  if (thread < channels) {
    Sums parts[kMostBlocks];  // all loads before the first use
#pragma unroll
    for (int b = 0; b < kMostBlocks; ++b) parts[b] = load_of_block(memory + thread, b < blocks ? b : 0);
#pragma unroll
    for (int b = 0; b < kMostBlocks; ++b)
      if (b < blocks) joined.merge(parts[b]);
  }
  cluster_arrive();
  return joined;
}

// Scratch: the sums of each group, channel and split, then coefficients of each group and channel.
FASTGAN_DEVICE Sums* partials(const NormActArgs& args, const Plan& plan, int64_t group, int64_t channel) {
  return reinterpret_cast<Sums*>(args.scratch) + (group * args.channels + channel) * plan.splits;
}
template <class T>
FASTGAN_DEVICE Coefficients<T>* prepared(const NormActArgs& args, const Plan& plan, int64_t group,
                                         int64_t channel) {
  return reinterpret_cast<Coefficients<T>*>(partials(args, plan, args.groups, 0)) + group * args.channels +
         channel;
}

template <class W>
FASTGAN_DEVICE void store_partial(const W& walk, int64_t group, int split, int tile, const Sums& joined) {
  int i = int(threadIdx.x);
  int64_t channel = walk.first_channel(tile) + i;
  if (i >= walk.plan.columns * W::K || channel >= walk.args.channels) return;
  partials(walk.args, walk.plan, group, channel)[split] = joined;
}

template <class T, int K>
FASTGAN_DEVICE void load_coefficients(const Coefficients<T>* shared, int column, Coefficients<T> (&out)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) out[k] = shared[column * K + k];
}

// A block has one (tile, split, group), the tile fastest: neighbours read neighbouring memory. The blocks of
// a cluster follow each other.
struct Where {
  int tile, split;
  int64_t group;
  FASTGAN_DEVICE Where(const Plan& plan, int block, bool clustered = false) {
    split = clustered ? block % plan.splits : block / plan.tiles % plan.splits;
    tile = clustered ? block / plan.splits % plan.tiles : block % plan.tiles;
    group = block / plan.tiles / plan.splits;
  }
};

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

bool clusters_run() {
  constexpr size_t most = 16 * 1024;  // of shared memory
  return runs_clusters(forward_kernel<float, 4, true, true>, kMostBlocks, kThreads, most);
}

// Threads beside each other of a tile that is `bytes` wide, of channels_last.
template <class S>
int columns_of(const NormActArgs& args, int width, int bytes) {
  int columns = 1;
  while (columns * width * int(sizeof(S)) < bytes && columns * width < args.channels && columns < kWarp)
    columns *= 2;
  return columns;
}

template <class S>
void set_tiles(const NormActArgs& args, int width, int bytes, Plan& plan) {
  plan.columns = args.channels_last ? columns_of<S>(args, width, bytes) : 1;
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
    if (plan.clustered && tried.tiles * blocks <= plan.tiles * plan.splits) continue;
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
  if (args.batch_statistics && !plan.whole && !plan.clustered)
    return in_three<S, V, Last, false>(args, plan, stream);
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
  if (needs_sums && !plan.whole && !plan.clustered) return in_three<S, V, Last, true>(args, plan, stream);
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
    if (!plan.whole && !plan.clustered && plan.splits > splits) splits = plan.splits;
  }
  return splits ? args.groups * args.channels * (2 * splits + 5) : 0;  // five coefficients
}
