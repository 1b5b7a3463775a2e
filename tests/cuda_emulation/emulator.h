// Runs CUDA kernels on the host, one fiber for each thread of a block, block after block, or cluster after
// cluster. A fiber runs until it waits for others; what hardware leaves undefined is a fault here:
//
//   a barrier or a shuffle that not all threads reach at the same place of the source (divergence)
//   shared memory beyond what was launched with, or, under AddressSanitizer, beyond an array of it
//   another block's shared memory, of a cluster, once that block has ended; an arrival that nobody waits for
//   shared memory that nobody wrote (it holds NaNs), an asynchronous copy read before it was waited for
//   under ThreadSanitizer: accesses of two threads, of one block or of two, that no barrier orders
//
// A fault ends the launch and comes back as its error; only the sanitizers' end the process.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

namespace emulator {

struct Index {
  unsigned x, y, z;
};
using Where = std::source_location;

// Of the thread that is running.
Index thread_index();
Index block_index();
Index block_size();
Index grid_size();

// A launch that was asked for. While `recording`, launches are written down and not made.
struct Record {
  const void* kernel;
  int64_t grid, threads, shared_bytes;
};
bool recording();
void record(const Record& launch);

// Null, or a fault in words. `body` is one thread's work; `cluster` blocks run at the same time.
const char* launch(unsigned grid, unsigned cluster, unsigned threads, size_t shared_bytes,
                   const std::function<void()>& body);

void block_barrier(Where where);
void cluster_arrive(Where where);
void cluster_wait(Where where);
unsigned rank_in_cluster();
// Where `at`, in the running block's shared memory, lies in that of block `rank` of its cluster.
const void* shared_of(unsigned rank, const void* at, size_t bytes);
void warp_barrier(Where where);
constexpr unsigned kLanes = 32;
constexpr size_t kSlot = 64;
// Each lane of a warp hands in `bytes` (kSlot at most). What lane i handed in is kSlot * i bytes behind what
// is returned, until the lane that asks hands in again.
const unsigned char* exchange(const void* mine, size_t bytes, Where where);

// `bytes` of the block's shared memory at an offset; the same for every thread.
void* shared(size_t offset, size_t bytes);

struct AsyncCopy {
  void* to;
  const void* from;
  bool valid;
};
// Of the running thread: adds a copy to the open group; ends the group; takes the oldest copy out of those
// that are older than the last `pending` ended groups, false if there is none.
void async_add(const AsyncCopy& copy);
void async_end_group();
bool async_take(unsigned pending, AsyncCopy* out);

// Ends the launch.
[[noreturn]] void fault(const char* message);

// What each lane of a warp handed in.
template <class T>
struct Lanes {
  static_assert(sizeof(T) <= kSlot && alignof(T) <= 16);
  const T& operator[](int lane) const {
    if (lane < 0 || lane >= int(kLanes)) fault("no such lane");
    return *reinterpret_cast<const T*>(first + size_t(lane) * kSlot);
  }
  const unsigned char* first;
};
template <class T>
Lanes<T> gather(const T& mine, Where where) {
  return {exchange(&mine, sizeof mine, where)};
}

}  // namespace emulator

// What the toolkit's headers would bring.
#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())
