// Fibers, barriers and shared memory of the emulator. Compiled without ThreadSanitizer's instrumentation,
// whose runtime is told of the fibers and of what a barrier orders (EMULATOR_TSAN): a shuffle orders nothing.
#include "emulator.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EMULATOR_TSAN)
#include <sanitizer/tsan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(EMULATOR_TSAN)
constexpr size_t kStack = 256 * 1024;
#else
constexpr size_t kStack = 64 * 1024;
#endif
constexpr size_t kGap = 64;
constexpr size_t kAlignment = 1024;  // of an array; what is swizzled goes by the address
constexpr unsigned kCopies = 256, kArrays = 64;

enum class State { ready, at_block_barrier, at_cluster_barrier, in_warp, done };

struct Copies {
  AsyncCopy ring[kCopies];
  unsigned groups[kCopies];
  unsigned first, end, group;
};

struct Fiber {
  void* stack = nullptr;
  void* context = nullptr;  // the stack pointer while it does not run
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  State state = State::done;
  Where where;
  bool arrived = false;  // at the cluster's barrier, and when
  unsigned phase = 0;
  std::unique_ptr<Copies> copies =
      std::make_unique<Copies>();  // elsewhere: the scheduler goes through fibers' states
#if !defined(__x86_64__)
  ucontext_t machine;
#endif
};

struct Warp {
  unsigned arrived = 0, round = 0;
  Where where;                                        // of the first that has come
  alignas(16) unsigned char slots[2][kLanes][kSlot];  // by turns: a lane may be one exchange ahead of another
};

struct Array {
  size_t offset, bytes;
  unsigned char* data;
};

struct Block {
  unsigned at_barrier = 0;
  Where barrier;  // of the first that waits at it
  Array arrays[kArrays];
  unsigned array_count = 0;
  std::vector<unsigned char> arena;
  size_t arena_used = 0;
};

// Of a cluster, its blocks' threads one block's after another's.
struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  unsigned threads = 0, grid = 0, first_block = 0, running = 0, at_barrier = 0;
  unsigned phase = 0;  // of the cluster's barrier
  Where barrier;
  const std::function<void()>* body = nullptr;
  std::string error;
  std::vector<std::vector<unsigned char>>
      arenas_before;  // freed when the launch has ended: blocks run at once
  size_t shared_bytes = 0;
  Fiber main;
  const void* main_bottom = nullptr;
  size_t main_size = 0;
};
Machine machine;

unsigned rank() { return machine.running / machine.threads; }
unsigned thread() { return machine.running % machine.threads; }
unsigned block() { return machine.first_block + rank(); }
Block& my_block() { return machine.blocks[rank()]; }

#if defined(EMULATOR_TSAN)
// What orders what: the end of a launch, and for each block its barrier, its cluster's and those of its
// warps. A block has tokens of its own, or one block's barriers would hide another's races.
constexpr unsigned kTokenBlocks = 256;
uint64_t launch_token, tokens[kTokenBlocks][2 + 1024 / kLanes];
uint64_t* barrier_token() { return &tokens[block() % kTokenBlocks][0]; }
uint64_t* cluster_token() { return &tokens[machine.first_block % kTokenBlocks][1]; }
uint64_t* warp_token() { return &tokens[block() % kTokenBlocks][2 + thread() / kLanes]; }

// A number that is given to a new fiber would make the accesses of both one thread's: kept to the end.
constexpr size_t kMostFibers = 4096;
std::vector<void*> ended;
void destroy_ended() {
  for (void* each : ended) __tsan_destroy_fiber(each);
  ended.clear();
}
#endif

#if defined(__x86_64__)
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
#endif

void change(Fiber& from, Fiber& to, bool from_ends) {
#if defined(EMULATOR_TSAN)
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  bool to_main = &to == &machine.main;
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack,
                                 to_main ? machine.main_bottom : to.stack,
                                 to_main ? machine.main_size : kStack);
#endif
  (void)from_ends;
#if defined(__x86_64__)
  emulator_switch(&from.context, to.context);
#else
  swapcontext(&from.machine, &to.machine);
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(from.fake_stack, &bottom, &size);
#endif
}

Fiber& current() { return machine.fibers[machine.running]; }

void leave(bool ends) { change(current(), machine.main, ends); }

void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.main_bottom, &machine.main_size);
#endif
  (*machine.body)();
  if (current().arrived) fault("a thread ends that has arrived at its cluster's barrier and not waited");
#if defined(EMULATOR_TSAN)
  __tsan_release(&launch_token);
#endif
  current().state = State::done;
  leave(true);
  std::abort();
}

void* new_stack() {
  void* out = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (out == MAP_FAILED) std::abort();
  return out;
}

void start(Fiber& fiber) {
  fiber.copies->first = fiber.copies->end = fiber.copies->group = 0;
#if defined(EMULATOR_TSAN)
  // Fresh memory: that another fiber wrote an old frame there is no race.
  fiber.stack = new_stack();
  fiber.tsan = __tsan_create_fiber(0);
#endif
  if (!fiber.stack) fiber.stack = new_stack();
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStack);
#endif
  fiber.fake_stack = nullptr;
  fiber.state = State::ready;
  fiber.arrived = false;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(static_cast<char*>(fiber.stack) + kStack) - 2;
  *top = reinterpret_cast<void*>(&entry);  // where emulator_switch returns to, after six registers
  fiber.context = top - 6;
#else
  getcontext(&fiber.machine);
  fiber.machine.uc_stack.ss_sp = fiber.stack;
  fiber.machine.uc_stack.ss_size = kStack;
  fiber.machine.uc_link = nullptr;
  makecontext(&fiber.machine, entry, 0);
#endif
}

void finish(Fiber& fiber) {
  (void)fiber;
#if defined(EMULATOR_TSAN)
  ended.push_back(fiber.tsan);
  munmap(fiber.stack, kStack);
  fiber.stack = nullptr;
#endif
}

void start_block(Block& block) {
  block.array_count = 0;
#if defined(__SANITIZE_ADDRESS__)
  if (!block.arena.empty()) __asan_unpoison_memory_region(block.arena.data(), block.arena.size());
#endif
  // Room for gaps between arrays; every byte 0xff makes NaNs of what is read unwritten.
  machine.arenas_before.push_back(std::move(block.arena));
  block.arena = std::vector<unsigned char>(machine.shared_bytes + kArrays * (kGap + kAlignment), 0xff);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(block.arena.data(), block.arena.size());
#endif
  block.arena_used = 0;
  block.at_barrier = 0;
}

void start_cluster() {
#if defined(EMULATOR_TSAN)
  if (ended.size() > kMostFibers) destroy_ended();
#endif
  for (Block& block : machine.blocks) start_block(block);
  machine.at_barrier = 0;
  machine.warps.assign(machine.fibers.size() / kLanes, {});
  for (Fiber& fiber : machine.fibers) start(fiber);
}

std::string described(const Fiber& fiber) {
  switch (fiber.state) {
    case State::done:
      return "has ended";
    case State::at_block_barrier:
      return "waits for its block at line " + std::to_string(fiber.where.line());
    case State::at_cluster_barrier:
      return "waits for its cluster at line " + std::to_string(fiber.where.line());
    case State::in_warp:
      return "waits for its warp at line " + std::to_string(fiber.where.line());
    default:
      return "runs";
  }
}

// Nobody can go on: which threads wait where, in runs of equals.
std::string deadlock() {
  std::string out = "divergence: not all threads reach a barrier or shuffle";
  for (unsigned i = 0; i < machine.fibers.size();) {
    unsigned end = i + 1;
    std::string state = described(machine.fibers[i]);
    while (end < machine.fibers.size() && described(machine.fibers[end]) == state) ++end;
    if (out.size() < 600)
      out += "; thread " + std::to_string(i) + (end > i + 1 ? " to " + std::to_string(end - 1) : "") + " " +
             state;
    i = end;
  }
  return out;
}

void run_cluster() {
  start_cluster();
  for (bool alive = true; alive && machine.error.empty();) {
    bool moved = false;
    alive = false;
    for (unsigned i = 0; i < machine.fibers.size() && machine.error.empty(); ++i) {
      Fiber& fiber = machine.fibers[i];
      if (fiber.state == State::ready) {
        machine.running = i;
        change(machine.main, fiber, false);
        moved = true;
      }
      alive = alive || fiber.state != State::done;
    }
    if (alive && !moved && machine.error.empty()) machine.error = deadlock();
  }
  for (Fiber& fiber : machine.fibers) finish(fiber);
}

// By words, and not one call of memcpy, which ThreadSanitizer intercepts.
void copy(unsigned char* to, const unsigned char* from, size_t bytes) {
  for (; bytes >= 8; bytes -= 8, to += 8, from += 8) std::memcpy(to, from, 8);
  for (; bytes > 0; --bytes) *to++ = *from++;
}

bool same_place(const Where& a, const Where& b) { return a.line() == b.line() && a.column() == b.column(); }

// One lane more has come; goes on when all have.
void meet_warp(Where where) {
  unsigned first = machine.running / kLanes * kLanes;
  Warp& warp = machine.warps[machine.running / kLanes];
  current().where = where;
  if (warp.arrived == 0) warp.where = where;
  if (!same_place(warp.where, where)) fault("divergence: two lanes of a warp wait at different places");
  if (++warp.arrived == kLanes) {
    warp.arrived = 0;
    ++warp.round;
    for (unsigned i = first; i < first + kLanes; ++i) machine.fibers[i].state = State::ready;
    return;
  }
  current().state = State::in_warp;
  leave(false);
}

}  // namespace

Index thread_index() { return {thread(), 0, 0}; }
Index block_index() { return {block(), 0, 0}; }
Index block_size() { return {machine.threads, 1, 1}; }
Index grid_size() { return {machine.grid, 1, 1}; }

void fault(const char* message) {
  machine.error = message;
  leave(false);
  std::abort();
}

static bool is_recording = false;
static std::vector<Record> records;
bool recording() { return is_recording; }
void record(const Record& launch) { records.push_back(launch); }

const char* launch(unsigned grid, unsigned cluster, unsigned threads, size_t shared_bytes,
                   const std::function<void()>& body) {
  static std::string last;
  if (threads == 0 || threads > 1024 || threads % kLanes) return "emulator: threads must be 32, 64, ... 1024";
  if (cluster == 0 || cluster > 8 || grid % cluster) return "emulator: clusters must be of up to 8 blocks";
  const unsigned together = cluster * threads;
  if (machine.fibers.size() < together) machine.fibers.resize(together);
  machine.threads = threads, machine.grid = grid, machine.shared_bytes = shared_bytes;
  machine.blocks.resize(cluster);
  machine.body = &body;
  machine.error.clear();
  std::vector<Fiber> rest;  // a launch of fewer threads than before leaves the others' stacks alone
  while (machine.fibers.size() > together) {
    rest.push_back(std::move(machine.fibers.back()));
    machine.fibers.pop_back();
  }
#if defined(EMULATOR_TSAN)
  machine.main.tsan = __tsan_get_current_fiber();
#endif
  for (machine.first_block = 0; machine.first_block < grid && machine.error.empty();
       machine.first_block += cluster)
    run_cluster();
#if defined(EMULATOR_TSAN)
  __tsan_acquire(&launch_token);
  destroy_ended();
#endif
  machine.arenas_before.clear();
  for (Fiber& fiber : rest) machine.fibers.push_back(std::move(fiber));
  if (machine.error.empty()) return nullptr;
  last = "emulator: block " + std::to_string(block() - cluster) + ", " + machine.error;
  return last.c_str();
}

void block_barrier(Where where) {
  Block& mine = my_block();
  if (mine.at_barrier == 0) mine.barrier = where;
  if (!same_place(mine.barrier, where))
    fault("divergence: two threads of a block wait at different barriers");
#if defined(EMULATOR_TSAN)
  __tsan_release(barrier_token());
#endif
  current().where = where;
  if (++mine.at_barrier == machine.threads) {
    mine.at_barrier = 0;
    const unsigned first = rank() * machine.threads;
    for (unsigned i = first; i < first + machine.threads; ++i) machine.fibers[i].state = State::ready;
  } else {
    current().state = State::at_block_barrier;
    leave(false);
  }
#if defined(EMULATOR_TSAN)
  __tsan_acquire(barrier_token());
#endif
}

void cluster_arrive(Where where) {
  if (machine.at_barrier == 0) machine.barrier = where;
  if (!same_place(machine.barrier, where))
    fault("divergence: two threads of a cluster arrive at different places");
  if (current().arrived) fault("a thread arrives at its cluster's barrier twice");
#if defined(EMULATOR_TSAN)
  __tsan_release(cluster_token());
#endif
  current().arrived = true;
  current().phase = machine.phase;
  if (++machine.at_barrier < machine.fibers.size()) return;
  machine.at_barrier = 0;
  ++machine.phase;
  for (Fiber& fiber : machine.fibers)
    if (fiber.state == State::at_cluster_barrier) fiber.state = State::ready;
}

void cluster_wait(Where where) {
  if (!current().arrived) fault("a thread waits for its cluster and has not arrived");
  current().where = where;
  if (machine.phase == current().phase) {
    current().state = State::at_cluster_barrier;
    leave(false);
  }
  current().arrived = false;
#if defined(EMULATOR_TSAN)
  __tsan_acquire(cluster_token());
#endif
}

unsigned rank_in_cluster() { return rank(); }

const void* shared_of(unsigned rank, const void* at, size_t bytes) {
  if (rank >= machine.blocks.size()) fault("no such block in the cluster");
  bool runs = false;
  for (unsigned i = 0; i < machine.threads; ++i)
    runs = runs || machine.fibers[rank * machine.threads + i].state != State::done;
  if (!runs) fault("shared memory of a block that has ended");
  const auto* place = static_cast<const unsigned char*>(at);
  for (unsigned i = 0; i < my_block().array_count; ++i) {
    const Array& mine = my_block().arrays[i];
    if (place < mine.data || place + bytes > mine.data + mine.bytes) continue;
    const Block& other = machine.blocks[rank];
    for (unsigned j = 0; j < other.array_count; ++j)
      if (other.arrays[j].offset == mine.offset) return other.arrays[j].data + (place - mine.data);
  }
  fault("shared memory of another block: nothing of that place was taken");
}

void warp_barrier(Where where) {
#if defined(EMULATOR_TSAN)
  __tsan_release(warp_token());
#endif
  meet_warp(where);
#if defined(EMULATOR_TSAN)
  __tsan_acquire(warp_token());
#endif
}

const unsigned char* exchange(const void* mine, size_t bytes, Where where) {
  Warp& warp = machine.warps[machine.running / kLanes];
  unsigned turn = warp.round % 2;
  copy(warp.slots[turn][machine.running % kLanes], static_cast<const unsigned char*>(mine), bytes);
  meet_warp(where);
  return warp.slots[turn][0];
}

void* shared(size_t offset, size_t bytes) {
  if (offset + bytes > machine.shared_bytes) fault("shared memory: more is taken than was launched with");
  Block& mine = my_block();
  for (unsigned i = 0; i < mine.array_count; ++i)
    if (mine.arrays[i].offset == offset) {
      if (mine.arrays[i].bytes != bytes) fault("shared memory: threads take different arrays");
      return mine.arrays[i].data;
    }
  if (mine.array_count == kArrays) fault("shared memory: more than 64 arrays");
  Array& array = mine.arrays[mine.array_count++];
  mine.arena_used += -reinterpret_cast<uintptr_t>(mine.arena.data() + mine.arena_used) % kAlignment;
  array = {offset, bytes, mine.arena.data() + mine.arena_used};
  mine.arena_used += bytes + kGap;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(array.data, bytes);
#endif
  return array.data;
}

void async_add(const AsyncCopy& copy) {
  Copies& copies = *current().copies;
  if (copies.end - copies.first == kCopies) fault("cp.async: more than 256 copies under way");
  copies.ring[copies.end % kCopies] = copy;
  copies.groups[copies.end++ % kCopies] = copies.group;
}

void async_end_group() { ++current().copies->group; }

bool async_take(unsigned pending, AsyncCopy* out) {
  Copies& copies = *current().copies;
  if (copies.first == copies.end) return false;
  if (copies.groups[copies.first % kCopies] + pending >= copies.group) return false;
  *out = copies.ring[copies.first++ % kCopies];
  return true;
}

}  // namespace emulator

// For whoever loads the library: begins (with an empty list) and ends the recording; how many launches there
// were, the first `most` of them written to `out`.
extern "C" void fastgan_emulator_record(int on) {
  emulator::is_recording = on != 0;
  if (on) emulator::records.clear();
}
extern "C" int64_t fastgan_emulator_recorded(emulator::Record* out, int64_t most) {
  const int64_t count = int64_t(emulator::records.size());
  for (int64_t i = 0; i < count && i < most; ++i) out[i] = emulator::records[size_t(i)];
  return count;
}
