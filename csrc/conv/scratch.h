// The memory of the convolution kernels: one workspace, cut into parts, and pieces of it for the threads.
#pragma once
#include <cstdlib>

#include "conv/layout.h"

namespace fastgan {
namespace {

FASTGAN_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTGAN_INLINE int64_t whole_slices(int64_t n) { return divide_up(n, kSlice) * kSlice; }

// Cuts the workspace into its parts; with no workspace, only counts.
struct Cutter {
  char* data;
  int64_t used = 0;
  char* take(int64_t bytes) {
    char* out = data ? data + used : nullptr;
    used += divide_up(bytes, 64) * 64;
    return out;
  }
};

// Scratch of the threads: as many pieces as threads were announced; whoever comes after them allocates, and
// where there is no memory left leaves the work to those who came before.
struct Slots {
  char* data;
  int64_t size, count;
  int64_t taken = 0, next = 0;

  Slots(Cutter& cutter, int64_t floats, int64_t threads)
      : size(divide_up(floats * 4, 64) * 64), count(threads) {
    data = cutter.take(size * count);
  }
  float* of(int64_t i) const { return reinterpret_cast<float*>(data + i * size); }
};

struct Slot {
  float* data;
  bool own;
  explicit Slot(Slots& slots) {
    const int64_t i = __atomic_fetch_add(&slots.taken, 1, __ATOMIC_RELAXED);
    own = i >= slots.count;
    data = own ? static_cast<float*>(std::aligned_alloc(64, size_t(slots.size))) : slots.of(i);
  }
  void release() {
    if (own) std::free(data);
  }
};

// Each thread takes the next item that nobody has: a thread that the machine holds up delays one item and not
// its share. The items write to different places, so who takes which changes nothing.
template <class Body>
void over_slots(const Threads& threads, Slots& slots, int64_t count, const Body& body) {
  slots.taken = slots.next = 0;
  parallel_for(threads, count, 1, [&](int64_t, int64_t) {
    Slot slot(slots);
    if (!slot.data) return;
    for (int64_t i; (i = __atomic_fetch_add(&slots.next, 1, __ATOMIC_RELAXED)) < count;) body(i, slot.data);
    slot.release();
  });
}

// Worker i of `count` is the same thread in every call, where the pool that is handed in keeps its threads in
// order: what it wrote before is in its own caches.
template <class Body>
void over_workers(const Threads& threads, Slots& slots, int64_t count, const Body& body) {
  parallel_for(threads, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(worker, slots.of(worker));
  });
}

// Whether all numbers that went by were finite: 0 times any other is NaN, and stays in the sum. Several sums,
// so that none waits for the one before.
struct Check {
  Vec<float> sums[4] = {};
  FASTGAN_INLINE void see(int i, Vec<float> v) { sums[i % 4] += v * 0.0f; }
  void tell(int32_t* nonfinite) const {
    const Vec<float> all = sums[0] + sums[1] + sums[2] + sums[3];
    for (int i = 0; i < lanes<float>; ++i)
      if (all[i] != all[i]) __atomic_store_n(nonfinite, 1, __ATOMIC_RELAXED);
  }
};

}  // namespace
}  // namespace fastgan
