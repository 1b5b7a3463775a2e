// How the backward, and the backward of the backward, are cut. A piece of work is one key head of one batch,
// or a range of its keys where these are too few to keep threads busy: blocks of keys outside, so that the
// gradients of keys and values are summed in scratch and written once; all query rows of all the heads that
// share them inside. The gradient of query is added to in place, or, where several pieces have the same rows,
// in a workspace with a part for each, added up in order afterwards; what both lack, the scale, is multiplied
// at the end. The gradient of a bias that is broadcast over the batch at most is written by the way, all
// batches then being one piece; any other is summed over what belongs to several pieces, and has a pass of
// its own over its tiles.
//
// A Pass says what is computed in a tile:
//
//   Storage, T, kRows    storage and accumulation type; query rows of a tile
//   Scratch              derived from KeyScratch, below; bias_scores is what the gradient of the bias sums up
//   pack_keys(a, s, batch, kv_head, key0, keys)
//   tile(a, s, t) packs the rows and computes the tile's score gradients
//   key_gradients(a, s, t)              adds to s.grad_key and s.grad_value
//   query_gradient(a, s, t, keys, sum, first)   adds to the sum, or sets it the first time
//   finish_keys(s, keys)   where there is one, writes s.grad_key and s.grad_value, which key_gradients has
//                          then summed up elsewhere, from pack_keys on
#pragma once
#include "attention/attention_tiles.h"

namespace fastgan {
namespace {

constexpr int64_t kKeyBlock = kAttentionKeyBlock;

template <class T>
struct KeyScratch {
  KeyScratch(const AttentionArgs& a, int64_t most_rows)
      : rows(smaller(a.rows, most_rows)),
        keys(whole_panels<T>(smaller(a.columns, kKeyBlock))),
        stride(keys + kPanel<T>),  // off a power of two: columns are read, and would share few cache sets
        width(a.width),
        value_width(a.value_width),
        padded(whole_panels<T>(a.width)),
        padded_value(whole_panels<T>(a.value_width)) {}
  void place(Scratch& s) {
    grad_key = s.take<T>(keys * padded);
    grad_value = s.take<T>(keys * padded_value);
    words = s.take<uint32_t>(keys + kPhiloxStep);
  }
  int64_t rows, keys, stride, width, value_width, padded, padded_value;
  void* memory = nullptr;
  T *grad_key, *grad_value, *bias_scores;
  uint32_t* words;
};

// Where the gradient of query is summed up.
template <class T>
struct QuerySum {
  T* data;
  int64_t stride;
};

template <class Storage, class T>
QuerySum<T> query_sum(const AttentionArgs& a, int64_t chunk, int64_t batch, int64_t head, int64_t row) {
  if (a.workspace) {
    int64_t index = chunk * row_count(a) + row_index(a, batch, head, row);
    return {static_cast<T*>(a.workspace) + index * a.width, a.width};
  }
  return {reinterpret_cast<T*>(at<Storage>(a.grad_query, batch, head, row)), a.grad_query.stride[2]};
}

// Whether the gradient of the bias is written tile by tile. Sums over the batch are kept in the bias's own
// type, which must not be half precision then.
inline bool bias_by_the_way(const AttentionArgs& a) {
  const int64_t* size = a.bias_size;
  return a.grad_bias && size[1] == a.heads && size[2] == a.rows && size[3] == a.columns &&
         (size[0] == a.batch || a.bias_dtype == Dtype::float32 || a.bias_dtype == Dtype::float64);
}

// Score gradients of rows × block from `first` on, of which `columns` from `first` on have been computed.
template <class T, class BiasStorage>
void add_bias_gradient(const AttentionArgs& a, const Tile& t, const T* scores, int64_t stride, int64_t key0,
                       int64_t block, bool set) {
  const int64_t before = t.column - key0, batch = a.bias_size[0] == 1 ? 0 : t.batch;
  BiasStorage* out = static_cast<BiasStorage*>(a.grad_bias) +
                     ((batch * a.heads + t.head) * a.rows + t.row) * a.columns + key0;
  for (int64_t r = 0; r < t.rows; ++r, out += a.columns, scores += stride) {
    if (!set) {
      for (int64_t c = 0; c < t.columns; ++c)
        store1(out + before + c, load1<T>(out + before + c) + scores[c]);
      continue;
    }
    if (t.columns <= 0) {
      std::memset(static_cast<void*>(out), 0, size_t(block) * sizeof(BiasStorage));
      continue;
    }
    const int64_t after = before + t.columns;
    std::memset(static_cast<void*>(out), 0, size_t(before) * sizeof(BiasStorage));
    store_row<T>(scores, T(1), t.columns, out + before);
    std::memset(static_cast<void*>(out + after), 0, size_t(block - after) * sizeof(BiasStorage));
  }
}

template <class Storage, class T>
void add_bias_gradient(const AttentionArgs& a, const Tile& t, const KeyScratch<T>& s, int64_t key0,
                       int64_t block) {
  const bool set = a.bias_size[0] != 1 || t.batch == 0;
  if (a.bias_dtype == a.dtype)
    add_bias_gradient<T, Storage>(a, t, s.bias_scores, s.stride, key0, block, set);
  else if constexpr (sizeof(Storage) == 2)
    add_bias_gradient<T, float>(a, t, s.bias_scores, s.stride, key0, block, set);
}

template <class Pass>
constexpr bool kSumsElsewhere = requires(typename Pass::Scratch& s) { Pass::finish_keys(s, 0); };

template <class Pass>
void keys_piece(const AttentionArgs& a, typename Pass::Scratch& s, int64_t batch, int64_t kv_head,
                int64_t chunk, int64_t first_key, int64_t end_key) {
  using Storage = typename Pass::Storage;
  using T = typename Pass::T;
  const int64_t group = a.heads / a.kv_heads;
  const bool with_bias = bias_by_the_way(a);
  if (a.columns == 0)
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      for (int64_t row = 0; row < a.rows; ++row)
        for (int64_t c = 0; c < a.width; ++c)
          query_sum<Storage, T>(a, chunk, batch, head, row).data[c] = T(0);
  for (int64_t key0 = first_key; key0 < end_key; key0 += kKeyBlock) {
    const int64_t block = smaller(kKeyBlock, end_key - key0);
    const Range seen = visible<Storage>(a, Tile{batch, kv_head * group, 0, key0, a.rows, block}, group);
    const bool any = seen.begin < seen.end;
    const int64_t first = any ? key0 + seen.begin : key0, keys = any ? seen.end - seen.begin : 0;
    if (any) {
      Pass::pack_keys(a, s, batch, kv_head, first, keys);
      for (int64_t i = 0; !kSumsElsewhere<Pass> && i < keys * s.padded; ++i) s.grad_key[i] = T(0);
      for (int64_t i = 0; !kSumsElsewhere<Pass> && i < keys * s.padded_value; ++i) s.grad_value[i] = T(0);
    }
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      // The rows before see none of these keys. Those that see none at all, before the first key, are set to
      // 0.
      const int64_t first_row =
          a.is_causal && key0 > 0 ? smaller(key0 > a.diagonal ? key0 - a.diagonal : 0, a.rows) : 0;
      if (with_bias)
        add_bias_gradient<Storage, T>(a, Tile{batch, head, 0, key0, first_row, 0}, s, key0, block);
      for (int64_t row = first_row; row < a.rows; row += Pass::kRows) {
        Tile t{batch, head, row, first, smaller(Pass::kRows, a.rows - row), keys};
        if (a.is_causal) t.columns = smaller(keys, seen_columns(a, row + t.rows, first));
        if (t.columns > 0 && (a.mask.data || a.bias.data))
          t.columns = smaller(t.columns, visible<Storage>(a, t).end);
        QuerySum<T> sum = query_sum<Storage, T>(a, chunk, batch, head, row);
        if (t.columns > 0) {
          Pass::tile(a, s, t);
          Pass::key_gradients(a, s, t);
          Pass::query_gradient(a, s, t, keys, sum, key0 == first_key);
        } else if (key0 == first_key) {
          for (int64_t r = 0; r < t.rows; ++r)
            for (int64_t c = 0; c < a.width; ++c) sum.data[r * sum.stride + c] = T(0);
        }
        if (with_bias) add_bias_gradient<Storage, T>(a, t, s, key0, block);
      }
    }
    if constexpr (kSumsElsewhere<Pass>)
      if (any) Pass::finish_keys(s, keys);
    for (int64_t k = 0; k < block; ++k) {
      Storage* grad_key = at<Storage>(a.grad_key, batch, kv_head, key0 + k);
      Storage* grad_value = at<Storage>(a.grad_value, batch, kv_head, key0 + k);
      int64_t in = key0 + k - first;
      if (in >= 0 && in < keys) {
        store_row<T>(s.grad_key + in * s.padded, T(a.scale), a.width, grad_key);
        store_row<T>(s.grad_value + in * s.padded_value, T(1), a.value_width, grad_value);
      } else {
        std::memset(static_cast<void*>(grad_key), 0, size_t(a.width) * sizeof(Storage));
        std::memset(static_cast<void*>(grad_value), 0, size_t(a.value_width) * sizeof(Storage));
      }
    }
  }
  if (a.workspace) return;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (int64_t row = 0; row < a.rows; ++row) {
      T* sum = query_sum<Storage, T>(a, chunk, batch, head, row).data;
      store_row<T>(sum, T(a.scale), a.width, sum);
    }
}

// Keys of a chunk begin here, at a whole block.
inline int64_t chunk_begin(const AttentionArgs& a, int64_t chunks, int64_t chunk) {
  int64_t blocks = (a.columns + kKeyBlock - 1) / kKeyBlock;
  return smaller(a.columns, blocks * chunk / chunks * kKeyBlock);
}

template <class Storage, class T>
void add_partial_gradients(const AttentionArgs& a, int64_t batch, int64_t head, int64_t row) {
  const int64_t chunks = attention_key_chunks(a);
  T* total = query_sum<Storage, T>(a, 0, batch, head, row).data;
  // Under is_causal a row has no partial gradient from keys behind it.
  for (int64_t chunk = 1;
       chunk < chunks && (!a.is_causal || chunk_begin(a, chunks, chunk) <= row + a.diagonal); ++chunk) {
    const T* part = query_sum<Storage, T>(a, chunk, batch, head, row).data;
    for (int64_t c = 0; c < a.width; ++c) total[c] += part[c];
  }
  store_row<T>(total, T(a.scale), a.width, at<Storage>(a.grad_query, batch, head, row));
}

// ---- the gradient of the bias: score gradients, summed over what the bias was broadcast over ----

template <class Base, class T>
struct BiasScratch : Base {
  explicit BiasScratch(const AttentionArgs& a) : Base(a) {}
  void place(Scratch& s) {
    Base::place(s);
    sums = s.take<T>(this->rows * this->stride);
  }
  T* sums;
};

template <class Pass, class BiasStorage, class Scratch>
void bias_piece(const AttentionArgs& a, Scratch& s, int64_t piece, int64_t row_blocks, int64_t key_blocks) {
  using Storage = typename Pass::Storage;
  using T = typename Pass::T;
  constexpr int64_t kRows = Pass::kRows;
  const int64_t* size = a.bias_size;
  const int64_t group = a.heads / a.kv_heads;
  int64_t key_block = piece % key_blocks, row_block = piece / key_blocks % row_blocks;
  int64_t head = piece / key_blocks / row_blocks % size[1], batch = piece / key_blocks / row_blocks / size[1];
  // What is summed here: a range of each dimension, whole where the bias has size 1.
  int64_t batches = size[0] == 1 ? a.batch : 1, heads = size[1] == 1 ? a.heads : 1;
  int64_t row_end = size[2] == 1 ? a.rows : smaller(a.rows, (row_block + 1) * kRows);
  int64_t key_end = size[3] == 1 ? a.columns : smaller(a.columns, (key_block + 1) * kKeyBlock);
  for (int64_t i = 0; i < s.rows * s.stride; ++i) s.sums[i] = T(0);
  for (int64_t b = batch; b < batch + batches; ++b)
    for (int64_t h = head; h < head + heads; ++h)
      for (int64_t key0 = key_block * kKeyBlock; key0 < key_end; key0 += kKeyBlock) {
        int64_t keys = smaller(kKeyBlock, key_end - key0);
        bool packed = false;
        for (int64_t row = row_block * kRows; row < row_end; row += kRows) {
          Tile t{b, h, row, key0, smaller(kRows, row_end - row), keys};
          if (a.is_causal && row + t.rows <= key0) continue;
          Range seen = visible<Storage>(a, t);
          if (seen.begin >= seen.end) continue;
          if (!packed) Pass::pack_keys(a, s, b, h / group, key0, keys);
          packed = true;
          Pass::tile(a, s, t);
          for (int64_t r = 0; r < t.rows; ++r)
            for (int64_t c = 0; c < keys; ++c) s.sums[r * s.stride + c] += s.bias_scores[r * s.stride + c];
        }
      }
  int64_t rows = size[2] == 1 ? smaller(a.rows, kRows) : row_end - row_block * kRows;
  int64_t keys = size[3] == 1 ? smaller(a.columns, kKeyBlock) : key_end - key_block * kKeyBlock;
  if (size[2] == 1)
    for (int64_t r = 1; r < rows; ++r)
      for (int64_t c = 0; c < keys; ++c) s.sums[c] += s.sums[r * s.stride + c];
  if (size[2] == 1) rows = 1;
  if (size[3] == 1)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 1; c < keys; ++c) s.sums[r * s.stride] += s.sums[r * s.stride + c];
  if (size[3] == 1) keys = 1;
  int64_t row0 = row_block * kRows, key0 = key_block * kKeyBlock;
  auto* out =
      static_cast<BiasStorage*>(a.grad_bias) + ((batch * size[1] + head) * size[2] + row0) * size[3] + key0;
  for (int64_t r = 0; r < rows; ++r) store_row<T>(s.sums + r * s.stride, T(1), keys, out + r * size[3]);
}

template <class Pass>
void bias_gradient(const AttentionArgs& a, const Threads& threads) {
  using Storage = typename Pass::Storage;
  const int64_t* size = a.bias_size;
  if (a.batch * a.heads * a.rows * a.columns == 0) {  // a sum over nothing, if there is an element at all
    int64_t count = size[0] * size[1] * size[2] * size[3],
            bytes = a.bias_dtype == Dtype::float32 ? 4 : int64_t(sizeof(Storage));
    std::memset(a.grad_bias, 0, size_t(count * bytes));
    return;
  }
  int64_t row_blocks = (size[2] + Pass::kRows - 1) / Pass::kRows;
  int64_t key_blocks = (size[3] + kKeyBlock - 1) / kKeyBlock;
  int64_t cost = a.batch * a.heads * a.rows * a.columns / (size[0] * size[1] * row_blocks * key_blocks) *
                 (a.width + a.value_width);
  parallel_for(threads, size[0] * size[1] * row_blocks * key_blocks, grain(cost),
               [&](int64_t begin, int64_t end) {
                 BiasScratch<typename Pass::Scratch, typename Pass::T> scratch(a);
                 if (!allocate(scratch, a)) return;
                 for (int64_t piece = begin; piece < end; ++piece) {
                   if (a.bias_dtype == a.dtype)
                     bias_piece<Pass, Storage>(a, scratch, piece, row_blocks, key_blocks);
                   else if constexpr (sizeof(Storage) == 2)
                     bias_piece<Pass, float>(a, scratch, piece, row_blocks, key_blocks);
                 }
                 release(scratch);
               });
}

// All of it. `products` is how many numbers a pair of a row and a key is multiplied with.
template <class Pass>
void run_by_keys(const AttentionArgs& a, const Threads& threads, int64_t products) {
  using Storage = typename Pass::Storage;
  using T = typename Pass::T;
  // Batches whose gradients are added up to one bias, in order, are one piece.
  const bool joined = bias_by_the_way(a) && a.bias_size[0] == 1;
  const int64_t batches = joined ? a.batch : 1, outer = a.batch / (batches + !batches);
  auto cut = [&](const AttentionArgs& one) -> Pieces {
    const int64_t chunks = attention_key_chunks(one), group = one.heads / (one.kv_heads + !one.kv_heads);
    return {one.kv_heads * chunks, one.rows * (one.columns / chunks) * (products + 32) * group * batches};
  };
  in_pieces<Storage>(a, threads, outer, cut, [&](auto for_each) {
    typename Pass::Scratch scratch(a);
    if (!allocate(scratch, a)) return;
    for_each([&](const AttentionArgs& one, int64_t index, int64_t piece) {
      const int64_t chunks = attention_key_chunks(one), chunk = in_turn(one, piece % chunks, chunks);
      for (int64_t batch = index * batches; batch < (index + 1) * batches; ++batch)
        keys_piece<Pass>(one, scratch, batch, piece / chunks, chunk, chunk_begin(one, chunks, chunk),
                         chunk_begin(one, chunks, chunk + 1));
    });
    release(scratch);
  });
  if (a.workspace) {
    auto rows = [](const AttentionArgs& one) -> Pieces {
      return {one.heads * one.rows, 3 * one.width * attention_key_chunks(one)};
    };
    in_pieces<Storage>(a, threads, a.batch, rows, [&](auto for_each) {
      for_each([&](const AttentionArgs& one, int64_t batch, int64_t piece) {
        add_partial_gradients<Storage, T>(one, batch, piece / one.rows, piece % one.rows);
      });
    });
  }
  if (a.grad_bias && !bias_by_the_way(a)) bias_gradient<Pass>(a, threads);
}

}  // namespace
}  // namespace fastgan

// One entry point for all storage types.
#define FASTGAN_ATTENTION_ENTRY(name, function)                            \
  extern "C" void FASTGAN_KERNEL(name)(const fastgan::AttentionArgs& args, \
                                       const fastgan::Threads& threads) {  \
    switch (args.dtype) {                                                  \
      case fastgan::Dtype::float32:                                        \
        return function<float>(args, threads);                             \
      case fastgan::Dtype::float64:                                        \
        return function<double>(args, threads);                            \
      case fastgan::Dtype::bfloat16:                                       \
        return function<fastgan::bfloat16>(args, threads);                 \
      case fastgan::Dtype::float16:                                        \
        return function<fastgan::float16>(args, threads);                  \
    }                                                                      \
  }
