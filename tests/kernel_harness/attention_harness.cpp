// Attention through its contract alone: forward, backward and weights against loops in double that store
// everything, and the derivatives along a direction against differences of those. HARNESS_FIRST_ORDER leaves
// out the latter, HARNESS_SECOND_ORDER the former: where compiling or running both takes long.
#include "attention/attention.h"

#include <vector>

#include "common/vector.h"
#include "harness.h"
#include "philox_word.h"

// HARNESS_AMX: bfloat16 alone, forward and backward by AMX's kernels, its instructions as loops.
#if defined(HARNESS_AMX)
#define FIRST_ORDER(name) fastgan_##name##_amx
constexpr bool kBfloat16Alone = true;
#else
#define FIRST_ORDER(name) FASTGAN_KERNEL(name)
constexpr bool kBfloat16Alone = false;
#endif

using namespace fastgan;
using harness::Buffer;

namespace {

struct Case {
  int64_t batch, heads, kv_heads, rows, columns, width, value_width;
  bool is_causal, mask, bias, dropout, shared_bias;
};

// A 16-bit element that counts as a double here, rounded when it is assigned.
template <class S>
struct Rounded {
  Rounded() = default;
  Rounded(double x) { store1(&stored, float(x)); }
  operator double() const { return load1<float>(&stored); }
  S stored;
};
template <class T>
struct SumOf {
  using type = T;
};
template <class S>
struct SumOf<Rounded<S>> {
  using type = float;
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

// A case with its numbers, drawn anew, and the arguments that name them.
template <class T>
struct Problem {
  Problem(const Case& c, Dtype dtype)
      : query(c.batch, c.heads, c.rows, c.width, true, 3),
        key(c.batch, c.kv_heads, c.columns, c.width, false, 0),
        value(c.batch, c.kv_heads, c.columns, c.value_width, true, 0),
        bias(c.batch, c.shared_bias ? 1 : c.heads, c.rows, c.columns, false, 0),
        grad(c.batch, c.heads, c.rows, c.value_width, false, 1),
        output(c.batch, c.heads, c.rows, c.value_width, true, 0),
        grad_query(c.batch, c.heads, c.rows, c.width, true, 0),
        grad_key(c.batch, c.kv_heads, c.columns, c.width, false, 0),
        grad_value(c.batch, c.kv_heads, c.columns, c.value_width, true, 0),
        grad_bias(c.batch, bias.size[1], c.rows, c.columns, false, 0),
        mask(1, c.heads, c.rows, c.columns, false, 2),
        logsumexp(c.batch, c.heads, c.rows, 1, false, 0),
        row_sums(3 * c.batch * c.heads * c.rows) {
    query.fill_normal(), key.fill_normal(), value.fill_normal(), bias.fill_normal(), grad.fill_normal();
    for (int64_t i = 0; i < mask.data.size; ++i) mask.data[i] = harness::generator()() % 3 != 0;
    for (int64_t i = 0; c.rows > 0 && i < c.columns; ++i) mask(0, 0, 0, i) = 0;  // a dead row
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
    philox[0] = int64_t(a.seed), philox[1] = a.offset;
    a.philox = philox, a.philox_stride = 1;
    a.out_of_memory = &out_of_memory;
    workspace = std::make_unique<Buffer<typename SumOf<T>::type>>(attention_workspace(a));
    a.workspace = workspace->size ? workspace->get() : nullptr;
  }
  Problem(const Problem&) = delete;

  Array<T> query, key, value, bias, grad, output, grad_query, grad_key, grad_value, grad_bias;
  Array<uint8_t> mask;
  Array<double> logsumexp;
  Buffer<typename SumOf<T>::type> row_sums;
  std::unique_ptr<Buffer<typename SumOf<T>::type>> workspace;
  int64_t philox[2];
  bool out_of_memory = false;
  AttentionArgs a;
};

#if !defined(HARNESS_SECOND_ORDER)

template <class T>
void check(const Case& c, Dtype dtype, int threads, double tolerance) {
  const int64_t group = c.heads / c.kv_heads;
  Problem<T> problem(c, dtype);
  auto& [query, key, value, bias, grad, output, grad_query, grad_key, grad_value, grad_bias, mask, logsumexp,
         row_sums, workspace, philox, out_of_memory, a] = problem;
  FIRST_ORDER(attention_forward)(a, harness::threads(threads));
  FIRST_ORDER(attention_backward)(a, harness::threads(threads));
  Array<T> weights(c.batch, c.heads, c.rows, c.columns, false, 0),
      mean(c.batch, 1, c.rows, c.columns, false, 0);
  a.weights = weights.output();
  FASTGAN_KERNEL(attention_weights)(a, harness::threads(threads));
  a.weights = mean.output(), a.average_weights = true;
  FASTGAN_KERNEL(attention_weights)(a, harness::threads(threads));
  harness::expect(!out_of_memory, "memory");

  Array<double> want_query(c.batch, c.heads, c.rows, c.width, false, 0),
      want_key(c.batch, c.kv_heads, c.columns, c.width, false, 0),
      want_value(c.batch, c.kv_heads, c.columns, c.value_width, false, 0),
      want_bias(c.batch, bias.size[1], c.rows, c.columns, false, 0),
      want_mean(c.batch, 1, c.rows, c.columns, false, 0);
  for (Array<double>* each : {&want_query, &want_key, &want_value, &want_bias, &want_mean})
    for (int64_t i = 0; i < each->data.size; ++i) each->data[i] = 0;
  Buffer<double> p(c.columns), grad_p(c.columns);
  Buffer<bool> keep(c.columns);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.heads; ++h)
      for (int64_t r = 0; r < c.rows; ++r) {
        const int64_t kv = h / group, hb = c.shared_bias ? 0 : h;
        double top = -INFINITY, total = 0, delta = 0;
        for (int64_t j = 0; j < c.columns; ++j) {
          double s = 0;
          for (int64_t e = 0; e < c.width; ++e) s += double(query(b, h, r, e)) * key(b, kv, j, e);
          s = s * a.scale + (c.bias ? double(bias(b, hb, r, j)) : 0);
          if ((c.mask && !mask(0, h, r, j)) || (c.is_causal && j > r)) s = -INFINITY;
          p[j] = s;
          top = std::fmax(top, s);
          keep[j] = !c.dropout || harness::philox_word(a.seed, a.offset, uint32_t(b * c.heads + h),
                                                       uint32_t(r), uint32_t(j)) >= a.threshold;
        }
        const bool dead = top == -INFINITY;
        for (int64_t j = 0; j < c.columns; ++j) total += p[j] = dead ? 0 : std::exp(p[j] - top);
        const double factor = c.dropout ? a.kept_scale : 1;
        for (int64_t j = 0; j < c.columns; ++j) {
          p[j] = dead ? 0 : p[j] / total;
          grad_p[j] = 0;
          for (int64_t v = 0; v < c.value_width; ++v)
            grad_p[j] += keep[j] ? factor * double(grad(b, h, r, v)) * value(b, kv, j, v) : 0;
          delta += p[j] * grad_p[j];
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
          harness::expect_close(weights(b, h, r, j), p[j], tolerance, "weights");
          want_mean(b, 0, r, j) += p[j] / double(c.heads);
          const double ds = p[j] * (grad_p[j] - delta);
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
  compare(mean, want_mean, "mean of the weights");
}
#endif

#if !defined(HARNESS_FIRST_ORDER)

// Output and gradients at inputs + step · direction, by the kernels that `check` judges.
struct Moved {
  Moved(const Case& c, Problem<double>& at, Problem<double>& direction, double step)
      : problem(c, Dtype::float64) {
    for (auto member :
         {&Problem<double>::query, &Problem<double>::key, &Problem<double>::value, &Problem<double>::bias}) {
      Buffer<double>&to = (problem.*member).data, &from = (at.*member).data,
      &along = (direction.*member).data;
      for (int64_t i = 0; i < to.size; ++i) to[i] = from[i] + step * along[i];
    }
    for (int64_t i = 0; i < at.grad.data.size; ++i) problem.grad.data[i] = at.grad.data[i];
    for (int64_t i = 0; i < at.mask.data.size; ++i) problem.mask.data[i] = at.mask.data[i];
    FIRST_ORDER(attention_forward)(problem.a, harness::threads(1));
    FIRST_ORDER(attention_backward)(problem.a, harness::threads(1));
  }
  Problem<double> problem;
};

// The tangent of the output and those of the gradients, against differences in double.
template <class T>
void check_second(const Case& c, Dtype dtype, int threads, double tolerance) {
  constexpr double kStep = 1e-5;
  Problem<double> at(c, Dtype::float64), direction(c, Dtype::float64);
  Problem<T> got(c, dtype), along(c, dtype);
  auto round = [](Buffer<double>& from, Buffer<T>& to) {
    for (int64_t i = 0; i < from.size; ++i) from[i] = to[i] = T(from[i]);
  };
  round(at.query.data, got.query.data), round(direction.query.data, along.query.data);
  round(at.key.data, got.key.data), round(direction.key.data, along.key.data);
  round(at.value.data, got.value.data), round(direction.value.data, along.value.data);
  round(at.bias.data, got.bias.data), round(direction.bias.data, along.bias.data);
  round(at.grad.data, got.grad.data);
  for (int64_t i = 0; i < at.mask.data.size; ++i) got.mask.data[i] = at.mask.data[i];
  FIRST_ORDER(attention_forward)(got.a, harness::threads(threads));
  Array<T> tangent(c.batch, c.heads, c.rows, c.value_width, true, 0);
  got.a.tangent_query = along.query.input(), got.a.tangent_key = along.key.input();
  got.a.tangent_value = along.value.input();
  if (c.bias) got.a.tangent_bias = along.bias.input();
  got.a.tangent_output = tangent.output();
  got.a.row_sums = got.row_sums.get();
  FASTGAN_KERNEL(attention_jvp)(got.a, harness::threads(threads));
  FASTGAN_KERNEL(attention_double_backward)(got.a, harness::threads(threads));
  harness::expect(!got.out_of_memory, "memory");

  Moved after(c, at, direction, kStep), before(c, at, direction, -kStep);
  auto compare = [&](Array<T>& array, Array<double>& high, Array<double>& low, const char* what) {
    for (int64_t i = 0; i < array.data.size; ++i)  // contiguous in one order
      harness::expect_close(array.data[i], (high.data[i] - low.data[i]) / (2 * kStep), tolerance, what);
  };
  compare(tangent, after.problem.output, before.problem.output, "tangent of the output");
  compare(got.grad_query, after.problem.grad_query, before.problem.grad_query, "tangent of query's gradient");
  compare(got.grad_key, after.problem.grad_key, before.problem.grad_key, "tangent of key's gradient");
  compare(got.grad_value, after.problem.grad_value, before.problem.grad_value, "tangent of value's gradient");
  if (c.bias)
    compare(got.grad_bias, after.problem.grad_bias, before.problem.grad_bias, "tangent of bias's gradient");
}
#endif

// Sequences of varied length in one call against each by itself, of which `check` and `check_second` judge.
template <class T>
void check_packed(bool is_causal, int64_t kv_heads, Dtype dtype, int threads, double tolerance) {
  const std::vector<int64_t> rows{0, 5, 5, 72, 73, 173, 173},
      columns = is_causal ? rows : std::vector<int64_t>{0, 9, 11, 11, 161, 161, 200};
  const Case c{1, 2, kv_heads, rows.back(), columns.back(), 12, 7, is_causal, false, false, false, false};
  Problem<T> packed(c, dtype), alone(c, dtype);
  Array<T> tangent(1, c.heads, c.rows, c.value_width, true, 0),
      tangent_alone(1, c.heads, c.rows, c.value_width, true, 0);
  for (auto member : {&Problem<T>::query, &Problem<T>::key, &Problem<T>::value, &Problem<T>::grad}) {
    Buffer<T>&to = (alone.*member).data, &from = (packed.*member).data;
    for (int64_t i = 0; i < to.size; ++i) to[i] = from[i];
  }
  auto run = [&](AttentionArgs a, AttentionOutput tangent_output) {
    Buffer<typename SumOf<T>::type> workspace(attention_workspace(a));
    a.workspace = workspace.size ? workspace.get() : nullptr;
    FIRST_ORDER(attention_forward)(a, harness::threads(threads));
#if !defined(HARNESS_SECOND_ORDER)
    FIRST_ORDER(attention_backward)(a, harness::threads(threads));
#endif
#if !defined(HARNESS_FIRST_ORDER)
    a.tangent_query = a.query, a.tangent_value = a.value;  // as good as any direction
    a.tangent_output = tangent_output;
    FASTGAN_KERNEL(attention_jvp)(a, harness::threads(threads));
    FASTGAN_KERNEL(attention_double_backward)(a, harness::threads(threads));
#else
    (void)tangent_output;
#endif
  };
  packed.a.row_sums = packed.row_sums.get();
  AttentionArgs a = packed.a;
  a.batch = int64_t(rows.size()) - 1;
  a.row_offset = rows.data(), a.column_offset = columns.data();
  a.packed_rows = c.rows, a.packed_columns = c.columns;
  a.rows = 100, a.columns = is_causal ? 100 : 150;
  AttentionOutput tangents = tangent.output();
  for (AttentionOutput* x : {&a.output, &a.grad_query, &a.grad_key, &a.grad_value, &tangents})
    x->stride[0] = 0;
  run(a, tangents);
  harness::expect(!packed.out_of_memory, "memory");

  for (size_t n = 0; n + 1 < rows.size(); ++n) {
    AttentionArgs one = alone.a;
    one.rows = rows[n + 1] - rows[n], one.columns = columns[n + 1] - columns[n];
    auto shift = [](auto& x, int64_t by) { x.data = (T*)(x.data) + by * x.stride[2]; };
    tangents = tangent_alone.output();
    shift(one.query, rows[n]), shift(one.grad_output, rows[n]), shift(one.saved_output, rows[n]);
    shift(one.output, rows[n]), shift(one.grad_query, rows[n]), shift(tangents, rows[n]);
    shift(one.key, columns[n]), shift(one.value, columns[n]);
    shift(one.grad_key, columns[n]), shift(one.grad_value, columns[n]);
    Buffer<double> logsumexp(c.heads * one.rows);
    Buffer<typename SumOf<T>::type> row_sums(3 * c.heads * one.rows);
    one.logsumexp = logsumexp.get(), one.row_sums = row_sums.get();
    run(one, tangents);
    for (int64_t h = 0; h < c.heads; ++h)
      for (int64_t r = 0; r < one.rows; ++r) {
        const double want = logsumexp[h * one.rows + r], got = packed.logsumexp(0, h, rows[n] + r, 0);
        if (want != got) harness::expect_close(got, want, tolerance, "logsumexp of a sequence");
      }
  }
  auto compare = [&](Array<T>& got, Array<T>& want, const char* what) {
    for (int64_t i = 0; i < got.data.size; ++i)
      harness::expect_close(got.data[i], want.data[i], tolerance, what);
  };
  compare(packed.output, alone.output, "output of a sequence");
  compare(packed.grad_query, alone.grad_query, "gradient of query of a sequence");
  compare(packed.grad_key, alone.grad_key, "gradient of key of a sequence");
  compare(packed.grad_value, alone.grad_value, "gradient of value of a sequence");
#if !defined(HARNESS_FIRST_ORDER)
  compare(tangent, tangent_alone, "tangent of the output of a sequence");
#endif
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
      {1, 4, 2, 1, 1100, 16, 8, false, true, false, false, false},  // CUDA's parts of the keys
  };
  for (const Case& each : cases)
    for (int threads : {1, 3}) {
      if (threads > harness::most_threads()) continue;
#if !defined(HARNESS_SECOND_ORDER)
      if (!kBfloat16Alone && harness::is_chosen()) check<float>(each, Dtype::float32, threads, 2e-5);
      if (!kBfloat16Alone && harness::is_chosen()) check<double>(each, Dtype::float64, threads, 1e-12);
      if (harness::is_chosen()) check<Rounded<bfloat16>>(each, Dtype::bfloat16, threads, 4e-2);
      if (!kBfloat16Alone && harness::is_chosen())
        check<Rounded<float16>>(each, Dtype::float16, threads, 5e-3);
#endif
#if !defined(HARNESS_FIRST_ORDER)
      if (!kBfloat16Alone && harness::is_chosen()) check_second<float>(each, Dtype::float32, threads, 1e-4);
      if (!kBfloat16Alone && harness::is_chosen()) check_second<double>(each, Dtype::float64, threads, 1e-7);
      if (harness::is_chosen()) check_second<Rounded<bfloat16>>(each, Dtype::bfloat16, threads, 1e-1);
#endif
    }
  for (bool is_causal : {false, true})
    for (int threads : {1, 3}) {
      if (threads > harness::most_threads()) continue;
      if (!kBfloat16Alone && harness::is_chosen())
        check_packed<float>(is_causal, 1, Dtype::float32, threads, 2e-5);
      if (!kBfloat16Alone && harness::is_chosen())
        check_packed<double>(is_causal, 2, Dtype::float64, threads, 1e-12);
      if (harness::is_chosen()) check_packed<Rounded<bfloat16>>(is_causal, 1, Dtype::bfloat16, threads, 4e-2);
    }
  return harness::result();
}
