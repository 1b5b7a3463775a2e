// Matrix products of a warp and copies that run beside the arithmetic: mma.sync, ldmatrix and cp.async, which
// every GPU from sm_80 on has.
//
// mma_m16n8k16: D = A B + C with A (16, 16), B (16, 8), C and D (16, 8). With r = lane / 4 and q = lane % 4,
// a lane holds (two halves in a register, the lower index in the low bits; PTX ISA, "Matrix fragments for
// mma.m16n8k16"):
//
//   a[0]  A[r][2q], A[r][2q+1]        a[1]  A[r+8][2q], ...     a[2]  A[r][2q+8], ...   a[3]  A[r+8][2q+8],
//   ... b[0]  B[2q][r], B[2q+1][r]        b[1]  B[2q+8][r], B[2q+9][r] c[0]  C[r][2q]   c[1]  C[r][2q+1] c[2]
//   C[r+8][2q]   c[3]  C[r+8][2q+1]
//
// mma_m16n8k8: the same of floats, of which the upper 19 bits count (TF32: 11 bits of the number, 8 of the
// exponent), with A (16, 8), B (8, 8); one in a register:
//
//   a[0]  A[r][q]   a[1]  A[r+8][q]   a[2]  A[r][q+4]   a[3]  A[r+8][q+4]   b[0]  B[q][r]   b[1]  B[q+4][r]
#pragma once
#include "common/cuda_block.h"
#include "common/types.h"

namespace fastgan {

template <class S>
FASTGAN_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
FASTGAN_DEVICE void mma_m16n8k16<bfloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
FASTGAN_DEVICE void mma_m16n8k16<float16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

FASTGAN_DEVICE void mma_m16n8k8(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 tiles of 16-bit elements: lane i gives the address of row i % 8 of tile i / 8, in shared memory
// and aligned to 16 bytes; out[t] is elements 2q and 2q+1 of row r of tile t. Of 32-bit elements that is four
// 8x4 tiles, and element q.
FASTGAN_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// The same of each tile's transpose: out[t] is elements r of rows 2q and 2q+1.
FASTGAN_DEVICE void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// 16 bytes to shared memory, or zeros where not `valid`; there for this thread after async_wait, for others
// after a barrier more. `from` is not read where not valid.
FASTGAN_DEVICE void async_copy16(void* to, const void* from, bool valid) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes)
               : "memory");
}

// Ends a group of this thread's copies.
FASTGAN_DEVICE void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's groups, the latest, are under way.
template <int pending>
FASTGAN_DEVICE void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace fastgan
