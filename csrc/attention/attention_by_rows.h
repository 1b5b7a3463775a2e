// How the forward is cut. A piece of work is one head of one batch and up to Pass::kChunk query rows; for
// each block of up to Pass::kKeys keys, packed once for the piece, and each block of up to Pass::kRows query
// rows, a tile.
//
// A Pass says what is computed:
//
//   Storage, T, kChunk, kRows, kKeys; kUnit, of the maxima in a natural logarithm's
//   Scratch   with output (rows, value_width, a stride), maximum, total
//   pack_rows(a, s, batch, head, row0, rows)
//   pack_keys(a, s, batch, kv_head, key0, keys)
//   tile(a, s, t, block, keys)   scores, softmax and their product with the values, for rows from `block` of
//   the piece
#pragma once
#include "attention/attention_tiles.h"

namespace fastgan {
namespace {

template <class Pass>
void rows_piece(const AttentionArgs& a, typename Pass::Scratch& s, int64_t batch, int64_t head, int64_t row0,
                int64_t rows) {
  using Storage = typename Pass::Storage;
  using T = typename Pass::T;
  const int64_t kv_head = head / (a.heads / a.kv_heads);
  Pass::pack_rows(a, s, batch, head, row0, rows);
  for (int64_t r = 0; r < rows; ++r) s.maximum[r] = -infinity<T>(), s.total[r] = T(0);
  for (int64_t i = 0; i < rows * s.value_width; ++i) s.output[i] = T(0);

  int64_t end = a.is_causal ? smaller(a.columns, seen_columns(a, row0 + rows, 0)) : a.columns;
  for (int64_t key0 = 0; key0 < end; key0 += Pass::kKeys) {
    const Range seen =
        visible<Storage>(a, Tile{batch, head, row0, key0, rows, smaller(Pass::kKeys, end - key0)});
    const int64_t first = key0 + seen.begin, keys = seen.end - seen.begin;
    if (keys <= 0) continue;
    Pass::pack_keys(a, s, batch, kv_head, first, keys);
    for (int64_t block = 0; block < rows; block += Pass::kRows) {
      Tile t{batch, head, row0 + block, first, smaller(Pass::kRows, rows - block), keys};
      if (a.is_causal) t.columns = smaller(keys, seen_columns(a, t.row + t.rows, first));
      if (t.columns > 0 && (a.mask.data || a.bias.data))
        t.columns = smaller(t.columns, visible<Storage>(a, t).end);
      if (t.columns > 0) Pass::tile(a, s, t, block, keys);
    }
  }
  T kept_scale = a.has_dropout ? T(a.kept_scale) : T(1);
  double* logsumexp = a.logsumexp + row_index(a, batch, head, row0);
  for (int64_t r = 0; r < rows; ++r) {
    bool dead = s.total[r] == T(0);
    T factor = dead ? T(0) : kept_scale / s.total[r];
    store_row<T>(s.output + r * s.value_width, factor, a.value_width,
                 at<Storage>(a.output, batch, head, row0 + r));
    logsumexp[r] =
        dead ? -infinity<double>() : double(s.maximum[r]) * Pass::kUnit + std::log(double(s.total[r]));
  }
}

template <class Pass>
void run_by_rows(const AttentionArgs& a, const Threads& threads) {
  using Storage = typename Pass::Storage;
  constexpr int64_t kChunk = Pass::kChunk;
  auto chunks_of = [](const AttentionArgs& one) { return (one.rows + kChunk - 1) / kChunk; };
  auto cut = [&](const AttentionArgs& one) -> Pieces {
    int64_t cost = smaller(one.rows, kChunk) * one.columns * (one.width + one.value_width + 16);
    return {one.heads * chunks_of(one), cost};
  };
  in_pieces<Storage>(a, threads, a.batch, cut, [&](auto for_each) {
    typename Pass::Scratch scratch(a);
    if (!allocate(scratch, a)) return;
    for_each([&](const AttentionArgs& one, int64_t batch, int64_t piece) {
      const int64_t chunks = chunks_of(one), row = in_turn(one, piece % chunks, chunks) * kChunk;
      rows_piece<Pass>(one, scratch, batch, piece / chunks, row, smaller(kChunk, one.rows - row));
    });
    release(scratch);
  });
}

}  // namespace
}  // namespace fastgan
