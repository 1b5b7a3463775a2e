#include "common/capability.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastgan {
namespace {

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
    default:
      return false;
  }
#elif defined(__aarch64__)
  return wanted == Capability::neon;
#else
  return wanted == Capability::baseline;
#endif
}

constexpr Capability kAll[] = {Capability::neon, Capability::baseline, Capability::avx2, Capability::avx512};

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
    case Capability::neon:
      return "neon";
  }
  return "baseline";
}

const char* const* available_capabilities() {
  static const char* names[5] = {};
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
