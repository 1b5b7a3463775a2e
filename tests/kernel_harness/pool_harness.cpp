// The pool of large blocks (common/pool.cpp): what is given back serves the next taker of its size, what is
// held stays within its limit, what nobody asks for goes back to the system, and threads do not get in each
// other's way.
#include <cstring>
#include <thread>
#include <vector>

#include "common/pool.cpp"
#include "harness.h"

using namespace fastgan;

namespace {

constexpr int64_t kMega = int64_t(1) << 20;

void reuse() {
  Block a = take_from_pool(5 * kMega + 3);
  harness::expect(a.data && a.size >= 5 * kMega + 3 && a.size <= 6 * kMega,
                  "a block is as large as asked for, and not much more");
  std::memset(a.data, 1, size_t(a.size));
  Block b = take_from_pool(5 * kMega);
  harness::expect(a.data != b.data, "a block in use is nobody else's");
  give_to_pool(a);
  Block c = take_from_pool(5 * kMega);
  harness::expect(c.data == a.data, "what was given back is taken again");
  Block small = take_from_pool(2 * kMega);
  harness::expect(small.size < 3 * kMega, "a small request takes no large block");
  give_to_pool(b), give_to_pool(c), give_to_pool(small);
  harness::expect(pool_state().used == 0 && pool_state().kept > 0, "what nobody uses is kept");
  empty_pool();
  harness::expect(pool_state().kept == 0, "and given back on request");
}

void limit() {
  for (int64_t size = 2; size < 40; ++size) give_to_pool(take_from_pool(size * kMega));
  harness::expect(pool_state().kept <= (39 + 32) * kMega, "sizes that never come back do not pile up");
  for (int64_t i = 0; i < 2000; ++i) give_to_pool(take_from_pool(3 * kMega));
  harness::expect(pool_state().kept <= 4 * kMega, "what nobody asks for is given back to the system");
  empty_pool();
}

void threads() {
  std::vector<std::thread> all;
  for (int t = 0; t < 4; ++t)
    all.emplace_back([t] {
      for (int64_t i = 0; i < 200; ++i) {
        const Block block = take_from_pool((1 + (i * 7 + t) % 5) * kMega);
        int* data = static_cast<int*>(block.data);
        data[0] = t, data[block.size / 4 - 1] = t;
        std::this_thread::yield();
        harness::expect(data[0] == t && data[block.size / 4 - 1] == t, "two threads have the same block");
        give_to_pool(block);
      }
    });
  for (std::thread& each : all) each.join();
  harness::expect(pool_state().used == 0, "everything was given back");
  empty_pool();
}

}  // namespace

int main() {
  reuse();
  limit();
  threads();
  return harness::result();
}
