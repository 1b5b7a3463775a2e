// Matrix products by AMX. A piece of work is a block of C, up to kBlockRows × kBlockColumns; its depth goes
// by in parts of up to kBlockDepth. For each part B's block is packed into pairs, which stay in the second
// cache; then strips of 32 rows of A, read where they lie if they are whole tiles side by side, go through
// all its columns. By count packing costs B about 0.1 cycle a number for the 1 that it is multiplied in (512
// rows at 512 multiply-adds a cycle), A, where its columns are side by side, as much for 0.5.
#include "product/product.h"

#include <cstdlib>

#include "common/amx.h"

namespace {

using namespace fastgan;

constexpr int64_t kBlockRows = 512, kBlockColumns = 256, kBlockDepth = 1024, kStrip = 2 * kTile;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t parts_of(int64_t whole, int64_t most) { return (whole + most - 1) / most; }

// A matrix, or a part of one.
struct Matrix {
  const bfloat16* data;
  int64_t stride[2], size[2];
  Matrix part(int64_t row, int64_t column, int64_t rows, int64_t columns) const {
    return {data + row * stride[0] + column * stride[1], {stride[0], stride[1]}, {rows, columns}};
  }
  Matrix transposed() const { return {data, {stride[1], stride[0]}, {size[1], size[0]}}; }
  // Rows of whole tiles: these, or packed into `room`, zero beyond.
  Matrix whole(bfloat16* room) const {
    const TileRows rows = tile_rows(data, stride[0], stride[1], size[0], size[1], room);
    return {rows.data, {rows.stride, 1}, {whole_tiles(size[0]), whole_tiles(size[1])}};
  }
};

void pack_right(const Matrix& b, bfloat16* room, bfloat16* pairs) {
  const bool by_columns = b.stride[1] != 1 && b.stride[0] == 1;
  const Matrix m = (by_columns ? b.transposed() : b).whole(room);
  (by_columns ? pack_transposed_pairs : pack_pairs)(m.data, m.stride[0], m.size[0], m.size[1], pairs);
}

Matrix left_strip(const Matrix& a, bfloat16* room, bfloat16* strip) {
  if (a.stride[1] == 1 || a.stride[0] != 1) return a.whole(strip);
  const Matrix m = a.transposed().whole(room);
  pack_transposed_rows(m.data, m.stride[0], m.size[0], m.size[1], strip, m.size[0]);
  return {strip, {m.size[0], 1}, {m.size[1], m.size[0]}};
}

// Sums of a row to C's.
template <class S>
void write_row(const float* sums, bool add, int64_t count, S* c) {
  int64_t j = 0;
  for (; j + kTile <= count; j += kTile) {
    Vec<float> value = load<float>(sums + j);
    if (add) value += load<float>(c + j);
    store(c + j, value);
  }
  for (; j < count; ++j) store1(c + j, sums[j] + (add ? load1<float>(c + j) : 0));
}

template <class S>
void multiply_matrices(const ProductArgs& p, const Threads& threads) {
  const Matrix a{p.a, {p.a_stride[0], p.a_stride[1]}, {p.rows, p.depth}};
  const Matrix b{p.b, {p.b_stride[0], p.b_stride[1]}, {p.depth, p.columns}};
  // Narrower blocks where there would be few of them.
  const int64_t row_blocks = parts_of(p.rows, kBlockRows);
  int64_t width = kBlockColumns;
  while (width > 64 && row_blocks * parts_of(p.columns, width) < 16) width /= 2;
  const int64_t column_blocks = parts_of(p.columns, width);
  const int64_t height = smaller(whole_tiles(parts_of(p.rows, row_blocks + !row_blocks)), kBlockRows);
  const int64_t parts = parts_of(p.depth, kBlockDepth);
  const int64_t depth = whole_tiles(parts_of(p.depth, parts + !parts));
  const int64_t cost = height * width * (p.depth + 1) / 16;
  parallel_for(threads, row_blocks * column_blocks, 1 + 200000 / (cost + 1), [&](int64_t begin, int64_t end) {
    const int64_t sums_rows = parts > 1 ? height : kStrip;
    const int64_t in_room = depth * (width > kStrip ? width : kStrip), in_strip = kStrip * depth;
    const size_t bytes = size_t(4 * sums_rows * width + 2 * (2 * in_room + in_strip));
    auto* sums = static_cast<float*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    if (!sums) return __atomic_store_n(p.out_of_memory, true, __ATOMIC_RELAXED);
    auto* pairs = reinterpret_cast<bfloat16*>(sums + sums_rows * width);
    bfloat16 *room = pairs + in_room, *strip_room = room + in_room;
    begin_tiles();
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t row = piece % row_blocks * height, column = piece / row_blocks * width;
      const int64_t rows = smaller(height, p.rows - row), columns = smaller(width, p.columns - column);
      const int64_t whole = whole_tiles(columns);
      for (int64_t part = 0; part < parts || part == 0; ++part) {
        const int64_t first = part * depth, deep = smaller(depth, p.depth - first);
        pack_right(b.part(first, column, deep, columns), room, pairs);
        for (int64_t i = 0; i < rows; i += kStrip) {
          const int64_t count = smaller(kStrip, rows - i);
          const Matrix strip = left_strip(a.part(row + i, first, count, deep), room, strip_room);
          float* to = parts > 1 ? sums + i * whole : sums;
          const TileProduct product{
              kStrip, whole, strip.size[1], strip.data, strip.stride[0], pairs, strip.size[1] * kTile,
              to,     whole};
          multiply(part > 0, product);
          if (part + 1 < parts) continue;
          for (int64_t r = 0; r < count; ++r)
            write_row(to + r * whole, p.add, columns,
                      static_cast<S*>(p.c) + (row + i + r) * p.c_stride + column);
        }
      }
    }
    end_tiles();
    std::free(sums);
  });
}

}  // namespace

extern "C" void fastgan_product_amx(const ProductArgs& p, const Threads& threads) {
  if (p.c_is_bfloat16)
    multiply_matrices<bfloat16>(p, threads);
  else
    multiply_matrices<float>(p, threads);
}
