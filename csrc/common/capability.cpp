#include "common/capability.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastgan {
namespace {

#if defined(__x86_64__)
// The instructions are there, the system saves the tiles, and lets this process have them: it is asked for
// them here, once, and grants them to all threads (Linux 5.16 and later; torch asks in the same way).
bool has_amx() {
  static const bool found = [] {
    unsigned a, b, c, d, features, low, high;
    constexpr unsigned kBf16 = 1u << 5, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kSaved = 1u << 27;
    if (!__get_cpuid_count(7, 1, &features, &b, &c, &d) || !(features & kBf16)) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kAmxBf16 | kAmxTile)) != (kAmxBf16 | kAmxTile))
      return false;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kSaved)) return false;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr unsigned kTileState = 3u << 17;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return (low & kTileState) == kTileState && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return found;
}
#endif

bool runs_here(Capability wanted) {
#if defined(__x86_64__)
  switch (wanted) {
    case Capability::baseline:
      return true;
    case Capability::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Capability::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             runs_here(Capability::avx2);
    case Capability::amx:
      return runs_here(Capability::avx512) && has_amx();
    default:
      return false;
  }
#elif defined(__aarch64__)
  return wanted == Capability::neon;
#else
  return wanted == Capability::baseline;
#endif
}

constexpr Capability kAll[] = {Capability::neon, Capability::baseline, Capability::avx2, Capability::avx512,
                               Capability::amx};

Capability best() {
  Capability found = Capability::baseline;
  for (Capability each : kAll)
    if (runs_here(each)) found = each;
  return found;
}

// Not thrown at load, where it would end the import: an unknown or impossible name is kept for Python to
// report.
Capability& current() {
  static Capability value = [] {
    const char* forced = std::getenv("FASTGAN_CPU_CAPABILITY");
    for (Capability each : kAll)
      if (forced && std::strcmp(forced, capability_name(each)) == 0 && runs_here(each)) return each;
    return best();
  }();
  return value;
}

}  // namespace

Capability capability() { return current(); }

const char* capability_name(Capability which) {
  switch (which) {
    case Capability::baseline:
      return "baseline";
    case Capability::avx2:
      return "avx2";
    case Capability::avx512:
      return "avx512";
    case Capability::amx:
      return "amx";
    case Capability::neon:
      return "neon";
  }
  return "baseline";
}

const char* const* available_capabilities() {
  static const char* names[6] = {};
  if (!names[0]) {
    int count = 0;
    for (Capability each : kAll)
      if (runs_here(each)) names[count++] = capability_name(each);
  }
  return names;
}

void set_capability(const char* name) {
  for (Capability each : kAll) {
    if (std::strcmp(name, capability_name(each)) != 0) continue;
    if (!runs_here(each))
      throw std::runtime_error(std::string("this machine cannot run capability '") + name + "'");
    current() = each;
    return;
  }
  throw std::runtime_error(std::string("unknown capability '") + name + "'");
}

}  // namespace fastgan
