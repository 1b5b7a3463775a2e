// What the harnesses share: threads from the standard library in place of torch's, exact-size buffers (so
// that the address sanitizer sees a read one element beyond), and a count of failures.
//
// A harness includes csrc/<stem>/<stem>.h and calls FASTGAN_KERNEL(<stem>_forward)(arguments,
// harness::threads(n)): run.sh compiles both files for one instruction set at a time. Its main() ends
// with `return harness::result();`.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "common/capability.h"
#include "common/threads.h"

namespace harness {

inline int& thread_count() {
  static int count = 1;
  return count;
}

// Cuts a range as torch does: equal pieces, none smaller than the grain, at most one for each thread.
inline const fastgan::Threads& threads(int count) {
  static const fastgan::Threads shared{[](int64_t n, int64_t grain, fastgan::RangeBody body, void* context) {
    int64_t wanted = thread_count(), most = (n + (grain > 0 ? grain : 1) - 1) / (grain > 0 ? grain : 1);
    int64_t pieces = wanted < most ? wanted : most;
    if (pieces <= 1) return body(0, n, context);
    int64_t each = (n + pieces - 1) / pieces;
    std::vector<std::thread> pool;
    for (int64_t begin = 0; begin < n; begin += each)
      pool.emplace_back(body, begin, begin + each < n ? begin + each : n, context);
    for (std::thread& thread : pool) thread.join();
  }};
  thread_count() = count;
  return shared;
}

// Uninitialised heap memory of exactly `count` elements.
template <class T>
struct Buffer {
  explicit Buffer(int64_t count) : size(count), data(new T[size_t(count)]) {}
  T& operator[](int64_t i) { return data[size_t(i)]; }
  const T& operator[](int64_t i) const { return data[size_t(i)]; }
  T* get() { return data.get(); }
  int64_t size;
  std::unique_ptr<T[]> data;
};

inline std::mt19937& generator() {
  static std::mt19937 shared(0);
  return shared;
}

template <class T>
Buffer<T> normal(int64_t count) {
  Buffer<T> out(count);
  std::normal_distribution<double> draw;
  for (int64_t i = 0; i < count; ++i) out[i] = T(draw(generator()));
  return out;
}

// HARNESS_EVERY=n runs each n-th case: where a case takes long (the emulator of CUDA).
inline bool is_chosen() {
  static const char* given = std::getenv("HARNESS_EVERY");
  static int every = given ? std::atoi(given) : 1, count = 0;
  return count++ % every == 0;
}

// Thread counts to try, 1 to this: HARNESS_THREADS, for an emulator whose threads are not ours.
inline int most_threads() {
  static const char* given = std::getenv("HARNESS_THREADS");
  return given ? std::atoi(given) : 3;
}

inline int& failures() {
  static int count = 0;
  return count;
}

inline void expect(bool ok, const char* what, double value = 0) {
  if (ok) return;
  if (++failures() <= 20) std::printf("FAILED %s (%.9g)\n", what, value);
}

// |got - exact| at most `tolerance` times max(1, |exact|); NaN equals NaN.
inline void expect_close(double got, double exact, double tolerance, const char* what) {
  if (std::isnan(exact) ? std::isnan(got) : got == exact) return;
  double error = std::fabs(got - exact) / std::fmax(1.0, std::fabs(exact));
  expect(error <= tolerance, what, error);
}

inline int result() {
  std::printf("%d failures\n", failures());
  return failures() != 0;
}

}  // namespace harness
