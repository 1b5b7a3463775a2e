// Matrix products of a warpgroup: wgmma, which the GPUs of sm_90a alone have. Its first factor is in shared
// memory or in registers, its second in shared memory; it runs beside what follows, until waited for.
//
//   D (64, N) = A (64, 16) B (16, N) + D     four warps, from a multiple of four on, 16 rows each
//
// A warp has its 16 rows of D as mma.sync has them (cuda_tensor_core.h), and of A in registers too.
//
// In shared memory a matrix is in panels of 64 columns: a row of a panel is 128 bytes, in chunks of 16, and
// chunk c of row i lies where c ^ (i % 8) would; panels begin at multiples of 1024 bytes (PTX ISA,
// "Asynchronous warpgroup level matrix shared memory layout", swizzling of 128 bytes). The hardware reads it
// by rows or, transposed, by columns.
#pragma once
#include <type_traits>

#include "common/cuda_tensor_core.h"

namespace fastgan {

constexpr int kWarpgroup = 128;

// Whether this compilation is for such a GPU; where not, nothing here is instantiated.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;
#endif
// Then what they do need not be compiled in another way as well.
constexpr bool kOnlyWarpgroups = kHasWarpgroups;

// A matrix in panels, as the instruction is told of it.
struct Panels {
  uint64_t descriptor;
};

// 16-bit elements from `at` on, which is in a row that is a multiple of 8; `next` elements further is the
// next panel, which is read only by columns.
template <class S>
FASTGAN_DEVICE Panels panels_at(const S* at, int next = 0) {
  const uint64_t address = static_cast<uint32_t>(__cvta_generic_to_shared(at));
  // in units of 16 bytes: the address, from panel to panel, from 8 rows to the next; swizzling of 128 bytes
  return {(address & 0x3ffff) >> 4 | uint64_t(next ? next * sizeof(S) / 16 : 1) << 16 |
          uint64_t(1024 / 16) << 32 | uint64_t(1) << 62};
}

// The same matrix, `elements` further in the row or, of 64 each, in rows.
template <class S>
FASTGAN_DEVICE Panels advanced(Panels matrix, int elements) {
  return {matrix.descriptor + uint64_t(elements * sizeof(S) / 16)};
}

// What ordinary and asynchronous copies wrote to shared memory, by this thread, is there for wgmma once a
// barrier is passed.
FASTGAN_DEVICE void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first product that uses registers which were written since.
FASTGAN_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a group of products.
FASTGAN_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `pending` groups, the latest, are under way.
template <int pending>
FASTGAN_DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// The compiler shall neither read sums before they are there nor move them while they come.
template <int N8>
FASTGAN_DEVICE void hold(float (&sums)[N8][4]) {
#pragma unroll
  for (int j = 0; j < N8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(sums[j][i])::"memory");
}

// clang-format off
#define FASTGAN_SUMS_OF_8(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define FASTGAN_SUMS_64 \
                 FASTGAN_SUMS_OF_8(0), FASTGAN_SUMS_OF_8(1), FASTGAN_SUMS_OF_8(2), FASTGAN_SUMS_OF_8(3), \
                 FASTGAN_SUMS_OF_8(4), FASTGAN_SUMS_OF_8(5), FASTGAN_SUMS_OF_8(6), FASTGAN_SUMS_OF_8(7)
#define FASTGAN_SUMS_128 \
                 FASTGAN_SUMS_OF_8(0), FASTGAN_SUMS_OF_8(1), FASTGAN_SUMS_OF_8(2), FASTGAN_SUMS_OF_8(3), \
                 FASTGAN_SUMS_OF_8(4), FASTGAN_SUMS_OF_8(5), FASTGAN_SUMS_OF_8(6), FASTGAN_SUMS_OF_8(7), \
                 FASTGAN_SUMS_OF_8(8), FASTGAN_SUMS_OF_8(9), FASTGAN_SUMS_OF_8(10), FASTGAN_SUMS_OF_8(11), \
                 FASTGAN_SUMS_OF_8(12), FASTGAN_SUMS_OF_8(13), FASTGAN_SUMS_OF_8(14), FASTGAN_SUMS_OF_8(15)
#define FASTGAN_WGMMA_64_SHARED(type) \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." type " {" \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18," \
               "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
               "}, %32, %33, p, 1, 1, 0, 0; }" \
               : FASTGAN_SUMS_64 : "l"(a.descriptor), "l"(b.descriptor), "r"(int(add)))
#define FASTGAN_WGMMA_64_REGISTERS(type) \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." type " {" \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18," \
               "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
               "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1; }" \
               : FASTGAN_SUMS_64 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor), "r"(int(add)))
#define FASTGAN_WGMMA_128_SHARED(type) \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." type " {" \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18," \
               "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35," \
               "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52," \
               "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
               "}, %64, %65, p, 1, 1, 0, 0; }" \
               : FASTGAN_SUMS_128 : "l"(a.descriptor), "l"(b.descriptor), "r"(int(add)))
#define FASTGAN_WGMMA_128_REGISTERS(type) \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." type " {" \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18," \
               "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35," \
               "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52," \
               "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
               "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1; }" \
               : FASTGAN_SUMS_128 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor), "r"(int(add)))
// clang-format on

// d (16 rows of a warp, N) += A Bᵀ, both by rows; `add`: to what is in d.
template <class S, int N>
FASTGAN_DEVICE void multiply_shared(float (&d)[N / 8][4], Panels a, Panels b, bool add) {
  static_assert(sizeof(S) == 2 && (N == 64 || N == 128));
  constexpr bool wide = N == 128, brain = std::is_same_v<S, bfloat16>;
  if constexpr (wide && brain)
    FASTGAN_WGMMA_128_SHARED("bf16.bf16");
  else if constexpr (wide)
    FASTGAN_WGMMA_128_SHARED("f16.f16");
  else if constexpr (brain)
    FASTGAN_WGMMA_64_SHARED("bf16.bf16");
  else
    FASTGAN_WGMMA_64_SHARED("f16.f16");
}

// d (16 rows of a warp, N) += A B, A a fragment as mma.sync has it, B by columns.
template <class S, int N>
FASTGAN_DEVICE void multiply_registers(float (&d)[N / 8][4], const uint32_t (&a)[4], Panels b, bool add) {
  static_assert(sizeof(S) == 2 && (N == 64 || N == 128));
  constexpr bool wide = N == 128, brain = std::is_same_v<S, bfloat16>;
  if constexpr (wide && brain)
    FASTGAN_WGMMA_128_REGISTERS("bf16.bf16");
  else if constexpr (wide)
    FASTGAN_WGMMA_128_REGISTERS("f16.f16");
  else if constexpr (brain)
    FASTGAN_WGMMA_64_REGISTERS("bf16.bf16");
  else
    FASTGAN_WGMMA_64_REGISTERS("f16.f16");
}

}  // namespace fastgan
