#include "common/pool.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <vector>
#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace fastgan {
namespace {

constexpr int64_t kPage = 4096, kLargePage = int64_t(2) << 20;
constexpr int64_t kStale = 512;
// Sizes from one power of two to the next: the untouched rest of a block costs nothing.
constexpr int64_t kClasses = 16;
constexpr int64_t kLooseness = 8;  // a block serves whoever wants at least 1 - 1/8 of it

int64_t class_of(int64_t bytes) {
  int64_t step = kPage;
  while (step * kClasses * 2 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

// Blocks begin at different places of a page, in turn: where all begin at the same one, a loop that reads two
// and writes a third waits for stores that only look as if they were to the place it reads (4 KB apart), and
// all meet in the same sets of the caches.
constexpr int64_t kColours = 16;

#ifdef __linux__
void* map(int64_t size, int64_t colour) {
  // Large ones on a boundary of large pages, which spare faults and misses of the address cache.
  const int64_t room = size + kPage, boundary = size < kLargePage ? kPage : kLargePage;
  void* raw = mmap(nullptr, size_t(room + boundary - kPage), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(raw);
  const int64_t before =
      (boundary - int64_t(reinterpret_cast<uintptr_t>(begin) % uintptr_t(boundary))) % boundary;
  if (before) munmap(begin, size_t(before));
  if (const int64_t after = boundary - kPage - before) munmap(begin + before + room, size_t(after));
  if (boundary == kLargePage) madvise(begin + before, size_t(room), MADV_HUGEPAGE);
  return begin + before + colour * (kPage / kColours);
}
void unmap(Block block) {
  char* data = static_cast<char*>(block.data);
  munmap(data - reinterpret_cast<uintptr_t>(data) % uintptr_t(kPage), size_t(block.size + kPage));
}
// malloc takes what it once gave back, up to 32 MB, for the size from which on it asks the system each time,
// and twice that for what it keeps at hand. Large results are no longer among what it sees, so it is shown
// one: torch's own tensors of 128 KB and more would otherwise meet new pages at every step.
void teach_malloc() {
  void* volatile once = std::malloc((size_t(32) << 20) - size_t(2 * kPage));
  std::free(once);
}
#else
void* map(int64_t size, int64_t) { return std::aligned_alloc(size_t(kPage), size_t(size)); }
void unmap(Block block) { std::free(block.data); }
void teach_malloc() {}
#endif

struct Kept {
  Block block;
  int64_t since;
};

struct Pool {
  std::mutex mutex;
  std::vector<Kept> kept;  // the longest waiting first
  int64_t used = 0, waiting = 0, clock = 0, colour = 0;
  int64_t peak = 0, last_peak = 0;  // of `used`, in this and in the last kStale takings

  void drop_first() {
    unmap(kept.front().block);
    waiting -= kept.front().block.size;
    kept.erase(kept.begin());
  }
  // A quarter more than the most that was used, 32 MB at least: the sizes needed at one moment are not those
  // of another.
  int64_t limit() const {
    const int64_t most = std::max(peak, last_peak);
    return most + std::max(most / 4, int64_t(32) << 20);
  }
  void shrink(int64_t coming) {
    while (!kept.empty() && used + waiting + coming > limit()) drop_first();
  }
};

Pool& pool();

void before_fork() { pool().mutex.lock(); }
void after_fork() { pool().mutex.unlock(); }

// Never destroyed: tensors may outlive every static object.
Pool& pool() {
  static Pool& the = *[] {
#ifdef __linux__
    pthread_atfork(before_fork, after_fork, after_fork);
#endif
    teach_malloc();
    return new Pool;
  }();
  return the;
}

}  // namespace

Block take_from_pool(int64_t bytes) {
  Pool& p = pool();
  const int64_t size = class_of(bytes);
  std::lock_guard<std::mutex> lock(p.mutex);
  if (++p.clock % kStale == 0) p.last_peak = p.peak, p.peak = p.used;
  while (!p.kept.empty() && p.clock - p.kept.front().since > kStale) p.drop_first();
  auto best = p.kept.end();
  for (auto each = p.kept.begin(); each != p.kept.end(); ++each)
    if (each->block.size >= size && each->block.size - each->block.size / kLooseness <= size &&
        (best == p.kept.end() || each->block.size <= best->block.size))
      best = each;  // of equals the last given back, whose memory may still be in a cache
  Block block{};
  if (best != p.kept.end()) {
    block = best->block;
    p.waiting -= block.size;
    p.kept.erase(best);
  } else {
    p.peak = std::max(p.peak, p.used + size);
    p.shrink(size);
    p.colour = (p.colour + 5) % kColours;
    block = {map(size, p.colour), size};
    while (!block.data && !p.kept.empty()) p.drop_first(), block.data = map(size, p.colour);
    if (!block.data) return {};
  }
  p.used += block.size;
  p.peak = std::max(p.peak, p.used);
  return block;
}

void give_to_pool(Block block) {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  p.used -= block.size;
  p.waiting += block.size;
  p.kept.push_back({block, p.clock});
  p.shrink(0);
}

void empty_pool() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  while (!p.kept.empty()) p.drop_first();
}

PoolState pool_state() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  return {p.used, p.waiting};
}

}  // namespace fastgan
