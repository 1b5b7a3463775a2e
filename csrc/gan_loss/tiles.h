// A tile of the input, zero-padded, in the order [group][row][column][2V] and in the accumulate type: a plain
// copy from channels_last, a V x V transposition from NCHW, and a conversion from the 16-bit types.
//
// Unnamed namespace: see common/threads.h.
#pragma once
#include "common/gemm.h"
#include "gan_loss/losses.h"

namespace fastgan {
namespace {

constexpr int64_t kTileBytes = 160 * 1024;  // of the scratch area: stays in L2
constexpr int kOutputs = 6;  // outputs in registers: 6 x 2 accumulators, 2 weights, of 16 registers

template <class T>
constexpr int kGroup = 2 * lanes<T>;

// A thread's memory for the length of one range of work. Null, and the caller told of it, where there is
// none: the range is then left undone.
template <class T>
struct Scratch {
  T* data;
  void* block;
  Scratch(const Args& a, int64_t count) {
    block = __builtin_malloc(size_t(count) * sizeof(T) + 64);
    data = nullptr;
    if (!block) {
      if (a.out_of_memory) __atomic_store_n(a.out_of_memory, true, __ATOMIC_RELAXED);
      return;
    }
    data = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(block) + 63) & ~uintptr_t(63));
  }
  ~Scratch() { __builtin_free(block); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// Pixels [0, count) of one input row (or of several that lie end to end), 2V channels from c, into
// tile[pixel][2V].
template <class S, class T>
FASTGAN_INLINE void pack_pixels(const S* from, int64_t stride_c, int64_t stride_w, int64_t count,
                                int channels, T* tile) {
  constexpr int V = lanes<T>, G = kGroup<T>;
  if (channels == G && stride_c == 1) {
    for (int64_t x = 0; x < count; ++x) {
      store(tile + x * G, load<T>(from + x * stride_w));
      store(tile + x * G + V, load<T>(from + x * stride_w + V));
    }
  } else if (channels == G && stride_w == 1 && count >= V) {
    for (int64_t x = 0; x < count; x += V) {
      if (x + V > count) x = count - V;  // the last block overlaps the one before
      for (int part = 0; part < 2; ++part) {
        Vec<T> rows[V];
        for (int i = 0; i < V; ++i) rows[i] = load<T>(from + (part * V + i) * stride_c + x);
        transpose<T>(rows);
        for (int i = 0; i < V; ++i) store(tile + (x + i) * G + part * V, rows[i]);
      }
    }
  } else {
    for (int64_t x = 0; x < count; ++x)
      for (int c = 0; c < G; ++c)
        tile[x * G + c] = c < channels ? load1<T>(from + c * stride_c + x * stride_w) : T(0);
  }
}

// The geometry of tiles: rows of the padded input, all columns, `groups` groups of channels.
struct Tile {
  int64_t width, rows, pixels, pitch, groups;  // pitch: elements from one group to the next
};

template <class T>
Tile tile_for(const Args& a, int64_t out_rows, int64_t most_groups) {
  Tile t;
  t.width = a.width + 2 * a.padding[1];
  t.rows = (out_rows - 1) * a.stride[0] + a.kernel_height;
  t.pixels = t.rows * t.width;
  t.pitch = t.pixels * kGroup<T> + kGroup<T>;  // the odd piece keeps groups out of each other's cache sets
  t.groups = larger(1, smaller(most_groups, kTileBytes / (t.pitch * int64_t(sizeof(T)))));
  return t;
}

// Output rows a tile can have with one group, at least one.
template <class T>
int64_t rows_that_fit(const Args& a) {
  int64_t row_bytes = (a.width + 2 * a.padding[1]) * kGroup<T> * int64_t(sizeof(T));
  int64_t rows = kTileBytes / larger(row_bytes, 1) - a.kernel_height;
  return smaller(a.out_height, larger(1, rows / a.stride[0] + 1));
}

// Rows [row, row + t.rows) of the padded image n, `groups` groups of channels from group g.
template <class S, class T>
void pack(const Args& a, const Tile& t, int64_t n, int64_t row, int64_t g, int64_t groups, T* tile) {
  constexpr int G = kGroup<T>;
  const int64_t* s = a.input.stride;
  const S* image = static_cast<const S*>(a.input.data) + n * s[0];
  int64_t first = larger(0, a.padding[0] - row), last = smaller(t.rows, a.height + a.padding[0] - row);
  if (last < first) first = last = 0;
  int64_t left = a.padding[1];
  bool whole = left == 0 && s[2] == a.width * s[3];  // rows end to end
  auto zero = [&](T* from, int64_t count) { __builtin_memset(from, 0, size_t(count) * sizeof(T)); };
  auto pixels = [&](int64_t i, int64_t r, int64_t x, int64_t count) {
    int channels = int(smaller(G, a.channels - (g + i) * G));
    pack_pixels<S, T>(image + (g + i) * G * s[1] + (row + r - a.padding[0]) * s[2] + x * s[3], s[1], s[3],
                      count, channels, tile + i * t.pitch + (r * t.width + left + x) * G);
  };
  for (int64_t i = 0; i < groups; ++i) {
    T* to = tile + i * t.pitch;
    zero(to, first * t.width * G);
    zero(to + last * t.width * G, (t.rows - last) * t.width * G);
    if (left)
      for (int64_t r = first; r < last; ++r) {
        zero(to + r * t.width * G, left * G);
        zero(to + ((r + 1) * t.width - left) * G, left * G);
      }
  }
  if (s[1] == 1) {  // channels_last: a pixel's groups lie side by side
    for (int64_t r = first; r < last; ++r)
      for (int64_t x = 0; x < a.width; ++x) {
        const S* from = image + (row + r - a.padding[0]) * s[2] + x * s[3] + g * G;
        T* to = tile + (r * t.width + left + x) * G;
        int64_t full = smaller(groups, a.channels / G - g);
        for (int64_t i = 0; i < full; ++i, from += G, to += t.pitch) {
          store(to, load<T>(from));
          store(to + lanes<T>, load<T>(from + lanes<T>));
        }
        for (int64_t i = full; i < groups; ++i) pixels(i, r, x, 1);
      }
  } else {
    for (int64_t i = 0; i < groups; ++i) {
      if (whole)
        pixels(i, first, 0, (last - first) * a.width);
      else
        for (int64_t r = first; r < last; ++r) pixels(i, r, 0, a.width);
    }
  }
}

// weight (K, C, kh, kw) into [k][group][tap][2V], zero beyond the channels.
template <class S, class T>
void pack_weight(const Args& a, T* packed) {
  constexpr int G = kGroup<T>;
  const int64_t* s = a.weight.stride;
  int64_t groups = up(a.channels, G);
  for (int64_t k = 0; k < a.outputs; ++k)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t c = 0; c < G; ++c) {
        T* to = packed + (k * groups + g) * a.kernel_height * a.kernel_width * G + c;
        int64_t channel = g * G + c;
        const S* from = static_cast<const S*>(a.weight.data) + k * s[0] + channel * s[1];
        for (int64_t i = 0; i < a.kernel_height; ++i)
          for (int64_t j = 0; j < a.kernel_width; ++j, to += G)
            *to = channel < a.channels ? load1<T>(from + i * s[2] + j * s[3]) : T(0);
      }
}

}  // namespace
}  // namespace fastgan
