// Strided and plain convolutions by Winograd's algorithm: all three passes, one set of transforms.
//
// A convolution of kernel 4 and stride 2 is one of kernel 2 and stride 1 on the four images of every second
// pixel ("phases"), with four times the channels; of kernel 3 and stride 1 it is what it is. On 4 × 4 tiles
// of outputs the tile algorithm of transforms.h then needs 25 products where 64 (36 where 144) would be
// multiplied directly, and every product becomes a matrix product over channels (or, for the weights, over
// tiles), one for each of the points:
//
//   forward           y = Aᵀ [ (B x Bᵀ) · (G w Gᵀ) ] A     sum over channels and phases
//   input gradient    x = Bᵀ [ (A y Aᵀ) · (G w Gᵀ) ] B     sum over outputs; 5 × 5 tiles overlap by one
//   weight gradient   w = Gᵀ [ (B x Bᵀ) · (A y Aᵀ) ] G     sum over tiles
//
// Work goes in two steps, for a run of 64 or 128 tiles, or so many images at a time that the transformed
// tiles stay in the last cache:
//   1. transform the tiles of x and/or y; vectors run over 16 channels of one tile. Stored by blocks of
//      kTiles tiles at most (or twice that) and of kDepth channels: (block, channels, point, tile, channel).
//   2. each task takes 32 columns (outputs, or channels and phases). It keeps their products of a block for
//      all points in the second cache, walks through the depth in chunks of kDepth, for each of which it
//      transforms the weights it needs (again for every block: to store them would write six times the
//      weights to memory and read them back), transforms the result back into rows of scratch, and writes
//      them.
// The weight gradient keeps 64 × 32 × points numbers a task and walks through the tiles instead.
//
// Of the time of one core with AVX2 (Zen 4, 1 MB of second cache, channels_last, batch 64), in percent:
// products / transforms of x and y / of the weights / back, and writing. The products run at 95 to 110
// GFLOP/s, where sgemm does 95 to 100 a core.
//                     forward          input gradient    weight gradient
//   64-128 at 32      72 / 15 / 4 / 9  68 / 6 / 5 / 20   79 / 21 / - / 1
//   128-256 at 16     82 / 7 / 5 / 5   76 / 3 / 7 / 13   80 / 16 / - / 3
//   256-512 at 8      84 / 3 / 9 / 3   77 / 2 / 14 / 7   82 / 7 / - / 10
// What it took, each by measurement: the next slice of a pixel prefetched (8 to 4 % of a pass); weights of
// any layout exchanged in squares (TapBlock; one by one they were up to a fifth of a pass); what is not
// finite seen in four sums (in one, each number of a tile waited for the one before: half of the way back);
// the next point's factors prefetched in the weight gradient; blocks of 128 tiles. Tried, and of no use:
// fetching the lines of results before they are written.
//
// What one core has written and another reads costs 50 ns a line where they share a cache, and 150 to 400
// where they do not; a virtual machine moves its cores from the one to the other, and the forward 64-128 at
// 32 took 11 or 16 ms by luck while all threads transformed for all. So a thread has its own runs of tiles
// from the pictures to the results, the same in every pass; see convolve, and WeightCut in weight_gradient.h.
//
// Numerics: every sum has one order that depends on no cut of the work, so the bits are the same for any
// number of threads and any size of workspace. An infinity or NaN would spread over its tile: it is seen
// where results are written, and the caller is told to compute directly.
#include "conv/conv.h"

#include "conv/products.h"
#include "conv/tiles.h"
#include "conv/weight_gradient.h"

namespace fastgan {
namespace {

// ---- step 2, forward and input gradient ----

struct TaskScratch {
  float *sums, *weights, *rows, *taps;
  template <class Algorithm>
  static int64_t sums_size(const Tiling& tiling) {
    return Algorithm::products * (tiling.tiles * kColumns + kGap);
  }
  template <class Algorithm>
  static int64_t weights_size() {
    return Algorithm::products * (kDepth * kColumns + kGap);
  }
};

// Columns of a task: channels [channel, channel + width) for each of `groups` phases of columns.
template <class Algorithm>
void transform_forward_weights(const ConvArgs& a, int64_t chunk, int64_t depth, int64_t output,
                               int64_t columns, const TaskScratch& scratch) {
  constexpr int W = lanes<float>, S = Algorithm::stride, n = Algorithm::points, kernel = Algorithm::kernel;
  const Weights w{a.dtype,        a.w.data,   a.w.strides[0], a.outputs,
                  a.w.strides[1], a.channels, a.w.strides[2], a.w.strides[3]};
  const int64_t channels = depth / Algorithm::phases, point_stride = depth * kColumns + kGap;
  for (int64_t first = 0; first < channels; first += kSlice) {
    const TapBlock<kernel> block{scratch.taps, chunk * kDepth / Algorithm::phases + first, output, columns};
    read_taps(w, block);
    for (int64_t c = 0; c < kSlice; ++c)
      for (int p = 0; p < S * S; ++p)
        for (int64_t k = 0; k < columns; k += W) {
          float* out = scratch.weights + (first * S * S + p * kSlice + c) * kColumns + k;
          transform_tile<Algorithm, Algorithm::G>(
              [&](int u, int v) {
                return load<float>(block.at(c, (S * u + p / S) * kernel + S * v + p % S) + k);
              },
              [&](int i, int j, Vec<float> v) { store(out + (i * n + j) * point_stride, v); });
        }
  }
}

template <class Algorithm>
void transform_gradient_weights(const ConvArgs& a, int64_t chunk, int64_t depth, int64_t channel,
                                int64_t width, int phase, const TaskScratch& scratch) {
  constexpr int W = lanes<float>, S = Algorithm::stride, n = Algorithm::points, kernel = Algorithm::kernel;
  const Weights w{a.dtype,        a.w.data,  a.w.strides[1], a.channels,
                  a.w.strides[0], a.outputs, a.w.strides[2], a.w.strides[3]};
  const int64_t point_stride = depth * kColumns + kGap;
  for (int64_t first = 0; first < depth; first += kSlice) {
    const TapBlock<kernel> block{scratch.taps, chunk * kDepth + first, channel, width};
    read_taps(w, block, phase, S);
    for (int64_t k = 0; k < kSlice; ++k)
      for (int b = 0; b < S; ++b)
        for (int64_t c = 0; c < width; c += W) {
          float* out = scratch.weights + (first + k) * kColumns + b * (kColumns / S) + c;
          transform_tile<Algorithm, Algorithm::G>(
              [&](int u, int v) {
                return load<float>(block.at(k, (S * u + phase) * kernel + S * v + b) + c);
              },
              [&](int i, int j, Vec<float> v) { store(out + (i * n + j) * point_stride, v); });
        }
  }
}

// sums (points, tiles, columns) = the products of one chunk of depth, added to those before.
template <class Algorithm>
void multiply_chunk(const Side& side, const Tiling& tiling, int64_t block, int64_t chunk, int64_t tiles,
                    int64_t columns, const TaskScratch& scratch) {
  const int64_t depth = side.depth_of(chunk), stride = side.point_stride(chunk, tiling);
  const float* from = side.at(block, chunk);
  for (int64_t p = 0; p < Algorithm::products; ++p)
    multiply_point<false>(tiles, columns, depth, from + p * stride, depth,
                          scratch.weights + p * (depth * kColumns + kGap), kColumns,
                          scratch.sums + p * (tiling.tiles * kColumns + kGap), kColumns, chunk > 0);
}

// Outputs [output, output + 32) of images [first, first + images), which are run `run` of the step.
template <class Algorithm>
void forward_task(const ConvArgs& a, const Side& side, const Tiling& tiling, int64_t run, int64_t first,
                  int64_t images, int64_t output, const TaskScratch& scratch, Check& check) {
  constexpr int W = lanes<float>, m = Algorithm::outputs, n = Algorithm::points;
  const int64_t columns = least(kColumns, whole_slices(a.outputs - output));
  const int64_t sums_stride = tiling.tiles * kColumns + kGap;
  alignas(64) float bias[kColumns];
  for (int64_t k = 0; k < kColumns; ++k)
    bias[k] = a.bias && output + k < a.outputs ? a.bias[output + k] : 0.0f;
  for (int64_t block = 0; block < tiling.blocks; ++block) {
    const int64_t tiles = tiling.tiles_of(block, images);
    for (int64_t chunk = 0; tiles > 0 && chunk < side.chunks; ++chunk) {
      transform_forward_weights<Algorithm>(a, chunk, side.depth_of(chunk), output, columns, scratch);
      multiply_chunk<Algorithm>(side, tiling, run * tiling.blocks + block, chunk, tiles, columns, scratch);
    }
    int64_t count;
    for (int64_t tile = 0; tile < tiles; tile += count) {  // the tiles of one row of tiles
      const int64_t in_run = block * tiling.tiles + tile, in_image = in_run % tiling.an_image;
      const int64_t row = in_image / tiling.wide, left = in_image % tiling.wide;
      count = least(tiling.wide - left, tiles - tile);
      for (int64_t t = 0; t < count; ++t)
        for (int64_t k = 0; k < columns; k += W) {
          const float* from = scratch.sums + (tile + t) * kColumns + k;
          float* to = scratch.rows + t * m * kColumns + k;
          const Vec<float> shift = load<float>(bias + k);
          transform_tile_back<Algorithm, Algorithm::A>(
              [&](int i, int j) { return load<float>(from + (i * n + j) * sums_stride); },
              [&](int i, int j, Vec<float> v) {
                v += shift;
                check.see(j, v);
                if (a.slope != 1) v = activate(v, a.slope);
                store(to + (i * count * m + j) * kColumns, v);
              });
        }
      const Image image =
          image_of(a.y, a.dtype, first + in_run / tiling.an_image, a.outputs, a.out_height, a.out_width);
      const Window window{row * m, 1, m, left * m, count * m, kColumns};
      for (int64_t k = 0; k < columns; k += kSlice) write_window(scratch.rows + k, window, image, output + k);
    }
  }
}

// The rows of x with phase `phase` in channels [channel, ...) of images [first, first + images).
template <class Algorithm>
void input_gradient_task(const ConvArgs& a, const Side& side, const Tiling& tiling, int64_t run,
                         int64_t first, int64_t images, int64_t channel, int phase,
                         const TaskScratch& scratch, Check& check) {
  constexpr int W = lanes<float>, m = Algorithm::outputs, n = Algorithm::points, S = Algorithm::stride;
  constexpr int64_t kWidth = kColumns / S;
  const int64_t width = least(kWidth, whole_slices(a.channels - channel));
  const int64_t sums_stride = tiling.tiles * kColumns + kGap;
  // The row that the last tiles do not reach (height + 2 pad - kernel odd) is row n of the scratch, always
  // empty.
  const int64_t across = (tiling.wide * m + n - m + 1) * S, row_size = across * kWidth;
  alignas(64) float bias[kWidth];
  for (int64_t c = 0; c < kWidth; ++c)
    bias[c] = a.bias && channel + c < a.channels ? a.bias[channel + c] : 0.0f;
  auto clear = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * across; i < end * across; ++i)
      for (int64_t c = 0; c < kWidth; c += W) store(scratch.rows + i * kWidth + c, load<float>(bias + c));
  };
  for (int64_t block = 0; block < tiling.blocks; ++block) {
    const int64_t tiles = tiling.tiles_of(block, images);
    for (int64_t chunk = 0; tiles > 0 && chunk < side.chunks; ++chunk) {
      transform_gradient_weights<Algorithm>(a, chunk, side.depth_of(chunk), channel, width, phase, scratch);
      multiply_chunk<Algorithm>(side, tiling, run * tiling.blocks + block, chunk, tiles, kColumns, scratch);
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t in_run = block * tiling.tiles + tile, in_image = in_run % tiling.an_image;
      const int64_t row = in_image / tiling.wide, left = in_image % tiling.wide;
      if (in_image == 0) clear(0, n + 1);
      for (int b = 0; b < S; ++b)
        for (int64_t c = 0; c < width; c += W) {
          const float* from = scratch.sums + tile * kColumns + b * kWidth + c;
          float* to = scratch.rows + (left * m * S + b) * kWidth + c;
          transform_tile_back<Algorithm, Algorithm::B>(
              [&](int i, int j) { return load<float>(from + (i * n + j) * sums_stride); },
              [&](int i, int j, Vec<float> v) {
                float* at = to + i * row_size + j * (S * kWidth);
                v += load<float>(at);
                check.see(j, v);
                store(at, v);
              });
        }
      if (left != tiling.wide - 1) continue;
      const bool last = row == tiling.high - 1;
      const Image image =
          image_of(a.x, a.dtype, first + in_run / tiling.an_image, a.channels, a.height, a.width);
      const Window window{
          S * m * row + phase - a.pad_height, S, last ? n + 1 : m, -a.pad_width, across, kWidth};
      if (a.slope != 1)
        for (int64_t i = 0; i < window.rows * row_size; i += W)
          store(scratch.rows + i, activate(load<float>(scratch.rows + i), a.slope));
      for (int64_t c = 0; c < width; c += kSlice) write_window(scratch.rows + c, window, image, channel + c);
      if (last) continue;
      for (int64_t i = 0; i < (n - m) * row_size; ++i) scratch.rows[i] = scratch.rows[m * row_size + i];
      clear(n - m, n + 1);
    }
  }
}

template <class Algorithm, bool kForward>
void convolve(const ConvArgs& a, const Threads& threads) {
  // The sums of 128 tiles and a chunk's weights are 600 KB. Weights are transformed half as often then.
  Tiling tiling(a, Algorithm::outputs, a.second_cache >= 1 << 20 ? 2 * kTiles : kTiles);
  Side side = kForward ? Side(a.channels, Algorithm::phases, Algorithm::products, tiling)
                       : Side(a.outputs, 1, Algorithm::products, tiling);
  const int64_t run_size = side.run_size(tiling), all_runs = tiling.runs(a.batch);
  // As many runs as every thread can have alone, from the pictures to the results: what one core has written
  // and another reads may cost a third of the time. The rest are shared, so many at once that the transformed
  // tiles take about 2 MB a thread, and 4 at least.
  const int64_t each = all_runs / a.threads, alone = each * a.threads, shared = all_runs - alone;
  const int64_t budget = most(a.threads, 2) * (2 << 20) / int64_t(sizeof(float));
  const int64_t runs = least(most(1, budget / run_size), shared);
  tiling.images = runs * tiling.run;
  const int64_t sums = TaskScratch::sums_size<Algorithm>(tiling),
                weights = TaskScratch::weights_size<Algorithm>(),
                taps = TapBlock<Algorithm::kernel>::size(kColumns);
  const int64_t n = Algorithm::points, S = Algorithm::stride;
  const int64_t rows =
      kForward ? Algorithm::outputs * tiling.wide * Algorithm::outputs * kColumns
               : (n + 1) * (tiling.wide * Algorithm::outputs + n - Algorithm::outputs + 1) * kColumns;
  const int64_t scratch_size =
      whole_slices(most(sums + weights + taps + rows, gather_size(n, S, Algorithm::outputs)));
  Cutter cutter{static_cast<char*>(a.workspace)};
  Slots slots(cutter, scratch_size + (alone > 0 ? run_size : 0), a.threads);
  side.data = reinterpret_cast<float*>(cutter.take(run_size * runs * 4));
  if (!a.workspace) {
    *a.workspace_size = cutter.used;
    return;
  }
  const auto transform = [&](const Side& to, int64_t first, int64_t unit, float* data) {
    if constexpr (kForward)
      transform_x<Algorithm>(a, to, tiling, first, unit, data);
    else
      transform_y<Algorithm>(a, to, tiling, first, unit, data);
  };
  const int64_t groups = kForward ? divide_up(a.outputs, kColumns) : divide_up(a.channels, kColumns / S) * S;
  const auto multiply = [&](const Side& from, int64_t run, int64_t first, int64_t images, int64_t group,
                            float* data) {
    const TaskScratch scratch{data, data + sums, data + sums + weights + taps, data + sums + weights};
    Check check;
    if constexpr (kForward)
      forward_task<Algorithm>(a, from, tiling, run, first, images, group * kColumns, scratch, check);
    else
      input_gradient_task<Algorithm>(a, from, tiling, run, first, images, group / S * (kColumns / S),
                                     int(group % S), scratch, check);
    check.tell(a.nonfinite);
  };
  over_workers(threads, slots, each > 0 ? a.threads : 0, [&](int64_t worker, float* data) {
    Side own = side;
    own.data = data + scratch_size;
    for (int64_t run = worker * each; run < (worker + 1) * each; ++run) {
      const int64_t first = run * tiling.run, images = least(tiling.run, a.batch - first);
      for (int64_t unit = 0; unit < units_of(own, tiling, images); ++unit) transform(own, first, unit, data);
      for (int64_t group = 0; group < groups; ++group) multiply(own, 0, first, images, group, data);
    }
  });
  for (int64_t first = alone * tiling.run; first < a.batch; first += tiling.images) {
    const int64_t images = least(tiling.images, a.batch - first);
    over_slots(threads, slots, units_of(side, tiling, images),
               [&](int64_t unit, float* data) { transform(side, first, unit, data); });
    over_slots(threads, slots, tiling.runs(images) * groups, [&](int64_t task, float* data) {
      const int64_t run = task / groups, begin = run * tiling.run;
      multiply(side, run, first + begin, least(tiling.run, images - begin), task % groups, data);
    });
  }
}

using Strided = Algorithm<2, 2, 4>;  // kernel 4, stride 2: F(4,2) on the phases
using Plain = Algorithm<1, 3, 4>;    // kernel 3, stride 1: F(4,3)

}  // namespace
}  // namespace fastgan

extern "C" void FASTGAN_KERNEL(conv_forward)(const fastgan::ConvArgs& a, const fastgan::Threads& threads) {
  if (a.kernel == 4)
    fastgan::convolve<fastgan::Strided, true>(a, threads);
  else
    fastgan::convolve<fastgan::Plain, true>(a, threads);
}

extern "C" void FASTGAN_KERNEL(conv_input_gradient)(const fastgan::ConvArgs& a,
                                                    const fastgan::Threads& threads) {
  if (a.kernel == 4)
    fastgan::convolve<fastgan::Strided, false>(a, threads);
  else
    fastgan::convolve<fastgan::Plain, false>(a, threads);
}

extern "C" void FASTGAN_KERNEL(conv_weight_gradient)(const fastgan::ConvArgs& a,
                                                     const fastgan::Threads& threads) {
  if (a.kernel == 4)
    fastgan::weight_gradient<fastgan::Strided>(a, threads);
  else
    fastgan::weight_gradient<fastgan::Plain>(a, threads);
}
