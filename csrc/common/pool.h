// Memory for large results on the CPU, kept from call to call.
//
// A training step allocates and frees the same sizes again and again. glibc gives blocks above its threshold
// (32 MB at most) back to the kernel at once, and what it keeps below that it scatters, since aligned blocks
// are cut out of larger ones: a step of the DCGAN at 64 × 64 met 20,000 to 30,000 page faults and held 250 MB
// of holes. Here blocks are cut out of regions of address space, each from the lowest place that has room for
// it, and joined again with their free neighbours. So what a step holds is little more than the most that it
// uses at once (there 154 MB of 132; kept by size, each block for takers of its own, it was 170, and twenty
// blocks a step were new), and after the first steps hardly a page is new.
//
// Pages that nobody used for kStale takings are given back to the system.
#pragma once
#include <cstdint>

namespace fastgan {

// Smaller results are torch's: malloc serves them from memory in use.
constexpr int64_t kPooled = int64_t(1) << 20;

struct Block {
  void* data;
  int64_t size;
};

// At least so many bytes, aligned to 256; data is null where there is no memory.
Block take_from_pool(int64_t bytes);
void give_to_pool(Block block);
// The same for a kernel's own scratch, which is at the same place from call to call, warm in the caches.
Block take_scratch(int64_t bytes);
void give_scratch(Block block);
void empty_pool();  // gives back to the system the pages of which nobody uses a byte

// Bytes of blocks in use, and of pages that are there beside them.
struct PoolState {
  int64_t used, kept;
};
PoolState pool_state();

}  // namespace fastgan
