// Where the kernel covers the whole image and an image is dense in memory: a dot product, an outer product
// and a sum over images along the memory itself, in either layout.
//
// Unnamed namespace: see common/threads.h.
#pragma once
#include "gan_loss/losses.h"

namespace fastgan {
namespace {

// True if the kernel covers the image and the input is dense: its strides then hold the order of (c, h, w) in
// memory, and grad_input has the same.
bool covers(const Args& a) {
  const int64_t* s = a.input.stride;
  if (a.padding[0] || a.padding[1] || a.kernel_height != a.height || a.kernel_width != a.width) return false;
  bool nchw = s[3] == 1 && s[2] == a.width && s[1] == a.width * a.height;
  bool nhwc = s[1] == 1 && s[3] == a.channels && s[2] == a.width * a.channels;
  int64_t length = a.channels * a.height * a.width;
  return (nchw || nhwc) && (s[0] == length || a.batch == 1) && length >= 64;
}

// weight[k] in the order of the input's memory; `to` takes it, `from` brings a gradient back.
template <class F>
FASTGAN_INLINE void in_memory_order(const Args& a, const int64_t* strides, F f) {
  const int64_t* order = a.input.stride;
  for (int64_t c = 0; c < a.channels; ++c)
    for (int64_t y = 0; y < a.height; ++y)
      for (int64_t x = 0; x < a.width; ++x)
        f(c * order[1] + y * order[2] + x * order[3], c * strides[1] + y * strides[2] + x * strides[3]);
}

template <class S, class T>
void pack_covering_weight(const Args& a, T* packed) {
  int64_t length = a.channels * a.height * a.width;
  for (int64_t k = 0; k < a.outputs; ++k) {
    const S* from = static_cast<const S*>(a.weight.data) + k * a.weight.stride[0];
    in_memory_order(a, a.weight.stride,
                    [&](int64_t at, int64_t source) { packed[k * length + at] = load1<T>(from + source); });
  }
}

// R images' dot products with one weight.
template <class S, class T, int R>
FASTGAN_INLINE void dots(const S* x, int64_t stride, const T* w, int64_t length, T* out) {
  constexpr int V = lanes<T>, U = 3;
  Vec<T> acc[R][U] = {};
  int64_t i = 0;
  for (; i + U * V <= length; i += U * V)
    for (int u = 0; u < U; ++u) {
      Vec<T> weight = load(w + i + u * V);
      for (int r = 0; r < R; ++r) acc[r][u] += load<T>(x + r * stride + i + u * V) * weight;
    }
  for (int r = 0; r < R; ++r) {
    T rest = 0;
    for (int64_t j = i; j < length; ++j) rest += load1<T>(x + r * stride + j) * w[j];
    Vec<T> total = acc[r][0];
    for (int u = 1; u < U; ++u) total += acc[r][u];
    out[r] = sum<T>(total) + rest;
  }
}

template <class S, class T>
void forward_covering(const Args& a, const Threads& threads) {
  constexpr int R = 4;
  int64_t length = a.channels * a.height * a.width, stride = a.input.stride[0];
  T* weight = static_cast<T*>(a.workspace);
  pack_covering_weight<S, T>(a, weight);
  parallel_for(threads, up(a.batch, R), 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      int64_t n = unit * R, count = smaller(R, a.batch - n);
      const S* x = static_cast<const S*>(a.input.data) + n * stride;
      for (int64_t k = 0; k < a.outputs; ++k) {
        T out[R];
        if (count == R)
          dots<S, T, R>(x, stride, weight + k * length, length, out);
        else
          for (int64_t r = 0; r < count; ++r)
            dots<S, T, 1>(x + r * stride, stride, weight + k * length, length, out + r);
        T bias = a.bias ? load1<T>(static_cast<const S*>(a.bias) + k * a.bias_stride) : T(0);
        for (int64_t r = 0; r < count; ++r)
          store1(static_cast<S*>(a.logits) + (n + r) * a.outputs + k, out[r] + bias);
      }
      for (int64_t r = 0; r < count; ++r) loss_of_rows<S, T>(a, n + r, 0, 1);
    }
  });
}

template <class S, class T>
void input_gradient_covering(const Args& a, const Threads& threads, const T* weight,
                             const T* logit_gradients) {
  constexpr int V = lanes<T>;
  int64_t length = a.channels * a.height * a.width;
  parallel_for(threads, a.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      S* to = static_cast<S*>(a.grad_input) + n * length;
      const T* g = logit_gradients + n * a.outputs;
      int64_t i = 0;
      for (; i + V <= length; i += V) {
        Vec<T> value{};
        for (int64_t k = 0; k < a.outputs; ++k) value += load(weight + k * length + i) * g[k];
        store(to + i, value);
      }
      for (; i < length; ++i) {
        T value = 0;
        for (int64_t k = 0; k < a.outputs; ++k) value += weight[k * length + i] * g[k];
        store1(to + i, value);
      }
    }
  });
}

// Sums over the images, a run of the image's memory at a time; the sums, four images added at once, stay in
// L1. They overwrite the packed weight, which is read no more.
template <class S, class T>
void weight_gradient_covering(const Args& a, const Threads& threads, T* sums, const T* logit_gradients) {
  constexpr int V = lanes<T>;
  constexpr int64_t kRun = 1024;
  int64_t length = a.channels * a.height * a.width, stride = a.input.stride[0], K = a.outputs;
  const S* input = static_cast<const S*>(a.input.data);
  parallel_for(threads, up(length, kRun), 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      int64_t first = unit * kRun, last = smaller(length, first + kRun);
      for (int64_t k = 0; k < K; ++k) {
        T* out = sums + k * length;
        __builtin_memset(out + first, 0, size_t(last - first) * sizeof(T));
        int64_t n = 0;
        for (; n + 4 <= a.batch; n += 4) {
          const S* x = input + n * stride;
          const T* g = logit_gradients + n * K + k;
          T g0 = g[0], g1 = g[K], g2 = g[2 * K], g3 = g[3 * K];
          int64_t i = first;
          for (; i + V <= last; i += V)
            store(out + i, load(out + i) + (load<T>(x + i) * g0 + load<T>(x + stride + i) * g1) +
                               (load<T>(x + 2 * stride + i) * g2 + load<T>(x + 3 * stride + i) * g3));
          for (; i < last; ++i)
            out[i] += (load1<T>(x + i) * g0 + load1<T>(x + stride + i) * g1) +
                      (load1<T>(x + 2 * stride + i) * g2 + load1<T>(x + 3 * stride + i) * g3);
        }
        for (; n < a.batch; ++n) {
          const S* x = input + n * stride;
          T g = logit_gradients[n * K + k];
          for (int64_t i = first; i < last; ++i) out[i] += load1<T>(x + i) * g;
        }
      }
    }
  });
  for (int64_t k = 0; k < K; ++k) {
    S* to = static_cast<S*>(a.grad_weight) + k * a.grad_weight_stride[0];
    in_memory_order(a, a.grad_weight_stride,
                    [&](int64_t at, int64_t target) { store1(to + target, sums[k * length + at]); });
  }
}

}  // namespace
}  // namespace fastgan
