// Attention through its contract alone, forward and backward, against loops in double that store everything.
#include "attention/attention.h"

#include "common/vector.h"
#include "harness.h"

using namespace fastgan;
using harness::Buffer;

namespace {

struct Case {
  int64_t batch, heads, kv_heads, rows, columns, width, value_width;
  bool is_causal, mask, bias, dropout, shared_bias;
};

// Four dimensions, contiguous, or with heads inside rows and a gap after each row.
template <class T>
struct Array {
  Array(int64_t b, int64_t h, int64_t r, int64_t c, bool heads_inside, int64_t gap)
      : size{b, h, r, c},
        stride{r * h * (c + gap), heads_inside ? c + gap : r * (c + gap),
               heads_inside ? h * (c + gap) : c + gap, 1},
        data(b * h * r * (c + gap)) {}
  T& operator()(int64_t b, int64_t h, int64_t r, int64_t c) {
    return data[b * stride[0] + h * stride[1] + r * stride[2] + c * stride[3]];
  }
  void fill_normal() {
    std::normal_distribution<double> draw;
    for (int64_t i = 0; i < data.size; ++i) data[i] = T(draw(harness::generator()));
  }
  AttentionInput input() {
    AttentionInput out;
    out.data = data.get();
    for (int i = 0; i < 4; ++i) out.stride[i] = size[i] == 1 ? 0 : stride[i];
    return out;
  }
  AttentionOutput output() {
    AttentionOutput out;
    out.data = data.get();
    for (int i = 0; i < 4; ++i) out.stride[i] = stride[i];
    return out;
  }
  int64_t size[4], stride[4];
  Buffer<T> data;
};

// Philox4x32-10, word by word.
uint32_t philox_word(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t column) {
  uint32_t c3 = column / 4, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0, c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1, c3 = uint32_t(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  const uint32_t words[4] = {c0, c1, c2, c3};
  return words[column % 4];
}

template <class T>
void check(const Case& c, Dtype dtype, int threads, double tolerance) {
  const int64_t group = c.heads / c.kv_heads;
  Array<T> query(c.batch, c.heads, c.rows, c.width, true, 3),
      key(c.batch, c.kv_heads, c.columns, c.width, false, 0),
      value(c.batch, c.kv_heads, c.columns, c.value_width, true, 0),
      bias(c.batch, c.shared_bias ? 1 : c.heads, c.rows, c.columns, false, 0),
      grad(c.batch, c.heads, c.rows, c.value_width, false, 1);
  Array<uint8_t> mask(1, c.heads, c.rows, c.columns, false, 2);
  query.fill_normal(), key.fill_normal(), value.fill_normal(), bias.fill_normal(), grad.fill_normal();
  for (int64_t i = 0; i < mask.data.size; ++i) mask.data[i] = harness::generator()() % 3 != 0;
  for (int64_t i = 0; c.rows > 0 && i < c.columns; ++i) mask(0, 0, 0, i) = 0;  // a dead row
  Array<double> logsumexp(c.batch, c.heads, c.rows, 1, false, 0);
  Array<T> output(c.batch, c.heads, c.rows, c.value_width, true, 0),
      grad_query(c.batch, c.heads, c.rows, c.width, true, 0),
      grad_key(c.batch, c.kv_heads, c.columns, c.width, false, 0),
      grad_value(c.batch, c.kv_heads, c.columns, c.value_width, true, 0),
      grad_bias(c.batch, bias.size[1], c.rows, c.columns, false, 0);

  AttentionArgs a;
  a.dtype = a.bias_dtype = dtype;
  a.batch = c.batch, a.heads = c.heads, a.kv_heads = c.kv_heads;
  a.rows = c.rows, a.columns = c.columns, a.width = c.width, a.value_width = c.value_width;
  a.query = query.input(), a.key = key.input(), a.value = value.input();
  if (c.mask) a.mask = mask.input();
  if (c.bias) a.bias = bias.input(), a.grad_bias = grad_bias.data.get();
  for (int i = 0; i < 4; ++i) a.bias_size[i] = bias.size[i];
  a.scale = 0.37;
  a.is_causal = c.is_causal;
  a.has_dropout = c.dropout;
  a.seed = 0x123456789abcdef0u, a.offset = 77, a.threshold = 0x40000000u, a.kept_scale = 4.0 / 3;
  a.output = output.output(), a.logsumexp = logsumexp.data.get();
  a.grad_output = grad.input(), a.saved_output = output.input();
  a.grad_query = grad_query.output(), a.grad_key = grad_key.output(), a.grad_value = grad_value.output();
  Buffer<T> workspace(attention_workspace(a));
  a.workspace = workspace.size ? workspace.get() : nullptr;
  bool out_of_memory = false;
  a.out_of_memory = &out_of_memory;
  FASTGAN_KERNEL(attention_forward)(a, harness::threads(threads));
  FASTGAN_KERNEL(attention_backward)(a, harness::threads(threads));
  harness::expect(!out_of_memory, "memory");

  Array<double> want_query(c.batch, c.heads, c.rows, c.width, false, 0),
      want_key(c.batch, c.kv_heads, c.columns, c.width, false, 0),
      want_value(c.batch, c.kv_heads, c.columns, c.value_width, false, 0),
      want_bias(c.batch, bias.size[1], c.rows, c.columns, false, 0);
  for (Array<double>* each : {&want_query, &want_key, &want_value, &want_bias})
    for (int64_t i = 0; i < each->data.size; ++i) each->data[i] = 0;
  Buffer<double> p(c.columns), grad_p(c.columns);
  Buffer<bool> keep(c.columns);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.heads; ++h)
      for (int64_t r = 0; r < c.rows; ++r) {
        const int64_t kv = h / group, hb = c.shared_bias ? 0 : h;
        double top = -INFINITY, total = 0, mean = 0;
        for (int64_t j = 0; j < c.columns; ++j) {
          double s = 0;
          for (int64_t e = 0; e < c.width; ++e) s += double(query(b, h, r, e)) * key(b, kv, j, e);
          s = s * a.scale + (c.bias ? double(bias(b, hb, r, j)) : 0);
          if ((c.mask && !mask(0, h, r, j)) || (c.is_causal && j > r)) s = -INFINITY;
          p[j] = s;
          top = std::fmax(top, s);
          keep[j] = !c.dropout || philox_word(a.seed, a.offset, uint32_t(b * c.heads + h), uint32_t(r),
                                              uint32_t(j)) >= a.threshold;
        }
        const bool dead = top == -INFINITY;
        for (int64_t j = 0; j < c.columns; ++j) total += p[j] = dead ? 0 : std::exp(p[j] - top);
        const double factor = c.dropout ? a.kept_scale : 1;
        for (int64_t j = 0; j < c.columns; ++j) {
          p[j] = dead ? 0 : p[j] / total;
          grad_p[j] = 0;
          for (int64_t v = 0; v < c.value_width; ++v)
            grad_p[j] += keep[j] ? factor * double(grad(b, h, r, v)) * value(b, kv, j, v) : 0;
          mean += p[j] * grad_p[j];
        }
        if (dead)
          harness::expect(logsumexp(b, h, r, 0) == -INFINITY, "logsumexp of a dead row");
        else
          harness::expect_close(logsumexp(b, h, r, 0), top + std::log(total), tolerance, "logsumexp");
        for (int64_t v = 0; v < c.value_width; ++v) {
          double want = 0;
          for (int64_t j = 0; j < c.columns; ++j) want += keep[j] ? factor * p[j] * value(b, kv, j, v) : 0;
          harness::expect_close(output(b, h, r, v), want, tolerance, "output");
          for (int64_t j = 0; j < c.columns; ++j)
            if (keep[j]) want_value(b, kv, j, v) += factor * p[j] * grad(b, h, r, v);
        }
        for (int64_t j = 0; j < c.columns; ++j) {
          const double ds = p[j] * (grad_p[j] - mean);
          want_bias(b, hb, r, j) += ds;
          for (int64_t e = 0; e < c.width; ++e) {
            want_query(b, h, r, e) += ds * a.scale * key(b, kv, j, e);
            want_key(b, kv, j, e) += ds * a.scale * query(b, h, r, e);
          }
        }
      }
  auto compare = [&](Array<T>& got, Array<double>& want, const char* what) {
    for (int64_t b = 0; b < want.size[0]; ++b)
      for (int64_t h = 0; h < want.size[1]; ++h)
        for (int64_t r = 0; r < want.size[2]; ++r)
          for (int64_t x = 0; x < want.size[3]; ++x)
            harness::expect_close(got(b, h, r, x), want(b, h, r, x), tolerance, what);
  };
  compare(grad_query, want_query, "gradient of query");
  compare(grad_key, want_key, "gradient of key");
  compare(grad_value, want_value, "gradient of value");
  if (c.bias) compare(grad_bias, want_bias, "gradient of bias");
}

}  // namespace

int main() {
  const Case cases[] = {
      {2, 4, 2, 7, 9, 5, 3, false, false, false, false, false},
      {1, 1, 1, 200, 300, 16, 33, true, false, false, false, false},  // several key ranges, partial gradients
      {1, 2, 1, 131, 70, 24, 16, true, true, false, true, false},
      {2, 2, 2, 50, 261, 17, 8, false, true, true, true, true},
      {9, 1, 1, 97, 129, 32, 32, false, false, true, false, false},
      {1, 2, 2, 1, 1, 1, 1, true, false, true, true, false},
      {1, 2, 2, 3, 0, 4, 4, false, false, true, false, false},
      {1, 2, 2, 0, 5, 4, 4, true, false, true, false, true},
      {2, 2, 2, 3, 5, 0, 2, false, true, false, false, false},
      {2, 2, 2, 3, 5, 2, 0, false, false, true, true, false},
  };
  for (const Case& each : cases)
    for (int threads : {1, 3}) {
      check<float>(each, Dtype::float32, threads, 2e-5);
      check<double>(each, Dtype::float64, threads, 1e-12);
    }
  return harness::result();
}
