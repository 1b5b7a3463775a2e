// Threads handed in: a kernel cuts its work by shape, never by the number of threads (the same bits for every
// thread count), and hands the pieces to whoever called it. Under PyTorch that is torch's own pool
// (csrc/common/tensor.h); in tests/kernel_harness it is std::thread. Kernel files include this and nothing of
// PyTorch.
#pragma once
#include <cstdint>

namespace fastgan {

using RangeBody = void (*)(int64_t begin, int64_t end, void* context);

struct Threads {
  // Calls body on disjoint ranges that cover [0, count), each of at least `grain` items where there are that
  // many.
  void (*parallel_for)(int64_t count, int64_t grain, RangeBody body, void* context);
};

namespace {

// The unnamed namespace keeps every instantiation local to its object file: an inline function shared between
// objects for different instruction sets would be merged by the linker, and the AVX-512 copy would run
// everywhere.
template <class Body>
inline void parallel_for(const Threads& threads, int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  threads.parallel_for(
      count, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace
}  // namespace fastgan
