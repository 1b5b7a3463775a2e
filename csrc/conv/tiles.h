// Step 1 of conv_cpu.cpp: how tiles are counted, where their transforms lie, and the transforms of x and y.
#pragma once
#include "conv/conv.h"
#include "conv/layout.h"
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

// A unit is one piece of a row of tiles in one slice of channels.
inline int64_t units_of(const Side& side, const Tiling& tiling, int64_t images) {
  return images * tiling.high * divide_up(tiling.wide, kPiece) * side.slices;
}

template <class Algorithm, auto kMatrix, int kStride, class ImageAt>
void transform_unit(const ImageAt& image_at, int64_t pad_height, int64_t pad_width, const Side& side,
                    const Tiling& tiling, int64_t first, int64_t unit, float* scratch) {
  const int64_t pieces = divide_up(tiling.wide, kPiece);
  const int64_t slice = unit % side.slices, piece = unit / side.slices % pieces;
  const int64_t row = unit / side.slices / pieces % tiling.high,
                i = unit / side.slices / pieces / tiling.high;
  transform_piece<Algorithm, kMatrix, kStride>(image_at(first + i), side, tiling, i, row, piece * kPiece,
                                               least(kPiece, tiling.wide - piece * kPiece), slice, pad_height,
                                               pad_width, scratch);
}

template <class Algorithm>
void transform_x(const ConvArgs& a, const Side& side, const Tiling& tiling, int64_t first, int64_t unit,
                 float* scratch) {
  const auto x = [&](int64_t n) { return image_of(a.x, a.dtype, n, a.channels, a.height, a.width); };
  transform_unit<Algorithm, Algorithm::B, Algorithm::stride>(x, a.pad_height, a.pad_width, side, tiling,
                                                             first, unit, scratch);
}

template <class Algorithm>
void transform_y(const ConvArgs& a, const Side& side, const Tiling& tiling, int64_t first, int64_t unit,
                 float* scratch) {
  const auto y = [&](int64_t n) { return image_of_y(a, n); };
  transform_unit<Algorithm, Algorithm::A, 1>(y, 0, 0, side, tiling, first, unit, scratch);
}

}  // namespace
}  // namespace fastgan
