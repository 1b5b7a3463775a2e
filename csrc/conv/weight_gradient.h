// Step 2 of conv_cpu.cpp for the weight gradient: sums over tiles.
#pragma once
#include "conv/products.h"
#include "conv/tiles.h"

namespace fastgan {
namespace {

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
//   parts   where all sums are few: the images are parted, and each part has sums of its own, for a thread
//           alone from the pictures on; they are added at the end. Cut by shape: the order of additions
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
  cut.x.data = take(cut.workers * x_size);
  cut.y.data = take((cut.by_parts ? cut.workers : 1) * y_size);
  float* waiting = cut.once ? nullptr : take(cut.parts * cut.tasks * kSums);
  if (!a.workspace) {
    *a.workspace_size = cutter.used;
    return;
  }
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

}  // namespace
}  // namespace fastgan
