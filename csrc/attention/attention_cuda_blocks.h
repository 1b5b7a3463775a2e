// Where a block of the CUDA kernels of attention is, and the tiles that go by it.
#pragma once
#include <type_traits>

#include "attention/attention_cuda.h"

namespace fastgan {
namespace {

// ---- a block's place, by its number: (batch · heads + head) · blocks + block ----

// `Tiling::rows` query rows of a head, a warp's from `warp_row` on.
template <class Tiling>
struct RowsOfBlock {
  int batch, head, kv_head, row0, warp_row;
  // `reversed`: the last rows first, which under is_causal have the most work.
  FASTGAN_DEVICE RowsOfBlock(const AttentionArgs& args, const Plan& plan, bool reversed = false)
      : RowsOfBlock(args, plan, reversed, int(blockIdx.x)) {}
  FASTGAN_DEVICE RowsOfBlock(const AttentionArgs& args, const Plan& plan, bool reversed, int number) {
    int block;
    batch = divide(divide(number, plan.row_blocks, block), int(args.heads), head);
    if (reversed) block = plan.row_blocks - 1 - block;
    row0 = block * Tiling::rows;
    warp_row = row0 + int(threadIdx.x) / kWarp * (Tiling::rows / Tiling::warps);
    kv_head = head / int(args.heads / args.kv_heads);
  }
};

// `Tiling::rows` keys of a head, a warp's from `warp_key` on; `group` heads of the queries see them.
template <class Tiling>
struct KeysOfBlock {
  int batch, kv_head, key0, warp_key, group;
  FASTGAN_DEVICE KeysOfBlock(const AttentionArgs& args, const Plan& plan) {
    int block;
    batch = divide(divide(int(blockIdx.x), plan.key_blocks, block), int(args.kv_heads), kv_head);
    key0 = block * Tiling::rows;
    warp_key = key0 + int(threadIdx.x) / kWarp * (Tiling::rows / Tiling::warps);
    group = int(args.heads / args.kv_heads);
  }
};

// ---- the tiles that go by ----

// Of N keys from `begin` to `end`, past a block of query rows. `find` is the first tile from `at` on in which
// something is visible.
template <class Tiling>
struct TilesOfKeys {
  using At = int;
  const AttentionArgs& args;
  const TileMap& map;
  const RowsOfBlock<Tiling>& of;
  int begin = 0, end;
  FASTGAN_DEVICE TilesOfKeys(const AttentionArgs& args, const Plan& plan, const RowsOfBlock<Tiling>& of)
      : args(args), map(plan.map), of(of), end(int(args.columns)) {
    const int seen = of.row0 + Tiling::rows + int(args.diagonal);
    if (args.is_causal && seen < end) end = seen;
  }
  FASTGAN_DEVICE At first() const { return begin; }
  FASTGAN_DEVICE At after(At at) const { return at + Tiling::N; }
  FASTGAN_DEVICE bool has(At at) const { return at < end; }
  FASTGAN_DEVICE At find(At at, int& seen) const {
    for (; at < end; at += Tiling::N) {
      seen = seen_of(map, args, of.batch, of.head, of.row0, Tiling::rows, at, Tiling::N);
      if (seen != kNothing) break;
    }
    return at;
  }
};

// The first of N rows that some of the keys from `key` on are visible to.
template <int N>
FASTGAN_DEVICE int first_row_that_sees(const AttentionArgs& args, int key) {
  const int row = key - int(args.diagonal);
  return args.is_causal && row > 0 ? row / N * N : 0;
}

// Of N query rows, past a block of keys; the heads that share these come one after the other.
template <class Tiling>
struct TilesOfRows {
  struct At {
    int head, tile;  // the head within the group
  };
  const AttentionArgs& args;
  const TileMap& map;
  const KeysOfBlock<Tiling>& of;
  int begin, end;
  FASTGAN_DEVICE TilesOfRows(const AttentionArgs& args, const Plan& plan, const KeysOfBlock<Tiling>& of)
      : args(args),
        map(plan.map),
        of(of),
        begin(first_row_that_sees<Tiling::N>(args, of.key0)),
        end(int(args.rows)) {}
  FASTGAN_DEVICE At first() const { return {0, begin}; }
  FASTGAN_DEVICE At after(At at) const { return {at.head, at.tile + Tiling::N}; }
  FASTGAN_DEVICE bool has(At at) const { return at.head < of.group; }
  FASTGAN_DEVICE At find(At at, int& seen) const {
    for (; at.head < of.group; ++at.head, at.tile = begin)
      for (; at.tile < end; at.tile += Tiling::N) {
        seen = seen_of(map, args, of.batch, of.kv_head * of.group + at.head, at.tile, Tiling::N, of.key0,
                       Tiling::rows);
        if (seen != kNothing) return at;
      }
    return at;
  }
};

// work(at, stage, look) for each of the tiles, once load(at, stage) has brought it to shared memory; `look`:
// the mask hides a part of it. In two stages the next tile comes by asynchronous copies while this one is
// worked on, and a tile costs one barrier. What the block loaded before is there with the first tile.
template <class Tiling, class Tiles, class Load, class Work>
FASTGAN_DEVICE void go_through(const Tiles& tiles, Load load, Work work) {
  constexpr int Stages = Tiling::stages;
  int seen = kAll, stage = 0;
  typename Tiles::At at = tiles.find(tiles.first(), seen);
  if (Stages == 2 && tiles.has(at)) load(at, 0);
  async_commit();
  while (tiles.has(at)) {
    const bool look = tiles.args.mask.data && seen == kSome;
    if (Stages == 1) {
      load(at, 0);
      async_commit();
    }
    async_wait<0>();
    if constexpr (Tiling::warpgroups) fence_shared();
    block_sync();  // the tile is there, and nobody is at the former one any more
    const typename Tiles::At following = tiles.find(tiles.after(at), seen);
    if (Stages == 2 && tiles.has(following)) {
      load(following, stage ^ 1);
      async_commit();
    }
    work(at, stage, look);
    if (Stages == 1) block_sync();
    at = following;
    if (Stages == 2) stage ^= 1;
  }
}

// ---- host ----

// Launches the keys' kernel: launch(key, value) for both gradients at once or, where the sums of the two do
// not fit in registers together, for each of them. The arguments are constants, std::bool_constant.
template <bool Split, class Launch>
Error launch_of_keys(Launch launch) {
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if constexpr (Split) {
    if (Error error = launch(yes, no)) return error;
    return launch(no, yes);
  } else {
    return launch(yes, yes);
  }
}

}  // namespace
}  // namespace fastgan
