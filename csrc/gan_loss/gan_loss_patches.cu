// A convolution with few outputs and many logits a picture on CUDA (a PatchGAN's head), forward and backward.
// Registers: at most 128, no spills (nvcc 13: sm_80, sm_90a, sm_100).
//
// Summed logit by logit, such a convolution reads each value of x once a tap, sixteen times for 4x4. Instead
// the taps are columns of a matrix product, J = outputs * taps <= 16 of them:
//
//   forward       sums[p, j] = sum over c of x[p, c] w[c, j]    for every pixel p of the input; a logit is
//                 then J reads from there (gan_loss.cu), of a tensor J / C as large as x
//   grad_weight   gw[c, j] = sum over p of x[p, c] g[p, j]      with g[p, j] the gradient of the logit that
//   grad_input    gx[p, c] = sum over j of g[p, j] w[c, j]      saw pixel p by tap j, zero where none did
//
// so that x is read once by each of the first two and gx written once, whatever kernel, stride, padding and
// strides of x. A product costs all pixels and taps, for 4x4 on 31x31 pixels 961 / 784 = 1.2 of what must be.
//
// One shape of work for all three. 32 lanes are neighbours in one index of x, pixels or channels, and a
// thread has V = 4 of them (2 in double) times the 16 columns: 64 sums in registers, or for grad_input the 64
// coefficients. What goes with the other index is 16 numbers, staged in shared memory and read by all lanes
// of a warp at once: for V values of x 16 V fused multiply-adds, which take a processor as long as the four
// reads of 16 bytes do that bring the numbers. The eight warps of a block share the other index.
//
// Lanes want to go along what is contiguous in memory. grad_input picks them so. The two sums cannot: where x
// is contiguous in the index that is summed over (channels_last forward, planes for grad_weight), a stage of
// 64 by 32 V values goes through shared memory, transposed, in rows that are one longer than a multiple of
// the banks: one store and one load of 4 bytes more for each value.
//
// For float32 x of 16x512x31x31: 31.5 MB read forward; 31.5 MB read and as many written backward; the sums of
// each are 2 MB, written and read. That is 103 MB, 31 us of an H100's memory (3.35 TB/s); 0.38 G
// multiply-adds are 11 us of its arithmetic, spread over them.
//
// A block writes the sums of its split, and what reads them adds them in order: no atomics, the same bits in
// every run. A weight or value that is not finite makes NaN also of gradients that meet it with a tap beyond
// the edge, whose coefficient is the zero of g.
#include "gan_loss/gan_loss_cuda.h"

namespace fastgan {
namespace {

using Args = GanLossArgs;
constexpr int kInputItems = 128;  // of the other index, that a block of grad_input has

// Threads stand for V neighbours (a warp apart) of the lane index.
template <class T>
constexpr int kVectors = 16 / int(sizeof(T));
template <class T>
constexpr int kLanes = kWarp * kVectors<T>;
static_assert(kLanes<float> == patch_lanes(4) && kLanes<double> == patch_lanes(8));

// A column: output k, tap (i, j).
struct Column {
  int k, i, j;
  bool is_inside;
  FASTGAN_DEVICE Column(const Args& a, int column) {
    int width = int(a.kernel_width), height = int(a.kernel_height), row = column / width;
    j = column - row * width, k = row / height, i = row - k * height;
    is_inside = k < a.outputs;
  }
};

// The two indices that x has. at() is where one lies, or -1; coefficient() what goes with it in a column.
template <class S>
struct Channels {
  using T = Accumulate<S>;
  static FASTGAN_DEVICE int count(const Args& a) { return int(a.channels); }
  static FASTGAN_DEVICE int at(const Args& a, const int64_t* stride, int c) {
    return c < count(a) ? c * int(stride[1]) : -1;
  }
  static FASTGAN_DEVICE T coefficient(const Args& a, const Column& column, int c) {
    if (!column.is_inside || c >= count(a)) return T(0);
    const int64_t* s = a.weight.stride;
    return widen(
        static_cast<const S*>(a.weight.data)[column.k * s[0] + c * s[1] + column.i * s[2] + column.j * s[3]]);
  }
};

template <class S>
struct Pixels {
  using T = Accumulate<S>;
  static FASTGAN_DEVICE int count(const Args& a) { return int(a.batch * a.height * a.width); }
  static FASTGAN_DEVICE int at(const Args& a, const int64_t* stride, int p) {
    if (p >= count(a)) return -1;
    int64_t y, x, n = split(split(p, a.width, x), a.height, y);
    return int(n * stride[0] + y * stride[2] + x * stride[3]);
  }
  // The gradient of the logit that saw this pixel by this tap: row * stride + tap = y + padding.
  static FASTGAN_DEVICE T coefficient(const Args& a, const Column& column, int p) {
    if (!column.is_inside || p >= count(a)) return T(0);
    int64_t y, x, n = split(split(p, a.width, x), a.height, y);
    int64_t above = y + a.padding[0] - column.i, left = x + a.padding[1] - column.j, no_row, no_column;
    if (above < 0 || left < 0) return T(0);
    int64_t row = split(above, a.stride[0], no_row), place = split(left, a.stride[1], no_column);
    if (no_row || no_column || row >= a.out_height || place >= a.out_width) return T(0);
    return static_cast<const T*>(
        a.workspace)[((n * a.outputs + column.k) * a.out_height + row) * a.out_width + place];
  }
};

template <class T>
FASTGAN_DEVICE void load_columns(const T* from, T (&out)[kColumns]) {
  constexpr int V = kVectors<T>;
#pragma unroll
  for (int j = 0; j < kColumns; j += V) {
    T some[V];
    load_vector<V>(from + j, some);
#pragma unroll
    for (int v = 0; v < V; ++v) out[j + v] = some[v];
  }
}

// ---- sums over channels or pixels ----

template <class S, bool Direct>
constexpr size_t sums_shared_bytes() {
  using T = Accumulate<S>;
  constexpr int tile = Direct ? 0 : kStage * (kLanes<T> + 1), joined = kColumns * kThreads;
  return SharedMemory::bytes<int>(kLanes<T>) + SharedMemory::bytes<int>(kStage) +
         SharedMemory::bytes<T>(kStage * kColumns) + SharedMemory::bytes<T>(tile > joined ? tile : joined);
}

// sums[split][column][lane index] of one tile and split. Direct: x is read by lanes as it lies.
template <class S, bool Direct, class Lane, class Row>
FASTGAN_DEVICE void tile_sums(const Args& a, const Patches& patches, const Patches::Cut& cut, int block,
                              Accumulate<S>* sums) {
  using T = Accumulate<S>;
  constexpr int V = kVectors<T>, L = kLanes<T>;
  SharedMemory shared;
  int* lane_at = shared.take<int>(L);
  int* row_at = shared.take<int>(kStage);
  T* coefficients = shared.take<T>(kStage * kColumns);
  constexpr int staged = Direct ? 0 : kStage * (L + 1), joined = kColumns * kThreads;
  T* tile = shared.take<T>(staged > joined ? staged : joined);
  const S* x = static_cast<const S*>(a.input.data);
  int thread = int(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  int split_of = block / int(cut.tiles), tile_of = block - split_of * int(cut.tiles);
  int first = split_of * int(cut.rows), end = first + int(cut.rows), rows = Row::count(a);
  if (end > rows) end = rows;
  Column column(a, thread % kColumns);
  if (thread < L) lane_at[thread] = Lane::at(a, a.input.stride, tile_of * L + thread);
  T out[V][kColumns] = {};
#pragma unroll 1
  for (int stage = first; stage < end; stage += kStage) {
    block_sync();  // what the former stage reads
#pragma unroll
    for (int i = 0; i < kStage * kColumns / kThreads; ++i) {
      int r = thread / kColumns + i * (kThreads / kColumns);
      coefficients[r * kColumns + thread % kColumns] = Row::coefficient(a, column, stage + r);
    }
    if (thread < kStage) row_at[thread] = Row::at(a, a.input.stride, stage + thread);
    block_sync();
    if constexpr (!Direct) {
#pragma unroll
      for (int half = 0; half < kStage; half += kWarp) {
        int at = row_at[half + lane];
#pragma unroll(sizeof(T) == 8 ? 2 : 8)
        for (int l = warp; l < L; l += kWarps) {
          int beside = lane_at[l];
          tile[(half + lane) * (L + 1) + l] = at >= 0 && beside >= 0 ? widen(x[at + beside]) : T(0);
        }
      }
      block_sync();
    }
    constexpr int together = sizeof(T) == 8 ? 1 : 4;  // rows whose loads come before the first use
#pragma unroll 1
    for (int r = warp; r < kStage; r += together * kWarps) {
      T values[together][V];
#pragma unroll
      for (int u = 0; u < together; ++u) {
        int row = r + u * kWarps;
        int at = Direct ? row_at[row] : 0;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          int l = lane + v * kWarp;
          if constexpr (Direct) {
            int beside = lane_at[l];
            values[u][v] = at >= 0 && beside >= 0 ? widen(x[at + beside]) : T(0);
          } else {
            values[u][v] = tile[row * (L + 1) + l];
          }
        }
      }
#pragma unroll
      for (int u = 0; u < together; ++u) {
        const T* from = coefficients + (r + u * kWarps) * kColumns;
#pragma unroll
        for (int j = 0; j < kColumns; j += V) {
          T by[V];
          load_vector<V>(from + j, by);
#pragma unroll
          for (int v = 0; v < V; ++v)
#pragma unroll
            for (int i = 0; i < V; ++i) out[v][j + i] = fma(values[u][v], by[i], out[v][j + i]);
        }
      }
    }
  }
  int lanes = Lane::count(a);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    block_sync();
#pragma unroll
    for (int j = 0; j < kColumns; ++j) tile[j * kThreads + thread] = out[v][j];
    block_sync();
#pragma unroll
    for (int i = 0; i < kColumns / kWarps; ++i) {
      int j = warp + i * kWarps;
      T sum = tile[j * kThreads + lane];
#pragma unroll
      for (int other = 1; other < kWarps; ++other) sum += tile[j * kThreads + other * kWarp + lane];
      int64_t index = tile_of * L + v * kWarp + lane;
      if (j < patches.columns && index < lanes) sums[(split_of * patches.columns + j) * lanes + index] = sum;
    }
  }
}

template <class S, bool Direct>
__global__ void __launch_bounds__(kThreads, 2) products_kernel(Args a, Patches patches) {
  Accumulate<S>* sums = static_cast<Accumulate<S>*>(a.workspace) + patches.offset;
  tile_sums<S, Direct, Pixels<S>, Channels<S>>(a, patches, patches.products, int(blockIdx.x), sums);
}

// ---- the gradient of the input ----

template <class S>
constexpr size_t input_shared_bytes() {
  using T = Accumulate<S>;
  return SharedMemory::bytes<int>(kInputItems) + SharedMemory::bytes<T>(kInputItems * kColumns) +
         SharedMemory::bytes<T>(kLanes<T> * (kColumns + 1));
}

template <class S, class Lane, class Row>
FASTGAN_DEVICE void input_gradient(const Args& a, int block) {
  using T = Accumulate<S>;
  constexpr int V = kVectors<T>, L = kLanes<T>;
  SharedMemory shared;
  int* row_at = shared.take<int>(kInputItems);
  T* of_rows = shared.take<T>(kInputItems * kColumns);
  T* of_lanes = shared.take<T>(L * (kColumns + 1));
  int thread = int(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp, j = thread % kColumns;
  int tiles = (Lane::count(a) + L - 1) / L, part = block / tiles;
  int first_lane = (block - part * tiles) * L, first_row = part * kInputItems;
  Column column(a, j);
#pragma unroll 4
  for (int l = thread / kColumns; l < L; l += kThreads / kColumns)
    of_lanes[l * (kColumns + 1) + j] = Lane::coefficient(a, column, first_lane + l);
#pragma unroll 4
  for (int r = thread / kColumns; r < kInputItems; r += kThreads / kColumns)
    of_rows[r * kColumns + j] = Row::coefficient(a, column, first_row + r);
  if (thread < kInputItems) row_at[thread] = Row::at(a, a.grad_input_stride, first_row + thread);
  block_sync();
  T own[V][kColumns];
  int lane_at[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    int l = lane + v * kWarp;
    lane_at[v] = Lane::at(a, a.grad_input_stride, first_lane + l);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) own[v][c] = of_lanes[l * (kColumns + 1) + c];
  }
  S* to = static_cast<S*>(a.grad_input);
#pragma unroll 1
  for (int r = warp; r < kInputItems; r += kWarps) {
    int at = row_at[r];
    if (at < 0) break;  // as are those after it
    T by[kColumns];
    load_columns(of_rows + r * kColumns, by);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      T sum = 0;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum = fma(own[v][c], by[c], sum);
      if (lane_at[v] >= 0) narrow(to[at + lane_at[v]], sum);
    }
  }
}

// ---- the backward's launch ----

struct PatchTasks {
  int input_blocks, weight_blocks;  // those of the biases come last
};

// Last: channels are contiguous in x.
template <class S, bool Last>
__global__ void __launch_bounds__(kThreads, 2) gradients_kernel(Args a, Patches patches, PatchTasks tasks) {
  int block = int(blockIdx.x);
  if (block < tasks.weight_blocks) {
    Accumulate<S>* sums = static_cast<Accumulate<S>*>(a.workspace) + patches.offset;
    return tile_sums<S, Last, Channels<S>, Pixels<S>>(a, patches, patches.weights, block, sums);
  }
  block -= tasks.weight_blocks;
  if (block < tasks.input_blocks) {
    if constexpr (Last)
      return input_gradient<S, Channels<S>, Pixels<S>>(a, block);
    else
      return input_gradient<S, Pixels<S>, Channels<S>>(a, block);
  }
  SharedMemory shared;
  bias_gradient<S>(a, block - tasks.input_blocks, shared.take<double>(kWarps));
}

// The splits of 32 neighbouring weights, an eighth of them for each warp.
template <class S>
__global__ void __launch_bounds__(kThreads) weights_kernel(Args a, Patches patches) {
  using T = Accumulate<S>;
  SharedMemory shared;
  T* memory = shared.take<T>(kThreads);
  int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  int64_t index = int64_t(blockIdx.x) * kWarp + lane, all = patches.columns * a.channels;
  const T* sums = static_cast<const T*>(a.workspace) + patches.offset;
  T sum = 0;
  if (index < all)
#pragma unroll 8
    for (int64_t i = warp; i < patches.weights.splits; i += kWarps) sum += sums[i * all + index];
  memory[threadIdx.x] = sum;
  block_sync();
  if (warp != 0 || index >= all) return;
#pragma unroll
  for (int other = 1; other < kWarps; ++other) sum += memory[other * kWarp + lane];
  int64_t c;
  Column column(a, int(split(index, a.channels, c)));
  const int64_t* s = a.grad_weight_stride;
  narrow(static_cast<S*>(a.grad_weight)[column.k * s[0] + c * s[1] + column.i * s[2] + column.j * s[3]], sum);
}

// ---- host ----

template <class S, bool Last>
Error products(const Args& a, const Patches& patches, void* stream) {
  return launch(products_kernel<S, !Last>, patches.products.tiles * patches.products.splits, kThreads,
                sums_shared_bytes<S, !Last>(), stream, a, patches);
}

template <class S, bool Last>
Error gradients(const Args& a, const Patches& patches, void* stream) {
  constexpr int lanes = kLanes<Accumulate<S>>;
  int64_t input_blocks = 0, weight_blocks = 0;
  if (a.grad_input)
    input_blocks = Last ? ceil_div(a.channels, lanes) * ceil_div(patches.pixels, kInputItems)
                        : ceil_div(patches.pixels, lanes) * ceil_div(a.channels, kInputItems);
  if (a.grad_weight) weight_blocks = patches.weights.tiles * patches.weights.splits;
  size_t shared = SharedMemory::bytes<double>(kWarps);
  if (a.grad_input && shared < input_shared_bytes<S>()) shared = input_shared_bytes<S>();
  if (a.grad_weight && shared < sums_shared_bytes<S, Last>()) shared = sums_shared_bytes<S, Last>();
  int64_t grid = weight_blocks + input_blocks + (a.grad_bias ? a.outputs : 0);
  PatchTasks tasks{int(input_blocks), int(weight_blocks)};
  Error error = launch(gradients_kernel<S, Last>, grid, kThreads, shared, stream, a, patches, tasks);
  if (error || !a.grad_weight) return error;
  return launch(weights_kernel<S>, ceil_div(patches.columns * a.channels, kWarp), kThreads,
                SharedMemory::bytes<Accumulate<S>>(kThreads), stream, a, patches);
}

template <class S>
Error run(const Args& a, const Patches& patches, void* stream, bool is_backward) {
  bool last = a.input.stride[1] == 1;
  if (is_backward)
    return last ? gradients<S, true>(a, patches, stream) : gradients<S, false>(a, patches, stream);
  return last ? products<S, true>(a, patches, stream) : products<S, false>(a, patches, stream);
}

Error by_dtype(const Args& a, const Patches& patches, void* stream, bool is_backward) {
  switch (a.dtype) {
    case Dtype::float32:
      return run<float>(a, patches, stream, is_backward);
    case Dtype::float64:
      return run<double>(a, patches, stream, is_backward);
    case Dtype::bfloat16:
      return run<bfloat16>(a, patches, stream, is_backward);
    case Dtype::float16:
      return run<float16>(a, patches, stream, is_backward);
  }
  return "no such dtype";
}

}  // namespace

const char* patch_products(const GanLossArgs& args, const Patches& patches, void* stream) {
  return by_dtype(args, patches, stream, false);
}

const char* patch_gradients(const GanLossArgs& args, const Patches& patches, void* stream) {
  return by_dtype(args, patches, stream, true);
}

}  // namespace fastgan
