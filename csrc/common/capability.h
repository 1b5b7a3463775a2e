// One kernel source, several instruction sets: FASTGAN_KERNEL names the function that a kernel file defines
// (the suffix comes from CMake), FASTGAN_DECLARE_KERNEL declares all of them in the contract header, and
// FASTGAN_SELECT gives the one for this machine. The choice is made once, when the module is loaded.
#pragma once
#include "common/threads.h"

#define FASTGAN_JOIN_(a, b) a##b
#define FASTGAN_JOIN(a, b) FASTGAN_JOIN_(a, b)
#define FASTGAN_KERNEL(name) FASTGAN_JOIN(fastgan_##name##_, FASTGAN_ISA)

namespace fastgan {

// Each of x86's has what the one before has. amx: AVX-512 with AVX512_BF16, and AMX's tiles of bfloat16.
enum class Capability { baseline, avx2, avx512, amx, neon };

// The instruction set in use: the best that the machine has, or what FASTGAN_CPU_CAPABILITY forces.
Capability capability();
const char* capability_name(Capability);
// Throws std::runtime_error if this machine or this build does not have it.
void set_capability(const char* name);
// Names of those that are built and that this machine can run, the best last; null-terminated.
const char* const* available_capabilities();

}  // namespace fastgan

// FASTGAN_DECLARE_AMX_KERNEL: a file of its own, <stem>_amx.cpp, has one for AMX; elsewhere AVX-512's is
// that.
#if defined(__x86_64__)
#define FASTGAN_DECLARE_KERNEL_(name, Arguments, for_amx)                                    \
  extern "C" {                                                                               \
  void fastgan_##name##_baseline(const Arguments&, const fastgan::Threads&);                 \
  void fastgan_##name##_avx2(const Arguments&, const fastgan::Threads&);                     \
  void fastgan_##name##_avx512(const Arguments&, const fastgan::Threads&);                   \
  void for_amx(const Arguments&, const fastgan::Threads&);                                   \
  }                                                                                          \
  static inline void (*fastgan_select_##name())(const Arguments&, const fastgan::Threads&) { \
    switch (fastgan::capability()) {                                                         \
      case fastgan::Capability::amx:                                                         \
        return for_amx;                                                                      \
      case fastgan::Capability::avx512:                                                      \
        return fastgan_##name##_avx512;                                                      \
      case fastgan::Capability::avx2:                                                        \
        return fastgan_##name##_avx2;                                                        \
      default:                                                                               \
        return fastgan_##name##_baseline;                                                    \
    }                                                                                        \
  }
#define FASTGAN_DECLARE_KERNEL(name, Arguments) \
  FASTGAN_DECLARE_KERNEL_(name, Arguments, fastgan_##name##_avx512)
#define FASTGAN_DECLARE_AMX_KERNEL(name, Arguments) \
  FASTGAN_DECLARE_KERNEL_(name, Arguments, fastgan_##name##_amx)
#elif defined(__aarch64__)
#define FASTGAN_DECLARE_KERNEL(name, Arguments)                                              \
  extern "C" void fastgan_##name##_neon(const Arguments&, const fastgan::Threads&);          \
  static inline void (*fastgan_select_##name())(const Arguments&, const fastgan::Threads&) { \
    return fastgan_##name##_neon;                                                            \
  }
#else
#define FASTGAN_DECLARE_KERNEL(name, Arguments)                                              \
  extern "C" void fastgan_##name##_baseline(const Arguments&, const fastgan::Threads&);      \
  static inline void (*fastgan_select_##name())(const Arguments&, const fastgan::Threads&) { \
    return fastgan_##name##_baseline;                                                        \
  }
#endif

#if !defined(__x86_64__)
#define FASTGAN_DECLARE_AMX_KERNEL(name, Arguments) FASTGAN_DECLARE_KERNEL(name, Arguments)
#endif

#define FASTGAN_SELECT(name) fastgan_select_##name()

// The kernel for CUDA, in csrc/<stem>/<stem>.cu and the library fastgan._C_cuda: pointers on the current
// device, a cudaStream_t. Null, or what went wrong.
#define FASTGAN_DECLARE_CUDA_KERNEL(name, Arguments) \
  extern "C" const char* fastgan_##name##_cuda(const Arguments&, void* stream);
