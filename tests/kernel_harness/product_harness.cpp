// Matrix products by AMX, whose instructions are loops here, against sums in double: sizes, strides, both
// types of the result. There is no other kernel: without HARNESS_AMX nothing is run.
#include "product/product.h"

#include "common/vector.h"
#include "harness.h"

using namespace fastgan;
using harness::Buffer;

#if defined(HARNESS_AMX)
namespace {

struct Factor {
  Factor(int64_t rows, int64_t columns, bool by_columns, int64_t gap)
      : stride{by_columns ? 1 : columns + gap, by_columns ? rows + gap : 1},
        data((by_columns ? columns : rows) * ((by_columns ? rows : columns) + gap)) {
    std::normal_distribution<double> draw;
    for (int64_t i = 0; i < data.size; ++i) data[i] = to_bfloat16(float(draw(harness::generator())));
  }
  double at(int64_t row, int64_t column) {
    return double(to_float(data[row * stride[0] + column * stride[1]]));
  }
  int64_t stride[2];
  Buffer<bfloat16> data;
};

template <class S>
double number(S x) {
  if constexpr (sizeof(S) == 2)
    return double(to_float(x));
  else
    return double(x);
}

template <class S>
void check(int64_t rows, int64_t depth, int64_t columns, bool a_turned, bool b_turned, bool add,
           int threads) {
  Factor a(rows, depth, a_turned, 1), b(depth, columns, b_turned, 0);
  Buffer<S> c(rows * columns), before(rows * columns);
  for (int64_t i = 0; i < c.size; ++i) store1(&c[i], float(i % 5)), before[i] = c[i];
  bool out_of_memory = false;
  fastgan_product_amx(ProductArgs{rows,
                                  columns,
                                  depth,
                                  a.data.get(),
                                  {a.stride[0], a.stride[1]},
                                  b.data.get(),
                                  {b.stride[0], b.stride[1]},
                                  c.get(),
                                  columns,
                                  sizeof(S) == 2,
                                  add,
                                  &out_of_memory},
                      harness::threads(threads));
  harness::expect(!out_of_memory, "memory");
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      double want = add ? number(before[i * columns + j]) : 0;
      for (int64_t k = 0; k < depth; ++k) want += a.at(i, k) * b.at(k, j);
      harness::expect_close(number(c[i * columns + j]), want, sizeof(S) == 2 ? 8e-3 : 1e-4, "product");
    }
}

}  // namespace

int main() {
  for (int threads : {1, 3})
    for (bool add : {false, true})
      for (bool turned : {false, true}) {
        check<float>(33, 70, 45, turned, !turned, add, threads);
        check<float>(64, 64, 96, turned, turned, add, threads);
        check<bfloat16>(70, 33, 130, !turned, turned, add, threads);
        check<float>(40, 1100, 35, turned, false, add, threads);  // parts of the depth
      }
  check<float>(0, 3, 4, false, false, false, 1);
  check<float>(3, 0, 4, false, false, true, 1);
  check<bfloat16>(3, 4, 0, false, false, false, 1);
  return harness::result();
}
#else
int main() { return 0; }
#endif
