// What a thread of norm_act.cu's kernels sees of a call and computes of it: its channels and items, their
// sums and values, and how sums of threads and blocks are joined.
//
// One kernel for both layouts and both directions. A block has 256 threads: X columns of channels and 256 / X
// rows. In (batch, spatial, channels) a thread owns V neighbouring channels, one vector of each row that it
// visits, and X columns make 128 bytes, so that a warp reads whole lines of memory. In (batch, channels,
// spatial) a block owns one channel, X is 1, and the threads take neighbouring vectors of its planes.
//
// Numerics: as the CPU kernel (norm_act_cpu.cpp). A thread takes a chunk of values into registers, and sums
// squares about the chunk's own mean; beyond a chunk all sums are in double and about one pivot, the
// channel's first value, so that they are simply added. That value being one of n, the variance is at least
// its distance from the mean squared over n, and the final difference loses no more than log2(n) of 53 bits.
// The sums of a backward are in the accumulate type within a chunk, double beyond it. The output is fma(x -
// float(mean), scale, shift) with the mean's rest in the shift; the mask is recomputed by the same two
// instructions.
#pragma once
#include "common/cuda_cluster.h"
#include "common/cuda_types.h"
#include "norm_act/norm_act.h"

namespace fastgan {
namespace {

constexpr int kThreads = 256;
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
  bool in_one() const { return whole || clustered; }
};

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

}  // namespace
}  // namespace fastgan
