#include "common/pool.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>
#include <vector>
#ifdef __linux__
#include <malloc.h>
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace fastgan {

#ifdef __linux__
namespace {

constexpr int64_t kPage = 4096;
// Regions are of large pages, which spare faults and misses of the address cache.
constexpr int64_t kLargePage = int64_t(2) << 20;
constexpr int64_t kRegion = int64_t(256) << 20;  // address space alone: pages come when they are touched
constexpr int64_t kStale = 512;
// Blocks begin at different places of their first pages, neighbours at different ones: where all begin at the
// same one, a loop that reads two and writes a third waits for stores that only look as if they were to the
// place it reads (4 KB apart), and all meet in the same sets of the caches.
constexpr int64_t kColours = 16;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Address space of large pages. Of each page: whether memory is behind it, and when it was last used.
struct Region {
  char* begin;
  int64_t size;
  struct Page {
    bool there;
    int64_t since;
  };
  std::vector<Page> pages;

  int64_t since(const char* place) const { return pages[size_t((place - begin) / kLargePage)].since; }
};

char* map(int64_t size) {
  void* raw = mmap(nullptr, size_t(size + kLargePage), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(raw);
  const int64_t before =
      (kLargePage - int64_t(reinterpret_cast<uintptr_t>(begin) % uintptr_t(kLargePage))) % kLargePage;
  if (before) munmap(begin, size_t(before));
  if (before < kLargePage) munmap(begin + before + size, size_t(kLargePage - before));
  madvise(begin + before, size_t(size), MADV_HUGEPAGE);
  return begin + before;
}

// Large results are no longer among what malloc sees, so it learns nothing from them: torch's own tensors,
// the derivative of a LeakyReLU for one, would meet new pages at every step. So blocks of up to 32 MB are cut
// out of its heap, which is what it learns by itself at most, and the end of that goes back to the system
// from 256 MB on (it takes twice the former): an R1 step of the DCGAN at 64 × 64 had 50,000 page faults, a
// tenth of its time. Who has set malloc by the environment knows better.
void teach_malloc() {
#ifdef __GLIBC__
  for (const char* name : {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"})
    if (std::getenv(name)) return;
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 256 << 20);
#endif
}

class Pool {
 public:
  std::mutex mutex;

  Block take(int64_t bytes) {
    if (++clock_ % (kStale / 8) == 0) drop(kStale);
    const int64_t size =
        round_up(bytes, kPage) + kPage;  // a page more for the place that the block begins at
    auto range =
        std::find_if(free_.begin(), free_.end(), [&](const auto& each) { return each.second >= size; });
    if (range == free_.end()) range = add_region(size);
    if (range == free_.end()) return {};
    const auto [begin, room] = *range;
    free_.erase(range);
    if (room > size) free_.emplace(begin + size, room - size);
    touch(begin, size);
    taken_ += size;
    const int64_t colour = int64_t(reinterpret_cast<uintptr_t>(begin) / uintptr_t(kPage)) * 5 % kColours;
    return {begin + colour * (kPage / kColours), size - kPage};
  }

  void give(Block block) {
    char* begin = begin_of(block);
    int64_t size = extent_of(block);
    touch(begin, size);
    taken_ -= size;
    auto next = free_.lower_bound(begin);
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == begin && !begins_region(begin)) {
        begin = before->first, size += before->second;
        free_.erase(before);
      }
    }
    if (next != free_.end() && begin + size == next->first && !begins_region(next->first)) {
      size += next->second;
      free_.erase(next);
    }
    free_.emplace(begin, size);
  }

  Block take_scratch(int64_t bytes) {
    if (scratch_.size >= bytes && scratch_.data) return std::exchange(scratch_, Block{});
    free_scratch();
    return take(bytes);
  }

  void give_scratch(Block block) {
    if (scratch_.data) return give(block);
    touch(begin_of(block), extent_of(block));
    scratch_ = block;
  }

  // Gives back the pages of which no byte is in use, and was not for so many takings; and regions of such.
  void drop(int64_t takings) {
    if (scratch_.data && clock_ - region_of(begin_of(scratch_)).since(begin_of(scratch_)) >= takings)
      free_scratch();
    for (const auto& [begin, size] : free_) {
      Region& region = region_of(begin);
      const int64_t last = (begin + size - region.begin) / kLargePage;
      for (int64_t page = round_up(begin - region.begin, kLargePage) / kLargePage; page < last; ++page) {
        const int64_t first = page;
        while (page < last && region.pages[size_t(page)].there &&
               clock_ - region.pages[size_t(page)].since >= takings)
          region.pages[size_t(page++)].there = false;
        if (page > first)
          madvise(region.begin + first * kLargePage, size_t((page - first) * kLargePage), MADV_DONTNEED);
      }
    }
    auto is_unused = [&](const Region& region) {
      const auto range = free_.find(region.begin);
      if (range == free_.end() || range->second != region.size ||
          std::any_of(region.pages.begin(), region.pages.end(), [](const auto& page) { return page.there; }))
        return false;
      free_.erase(range);
      munmap(region.begin, size_t(region.size));
      return true;
    };
    regions_.erase(std::remove_if(regions_.begin(), regions_.end(), is_unused), regions_.end());
  }

  PoolState state() const {
    int64_t there = 0;
    for (const Region& region : regions_)
      there += std::count_if(region.pages.begin(), region.pages.end(),
                             [](const auto& page) { return page.there; });
    const int64_t used = taken_ - (scratch_.data ? extent_of(scratch_) : 0);
    return {used, there * kLargePage - used};
  }

 private:
  std::vector<Region> regions_;    // by address
  std::map<char*, int64_t> free_;  // ranges of bytes that nobody uses, never across regions
  Block scratch_{};                // waits for the next kernel that wants some
  int64_t taken_ = 0, clock_ = 0;  // bytes that are not free, scratch that waits among them; takings so far

  static char* begin_of(Block block) {
    char* data = static_cast<char*>(block.data);
    return data - reinterpret_cast<uintptr_t>(data) % uintptr_t(kPage);
  }

  static int64_t extent_of(Block block) { return block.size + kPage; }

  void free_scratch() {
    if (scratch_.data) give(std::exchange(scratch_, Block{}));
  }

  std::map<char*, int64_t>::iterator add_region(int64_t size) {
    int64_t all = 0;
    for (const Region& region : regions_) all += region.size;
    size = round_up(size, kLargePage);
    int64_t wanted = std::max({size, all, kRegion});
    char* begin = map(wanted);
    if (!begin) begin = map(wanted = size);
    if (!begin) return free_.end();
    Region region{begin, wanted, std::vector<Region::Page>(size_t(wanted / kLargePage))};
    auto at = std::upper_bound(regions_.begin(), regions_.end(), begin,
                               [](const char* place, const Region& each) { return place < each.begin; });
    regions_.insert(at, std::move(region));
    return free_.emplace(begin, wanted).first;
  }

  Region& region_of(const char* place) {
    return *std::prev(std::upper_bound(regions_.begin(), regions_.end(), place,
                                       [](const char* p, const Region& each) { return p < each.begin; }));
  }
  bool begins_region(const char* place) { return region_of(place).begin == place; }

  // Of a block that is taken or given: memory is behind its pages, and now is when they were last used.
  void touch(char* begin, int64_t size) {
    Region& region = region_of(begin);
    const int64_t last = (begin + size - 1 - region.begin) / kLargePage;
    for (int64_t page = (begin - region.begin) / kLargePage; page <= last; ++page)
      region.pages[size_t(page)] = {true, clock_};
  }
};

Pool& pool();

void before_fork() { pool().mutex.lock(); }
void after_fork() { pool().mutex.unlock(); }

// Never destroyed: tensors may outlive every static object.
Pool& pool() {
  static Pool& the = *[] {
    pthread_atfork(before_fork, after_fork, after_fork);
    teach_malloc();
    return new Pool;
  }();
  return the;
}

}  // namespace

Block take_from_pool(int64_t bytes) {
  std::lock_guard<std::mutex> lock(pool().mutex);
  return pool().take(bytes);
}

void give_to_pool(Block block) {
  std::lock_guard<std::mutex> lock(pool().mutex);
  pool().give(block);
}

Block take_scratch(int64_t bytes) {
  std::lock_guard<std::mutex> lock(pool().mutex);
  return pool().take_scratch(bytes);
}

void give_scratch(Block block) {
  std::lock_guard<std::mutex> lock(pool().mutex);
  pool().give_scratch(block);
}

void empty_pool() {
  std::lock_guard<std::mutex> lock(pool().mutex);
  pool().drop(0);
}

PoolState pool_state() {
  std::lock_guard<std::mutex> lock(pool().mutex);
  return pool().state();
}

#else  // nothing is kept

Block take_from_pool(int64_t bytes) {
  bytes = (bytes + 255) / 256 * 256;
  void* data = std::aligned_alloc(256, size_t(bytes));
  return {data, data ? bytes : 0};
}
void give_to_pool(Block block) { std::free(block.data); }
Block take_scratch(int64_t bytes) { return take_from_pool(bytes); }
void give_scratch(Block block) { give_to_pool(block); }
void empty_pool() {}
PoolState pool_state() { return {0, 0}; }
#endif

}  // namespace fastgan
