// Strided and plain convolutions by Winograd's algorithm: all three passes, one set of transforms.
//
// A convolution of kernel 4 and stride 2 is one of kernel 2 and stride 1 on the four images of every second
// pixel
// ("phases"), with four times the channels; of kernel 3 and stride 1 it is what it is. On 4 × 4 tiles of
// outputs the tile algorithm of transforms.h then needs 25 products where 64 (36 where 144) would be
// multiplied directly, and every product becomes a matrix product over channels (or, for the weights, over
// tiles), one for each of the points:
//
//   forward           y = Aᵀ [ (B x Bᵀ) · (G w Gᵀ) ] A     sum over channels and phases
//   input gradient    x = Bᵀ [ (A y Aᵀ) · (G w Gᵀ) ] B     sum over outputs; 5 × 5 tiles that overlap by one
//   are added weight gradient   w = Gᵀ [ (B x Bᵀ) · (A y Aᵀ) ] G     sum over tiles
//
// Work goes in two steps, for so many images at a time that the transformed tiles stay in the last cache:
//   1. transform the tiles of x and/or y; vectors run over 16 channels of one tile. Stored by blocks of at
//   most
//      kTiles tiles (or twice that) and of kDepth channels: (block, channels, point, tile, channel).
//   2. each task takes 32 columns (outputs, or channels and phases). It keeps their products of a block for
//   all
//      points in the second cache, walks through the depth in chunks of kDepth, for each of which it
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
// Numerics: every sum has one order that depends on no cut of the work, so the bits are the same for any
// number of threads and any size of workspace. An infinity or NaN would spread over its tile: it is seen
// where results are written, and the caller is told to compute directly.
#include "conv/conv.h"

#include "conv/layout.h"
#include "conv/products.h"
#include "conv/scratch.h"
#include "conv/transforms.h"

namespace fastgan {
namespace {

constexpr int64_t kDepth = 64;    // channels (times phases) of a chunk
constexpr int64_t kColumns = 32;  // of a task
constexpr int64_t kTiles = 64;    // of a block, at most; twice as many where the second cache is large
constexpr int64_t kGap = 16;   // numbers between points, so that they fall into different sets of the caches
constexpr int64_t kPiece = 4;  // tiles that are read at once in step 1

template <int kStride, int kTaps, int kOutputs>
struct Algorithm : Toom<kOutputs, kTaps> {
  using Base = Toom<kOutputs, kTaps>;
  static constexpr int stride = kStride, taps = kTaps, outputs = kOutputs;
  static constexpr int kernel = kStride * kTaps, phases = kStride * kStride;
  static constexpr int products = Base::points * Base::points;
  static constexpr auto A = Base::a();
  static constexpr auto B = Base::b();
  static constexpr auto G = Base::g();
};

// How tiles are counted: `images` at a time, in runs of `run` images that make `blocks` blocks of `tiles`
// tiles.
struct Tiling {
  int64_t high, wide, an_image, run, blocks, tiles, images;

  Tiling(const ConvArgs& args, int64_t outputs, int64_t most_tiles) {
    high = divide_up(args.out_height, outputs), wide = divide_up(args.out_width, outputs);
    an_image = high * wide;
    run = an_image < most_tiles ? least(most_tiles / an_image, args.batch) : 1;
    blocks = divide_up(run * an_image, most_tiles);
    tiles = divide_up(run * an_image, blocks);
    images = 0;
  }
  int64_t runs(int64_t count) const { return divide_up(count, run); }
  // tiles of block b of a run of `count` images
  int64_t tiles_of(int64_t b, int64_t count) const {
    return most(0, least(tiles, count * an_image - b * tiles));
  }
};

// The transformed tiles of one operand.
struct Side {
  float* data = nullptr;
  int64_t channels, slices, most_deep, chunks, depth, chunk_size;

  Side(int64_t count, int64_t phases, int64_t products, const Tiling& tiling, int64_t most_deep = kDepth)
      : most_deep(most_deep) {
    channels = count;
    slices = divide_up(count, kSlice);
    depth = slices * kSlice * phases;
    chunks = divide_up(depth, most_deep);
    chunk_size = products * (tiling.tiles * most_deep + kGap);
  }
  int64_t depth_of(int64_t chunk) const { return least(most_deep, depth - chunk * most_deep); }
  int64_t point_stride(int64_t chunk, const Tiling& tiling) const {
    return tiling.tiles * depth_of(chunk) + kGap;
  }
  float* at(int64_t block, int64_t chunk) const { return data + (block * chunks + chunk) * chunk_size; }
  int64_t run_size(const Tiling& tiling) const { return tiling.blocks * chunks * chunk_size; }
  // The same with memory for one chunk alone.
  Side only(int64_t chunk) const {
    Side out = *this;
    out.data -= chunk * chunk_size, out.chunks = 1;
    return out;
  }
  int64_t first_slice(int64_t chunk) const { return chunk * most_deep * slices / depth; }
  int64_t slices_of(int64_t chunk) const { return depth_of(chunk) * slices / depth; }
};

// ---- step 1 ----

constexpr int64_t gather_size(int64_t size, int64_t stride, int64_t outputs) {
  return size * stride * ((kPiece - 1) * outputs + size) * stride * kSlice;
}

// Tiles [tile, tile + count) of a row of tiles, one slice of channels: read, transform, store.
template <class Algorithm, auto kMatrix, int kStride>
void transform_piece(const Image& image, const Side& side, const Tiling& tiling, int64_t image_in_block,
                     int64_t tile_row, int64_t tile, int64_t count, int64_t slice, int64_t pad_height,
                     int64_t pad_width, float* scratch) {
  constexpr int W = lanes<float>, m = Algorithm::outputs;
  constexpr int size = sizeof(kMatrix.at[0]) / sizeof(float), n = Algorithm::points;
  Window window{};
  window.row0 = kStride * m * tile_row - pad_height, window.row_step = 1, window.rows = size * kStride;
  window.column0 = kStride * m * tile - pad_width, window.columns = ((count - 1) * m + size) * kStride;
  window.pixel_stride = kSlice;
  read_window(image, slice * kSlice, window, scratch);
  const int64_t chunk = slice * kSlice * kStride * kStride / side.most_deep;
  const int64_t offset = slice * kSlice * kStride * kStride % side.most_deep;
  const int64_t depth = side.depth_of(chunk), point_stride = side.point_stride(chunk, tiling);
  const int64_t run = image_in_block / tiling.run;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t in_run = image_in_block % tiling.run * tiling.an_image + tile_row * tiling.wide + tile + t;
    float* to =
        side.at(run * tiling.blocks + in_run / tiling.tiles, chunk) + in_run % tiling.tiles * depth + offset;
    for (int a = 0; a < kStride; ++a)
      for (int b = 0; b < kStride; ++b)
        for (int c = 0; c < kSlice; c += W) {
          const float* from = scratch + (a * window.columns + t * m * kStride + b) * kSlice + c;
          float* out = to + (a * kStride + b) * kSlice + c;
          transform_tile<Algorithm, kMatrix>(
              [&](int i, int j) { return load<float>(from + (i * window.columns + j) * (kStride * kSlice)); },
              [&](int i, int j, Vec<float> v) { store(out + (i * n + j) * point_stride, v); });
        }
  }
}

// What is transformed: the images and how they are read.
struct Source {
  const ConvTensor& tensor;
  Dtype dtype;
  int64_t height, width, pad_height, pad_width;
};

// A unit is one piece of a row of tiles in one slice of channels.
inline int64_t units_of(const Side& side, const Tiling& tiling, int64_t images) {
  return images * tiling.high * divide_up(tiling.wide, kPiece) * side.slices;
}

template <class Algorithm, auto kMatrix, int kStride>
void transform_unit(const Source& source, const Side& side, const Tiling& tiling, int64_t first, int64_t unit,
                    float* scratch) {
  const int64_t pieces = divide_up(tiling.wide, kPiece);
  const int64_t slice = unit % side.slices, piece = unit / side.slices % pieces;
  const int64_t row = unit / side.slices / pieces % tiling.high,
                i = unit / side.slices / pieces / tiling.high;
  transform_piece<Algorithm, kMatrix, kStride>(
      image_of(source.tensor, source.dtype, first + i, side.channels, source.height, source.width), side,
      tiling, i, row, piece * kPiece, least(kPiece, tiling.wide - piece * kPiece), slice, source.pad_height,
      source.pad_width, scratch);
}

template <class Algorithm>
void transform_x(const ConvArgs& a, const Side& side, const Tiling& tiling, int64_t first, int64_t unit,
                 float* scratch) {
  const Source x{a.x, a.dtype, a.height, a.width, a.pad_height, a.pad_width};
  transform_unit<Algorithm, Algorithm::B, Algorithm::stride>(x, side, tiling, first, unit, scratch);
}

template <class Algorithm>
void transform_y(const ConvArgs& a, const Side& side, const Tiling& tiling, int64_t first, int64_t unit,
                 float* scratch) {
  const Source y{a.y, a.dtype, a.out_height, a.out_width, 0, 0};
  transform_unit<Algorithm, Algorithm::A, 1>(y, side, tiling, first, unit, scratch);
}

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
  const int64_t alone = all_runs / a.threads * a.threads, shared = all_runs - alone;
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
  const int64_t each = alone / a.threads;
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

// ---- step 2, weight gradient ----

template <class Algorithm>
void finish_weight_gradient(const ConvArgs& a, int64_t chunk, int64_t depth, int64_t output, int64_t columns,
                            const float* sums, float* taps, Check& check) {
  constexpr int W = lanes<float>, S = Algorithm::stride, n = Algorithm::points, kernel = Algorithm::kernel;
  const Weights w{a.dtype,        a.w.data,   a.w.strides[0], a.outputs,
                  a.w.strides[1], a.channels, a.w.strides[2], a.w.strides[3]};
  for (int64_t first = 0; first < depth / Algorithm::phases; first += kSlice) {
    const TapBlock<kernel> block{taps, chunk * kDepth / Algorithm::phases + first, output, columns};
    for (int64_t c = 0; c < kSlice; ++c)
      for (int p = 0; p < S * S; ++p)
        for (int64_t k = 0; k < columns; k += W) {
          const float* from = sums + (first * S * S + p * kSlice + c) * kColumns + k;
          transform_tile_back<Algorithm, Algorithm::G>(
              [&](int i, int j) { return load<float>(from + (i * n + j) * (kDepth * kColumns + kGap)); },
              [&](int u, int v, Vec<float> value) {
                check.see(v, value);
                store(block.at(c, (S * u + p / S) * kernel + S * v + p % S) + k, value);
              });
        }
    write_taps(w, block);
  }
}

// sums (points, depth, columns) of one task = the products over the tiles of `images` images, added to those
// before.
template <class Algorithm>
void multiply_tiles(const Side& x, const Side& y, const Tiling& tiling, int64_t images, int64_t chunk,
                    int64_t y_chunk, int64_t columns, float* sums, bool add) {
  const int64_t depth = x.depth_of(chunk), y_depth = y.depth_of(y_chunk);
  const int64_t step = x.point_stride(chunk, tiling), y_step = y.point_stride(y_chunk, tiling);
  for (int64_t run = 0; run < tiling.runs(images); ++run)
    for (int64_t block = 0; block < tiling.blocks; ++block) {
      const int64_t tiles = tiling.tiles_of(block, least(tiling.run, images - run * tiling.run));
      if (tiles == 0) continue;
      const float* rows = x.at(run * tiling.blocks + block, chunk);
      const float* right = y.at(run * tiling.blocks + block, y_chunk);
      for (int64_t p = 0; p < Algorithm::products; ++p) {
        Ahead ahead;
        if (p + 1 < Algorithm::products)
          ahead = {rows + (p + 1) * step, right + (p + 1) * y_step, tiles * depth, tiles * y_depth};
        multiply_point<true>(depth, columns, tiles, rows + p * step, depth, right + p * y_step, y_depth,
                             sums + p * (kDepth * kColumns + kGap), kColumns, add, ahead);
      }
      add = true;
    }
}

// How the weight gradient is cut. Tasks are (64 numbers of depth, 32 outputs), each with sums of its own.
//   parts   where all sums are few: the images are parted, each part has its own sums, for a thread alone
//   from
//           the pictures to the sums, which are added at the end. Cut by shape: the order of additions
//           depends on it.
//   chunks  otherwise each thread has every so many-th chunk of depth alone, and shares what comes of y;
//   shared  where there are too few of them for the threads, all is shared.
template <class Algorithm>
struct WeightCut {
  static constexpr int64_t kSums = Algorithm::products * (kDepth * kColumns + kGap);
  static constexpr int64_t kTaps = TapBlock<Algorithm::kernel>::size(kColumns);
  Tiling tiling;
  Side x, y;  // y in chunks of a task's columns: in rows of twice those, its lines would all fall into half
              // of a cache's sets
  int64_t groups, tasks, parts, part_images, runs, workers, x_size, y_size, scratch;
  bool by_parts, by_chunks, once;

  explicit WeightCut(const ConvArgs& a)
      : tiling(a, Algorithm::outputs, kTiles),  // always: how far a chain of additions goes depends on it
        x(a.channels, Algorithm::phases, Algorithm::products, tiling),
        y(a.outputs, 1, Algorithm::products, tiling, kColumns) {
    constexpr int64_t kMegabyte = (1 << 20) / int64_t(sizeof(float));
    groups = divide_up(a.outputs, kColumns), tasks = x.chunks * groups;
    const int64_t all_runs = tiling.runs(a.batch), all_sums = tasks * kSums;
    parts = least(all_sums <= kMegabyte ? 4 : all_sums <= 4 * kMegabyte ? 2 : 1, all_runs);
    part_images = divide_up(all_runs, parts) * tiling.run;
    parts = divide_up(a.batch, part_images);
    by_parts = parts > 1 && parts % a.threads == 0;
    by_chunks = !by_parts && (x.chunks % a.threads == 0 || x.chunks >= 4 * a.threads);
    workers = by_parts || by_chunks ? a.threads : 1;
    x_size = by_chunks ? tiling.blocks * x.chunk_size : x.run_size(tiling), y_size = y.run_size(tiling);
    // Where the tiles do not all fit, the sums wait in memory for the next ones: at least half as many
    // numbers of tiles at once as there are sums.
    const int64_t a_run = by_chunks ? workers * x_size + y_size : x_size + y_size;
    const int64_t all_fit = by_chunks ? 12 * kMegabyte : 0;
    const int64_t budget = most((by_parts ? 1 : most(a.threads, 2)) * 2 * kMegabyte, all_sums / 2);
    const int64_t part_runs = part_images / tiling.run;
    runs = part_runs * a_run <= all_fit ? part_runs : least(most(1, budget / a_run), part_runs);
    tiling.images = runs * tiling.run;
    once = parts == 1 && runs == part_runs;
    scratch = whole_slices(most(kTaps + (once ? kSums : 0),
                                gather_size(Algorithm::points, Algorithm::stride, Algorithm::outputs)));
  }
  int64_t chunk_of(int64_t task) const { return task / groups; }
  int64_t output_of(int64_t task) const { return task % groups * kColumns; }
  int64_t columns_of(const ConvArgs& a, int64_t task) const {
    return least(kColumns, whole_slices(a.outputs - output_of(task)));
  }
};

template <class Algorithm>
void weight_gradient(const ConvArgs& a, const Threads& threads) {
  using Cut = WeightCut<Algorithm>;
  constexpr int64_t kSums = Cut::kSums;
  Cut cut(a);
  const Tiling& tiling = cut.tiling;
  Cutter cutter{static_cast<char*>(a.workspace)};
  Slots slots(cutter, cut.scratch, a.threads);
  const auto take = [&](int64_t floats) { return reinterpret_cast<float*>(cutter.take(floats * 4)); };
  const int64_t x_size = cut.runs * cut.x_size, y_size = cut.runs * cut.y_size;  // of a worker
  float* x_data = take(cut.workers * x_size);
  float* y_data = take((cut.by_parts ? cut.workers : 1) * y_size);
  float* waiting = cut.once ? nullptr : take(cut.parts * cut.tasks * kSums);
  if (!a.workspace) {
    *a.workspace_size = cutter.used;
    return;
  }
  cut.x.data = x_data, cut.y.data = y_data;
  const auto sums_of = [&](int64_t part, int64_t task) {
    return waiting + (part * cut.tasks + task) * kSums;
  };
  const auto multiply = [&](const Side& x, const Side& y, int64_t images, int64_t task, float* sums,
                            bool add) {
    multiply_tiles<Algorithm>(x, y, tiling, images, cut.chunk_of(task), task % cut.groups,
                              cut.columns_of(a, task), sums, add);
  };
  const auto finish = [&](int64_t task, const float* sums, float* taps) {
    Check check;
    finish_weight_gradient<Algorithm>(a, cut.chunk_of(task), cut.x.depth_of(cut.chunk_of(task)),
                                      cut.output_of(task), cut.columns_of(a, task), sums, taps, check);
    check.tell(a.nonfinite);
  };
  const auto multiply_or_finish = [&](const Side& x, int64_t part, int64_t images, int64_t task, float* data,
                                      bool add) {
    float* sums = cut.once ? data + Cut::kTaps : sums_of(part, task);
    multiply(x, cut.y, images, task, sums, add);
    if (cut.once) finish(task, sums, data);
  };
  if (cut.by_parts)
    over_workers(threads, slots, cut.workers, [&](int64_t worker, float* data) {
      Side x = cut.x, y = cut.y;
      x.data += worker * x_size, y.data += worker * y_size;
      for (int64_t part = worker; part < cut.parts; part += cut.workers) {
        const int64_t begin = part * cut.part_images, end = least(a.batch, begin + cut.part_images);
        for (int64_t first = begin; first < end; first += tiling.images) {
          const int64_t images = least(tiling.images, end - first);
          for (int64_t unit = 0; unit < units_of(x, tiling, images); ++unit)
            transform_x<Algorithm>(a, x, tiling, first, unit, data);
          for (int64_t unit = 0; unit < units_of(y, tiling, images); ++unit)
            transform_y<Algorithm>(a, y, tiling, first, unit, data);
          for (int64_t task = 0; task < cut.tasks; ++task)
            multiply(x, y, images, task, sums_of(part, task), first > begin);
        }
      }
    });
  for (int64_t part = 0; !cut.by_parts && part < cut.parts; ++part) {
    const int64_t begin = part * cut.part_images, end = least(a.batch, begin + cut.part_images);
    for (int64_t first = begin; first < end; first += tiling.images) {
      const int64_t images = least(tiling.images, end - first);
      over_slots(threads, slots, units_of(cut.y, tiling, images), [&](int64_t unit, float* data) {
        transform_y<Algorithm>(a, cut.y, tiling, first, unit, data);
      });
      if (cut.by_chunks) {
        over_workers(threads, slots, cut.workers, [&](int64_t worker, float* data) {
          for (int64_t chunk = worker; chunk < cut.x.chunks; chunk += cut.workers) {
            Side x = cut.x.only(chunk);
            x.data += worker * x_size;
            const int64_t here = x.slices_of(chunk), units = units_of(x, tiling, images) / x.slices * here;
            for (int64_t unit = 0; unit < units; ++unit)
              transform_x<Algorithm>(a, x, tiling, first,
                                     unit / here * x.slices + x.first_slice(chunk) + unit % here, data);
            for (int64_t task = chunk * cut.groups; task < (chunk + 1) * cut.groups; ++task)
              multiply_or_finish(x, part, images, task, data, first > begin);
          }
        });
        continue;
      }
      over_slots(threads, slots, units_of(cut.x, tiling, images), [&](int64_t unit, float* data) {
        transform_x<Algorithm>(a, cut.x, tiling, first, unit, data);
      });
      over_slots(threads, slots, cut.tasks, [&](int64_t task, float* data) {
        multiply_or_finish(cut.x, part, images, task, data, first > begin);
      });
    }
  }
  if (cut.once) return;
  over_slots(threads, slots, cut.tasks, [&](int64_t task, float* data) {
    constexpr int W = lanes<float>;
    float* sums = sums_of(0, task);
    for (int64_t part = 1; part < cut.parts; ++part) {
      const float* more = sums_of(part, task);
      for (int64_t i = 0; i < kSums; i += W) store(sums + i, load<float>(sums + i) + load<float>(more + i));
    }
    finish(task, sums, data);
  });
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
