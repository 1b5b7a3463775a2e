// The pool of large blocks (common/pool.cpp): what is given back serves the next takers, joined or in parts,
// what nobody asks for goes back to the system, and threads do not get in each other's way.
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

void join() {
  std::vector<Block> blocks;
  for (int64_t i = 0; i < 8; ++i) blocks.push_back(take_from_pool((2 + i % 3) * kMega));
  for (Block block : blocks) std::memset(block.data, 1, size_t(block.size));
  const int64_t there = pool_state().used + pool_state().kept;
  for (size_t i : {1, 6, 3, 0, 2, 5, 4, 7}) give_to_pool(blocks[i]);
  Block all = take_from_pool(22 * kMega);
  harness::expect(all.data == blocks[0].data && pool_state().used + pool_state().kept <= there + 4 * kMega,
                  "what was given back in any order is one piece again");
  Block part = take_from_pool(2 * kMega);
  give_to_pool(all);
  Block first = take_from_pool(3 * kMega), second = take_from_pool(3 * kMega);
  harness::expect(first.data == all.data && second.data > first.data && second.data < part.data,
                  "and is cut into parts from its beginning");
  give_to_pool(first), give_to_pool(second), give_to_pool(part);
  // More than a region, and a region more.
  Block large = take_from_pool(300 * kMega), more = take_from_pool(100 * kMega);
  static_cast<char*>(large.data)[large.size - 1] = 1, static_cast<char*>(more.data)[more.size - 1] = 1;
  give_to_pool(more), give_to_pool(large);
  empty_pool();
  harness::expect(pool_state().kept == 0, "regions are given back");
}

void limit() {
  for (int64_t size = 2; size < 40; ++size) give_to_pool(take_from_pool(size * kMega));
  harness::expect(pool_state().kept <= 42 * kMega, "sizes that never come back do not pile up");
  for (int64_t i = 0; i < 2000; ++i) give_to_pool(take_from_pool(3 * kMega));
  harness::expect(pool_state().kept <= 4 * kMega, "what nobody asks for is given back to the system");
  empty_pool();
}

void scratch() {
  const Block first = take_scratch(9 * kMega);
  std::memset(first.data, 1, size_t(first.size));
  give_scratch(first);
  harness::expect(pool_state().used == 0, "scratch that waits is in nobody's use");
  Block between = take_from_pool(2 * kMega);
  Block again = take_scratch(5 * kMega), other = take_scratch(5 * kMega);
  harness::expect(again.data == first.data, "it stays where it was");
  harness::expect(other.data != again.data && other.data != between.data,
                  "two kernels at once have one each");
  give_scratch(other), give_scratch(again);
  Block larger = take_scratch(20 * kMega);
  harness::expect(larger.size >= 20 * kMega, "and it grows");
  give_scratch(larger), give_to_pool(between);
  empty_pool();
  harness::expect(pool_state().used == 0 && pool_state().kept == 0, "scratch is given back on request");
}

// Blocks of all sizes in no order: each page of each says whose it is, and nobody else writes there.
void random_order() {
  struct Mine {
    Block block;
    int64_t mark;
  };
  std::vector<Mine> blocks;
  uint64_t state = 1;
  auto next = [&](uint64_t below) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (state >> 33) % below;
  };
  auto pages = [](const Mine& each, auto visit) {
    for (int64_t at = 0; at + 8 <= each.block.size; at += 4096)
      visit(reinterpret_cast<int64_t*>(static_cast<char*>(each.block.data) + at));
  };
  bool right = true;
  for (int64_t i = 0; i < 3000; ++i) {
    if (blocks.size() < 20 && next(2) == 0) {
      const int64_t size = kMega + int64_t(next(1 << 20)) % (next(8) == 0 ? 40 * kMega : 3 * kMega);
      blocks.push_back({take_from_pool(size), i});
      pages(blocks.back(), [&](int64_t* at) { *at = i; });
    } else if (!blocks.empty()) {
      const size_t which = size_t(next(blocks.size()));
      pages(blocks[which], [&](int64_t* at) { right = right && *at == blocks[which].mark; });
      give_to_pool(blocks[which].block);
      blocks.erase(blocks.begin() + int64_t(which));
    }
    if (i % 500 == 499) empty_pool();
  }
  for (const Mine& each : blocks) {
    pages(each, [&](int64_t* at) { right = right && *at == each.mark; });
    give_to_pool(each.block);
  }
  harness::expect(right, "what lies in a block is left alone");
  harness::expect(pool_state().used == 0, "all of it was given back");
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
  join();
  limit();
  scratch();
  random_order();
  threads();
  return harness::result();
}
