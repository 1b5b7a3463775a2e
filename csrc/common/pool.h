// Memory for large results on the CPU, kept from call to call.
//
// A training step allocates and frees the same sizes again and again. glibc gives blocks above its threshold
// (32 MB at most) back to the kernel at once, and what it keeps below that it scatters, since aligned blocks
// are cut out of larger ones: a step of the DCGAN at 64 × 64 met 20,000 to 30,000 page faults and held 250 MB
// of holes. Here a block that is given back waits for the next taker of about its size.
//
// What is held is at most a quarter, or 32 MB, more than the most that was in use at once (of late), and a
// block for which nobody asked in kStale takings is given back to the system.
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
void empty_pool();  // gives back to the system what nobody uses

struct PoolState {
  int64_t used, kept;  // bytes
};
PoolState pool_state();

}  // namespace fastgan
