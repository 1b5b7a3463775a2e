// mma.sync, ldmatrix and cp.async of the emulator against a plain matrix product: fragments loaded by
// ldmatrix and by hand from the documented layout must agree.
#include <cstdio>

#include "common/cuda_tensor_core.h"
#include "common/cuda_types.h"

using namespace fastgan;

namespace {

constexpr int M = 16, N = 8, K = 16;

template <class S>
FASTGAN_DEVICE uint32_t pair(S low, S high) {
  return uint32_t(low.bits) | uint32_t(high.bits) << 16;
}

// A (M, K) and B (K, N) in rows; rows of B are padded to 16 in shared memory, so that ldmatrix takes four
// tiles.
template <class S>
__global__ void product(const S* a, const S* b, float* c, bool by_hand) {
  SharedMemory memory;
  S *sa = memory.take<S>(M * K), *sb = memory.take<S>(K * 16);
  int lane = int(threadIdx.x), r = lane / 4, q = lane % 4;
  async_copy16(sa + lane * 8, a + lane * 8, true);
  async_copy16(sb + lane * 8, b + lane / 2 * N, lane % 2 == 0);
  async_commit();
  async_wait<0>();
  block_sync();
  uint32_t fa[4], fb[2];
  if (by_hand) {
    for (int i = 0; i < 4; ++i) {
      const S* from = sa + (r + i % 2 * 8) * K + 2 * q + i / 2 * 8;
      fa[i] = pair(from[0], from[1]);
    }
    for (int i = 0; i < 2; ++i) fb[i] = pair(sb[(2 * q + i * 8) * 16 + r], sb[(2 * q + 1 + i * 8) * 16 + r]);
  } else {
    load_matrices(fa, sa + (lane % 16) * K + lane / 16 * 8);
    uint32_t tiles[4];
    load_matrices_transposed(tiles, sb + (lane % 16) * 16 + lane / 16 * 8);
    fb[0] = tiles[0], fb[1] = tiles[1];
  }
  float sums[4] = {1, 1, 1, 1};
  mma_m16n8k16<S>(sums, fa, fb);
  for (int i = 0; i < 4; ++i) c[(r + i / 2 * 8) * N + 2 * q + i % 2] = sums[i];
}

template <class S>
int check(bool by_hand) {
  alignas(16) S a[M * K], b[K * N];
  float c[M * N], x[M * K], y[K * N];
  for (int i = 0; i < M * K; ++i) narrow(a[i], float(i * 7 % 31) / 16 - 1), x[i] = widen(a[i]);
  for (int i = 0; i < K * N; ++i) narrow(b[i], float(i * 5 % 23) / 8 - 1), y[i] = widen(b[i]);
  size_t bytes = SharedMemory::bytes<S>(M * K) + SharedMemory::bytes<S>(K * 16);
  Error error = launch(product<S>, 1, kWarp, bytes, nullptr, a, b, &c[0], by_hand);
  if (error) return std::puts(error), 1;
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) {
      double sum = 1;
      for (int k = 0; k < K; ++k) sum += double(x[i * K + k]) * double(y[k * N + j]);
      if (float(sum) != c[i * N + j])
        return std::printf("(%d, %d): %g, not %g\n", i, j, double(c[i * N + j]), sum), 1;
    }
  return 0;
}

// Floats of few bits: A (M, 8) by ldmatrix, B (8, N) by hand. `more` is what TF32 does not hold.
__global__ void product_of_floats(const float* a, const float* b, float* c) {
  SharedMemory memory;
  float* sa = memory.take<float>(M * 8);
  int lane = int(threadIdx.x), r = lane / 4, q = lane % 4;
  async_copy16(sa + lane * 4, a + lane * 4, true);
  async_commit();
  async_wait<0>();
  block_sync();
  uint32_t fa[4], fb[2] = {bits_of(b[q * N + r]), bits_of(b[(q + 4) * N + r])};
  load_matrices(fa, sa + lane % 16 * 8 + lane / 16 * 4);
  float sums[4] = {1, 1, 1, 1};
  mma_m16n8k8(sums, fa, fb);
  for (int i = 0; i < 4; ++i) c[(r + i / 2 * 8) * N + 2 * q + i % 2] = sums[i];
}

int check_floats() {
  alignas(16) float a[M * 8], b[8 * N], c[M * N], more = 0x1p-12f;
  for (int i = 0; i < M * 8; ++i) a[i] = float(i * 7 % 31) / 16 - 1 + (i % 31 == 22 ? more : 0);
  for (int i = 0; i < 8 * N; ++i) b[i] = float(i * 5 % 23) / 8 - 1;
  Error error = launch(product_of_floats, 1, kWarp, SharedMemory::bytes<float>(M * 8), nullptr, a, b, &c[0]);
  if (error) return std::puts(error), 1;
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) {
      double sum = 1;
      for (int k = 0; k < 8; ++k)
        sum += (double(a[i * 8 + k]) - ((i * 8 + k) % 31 == 22 ? double(more) : 0)) * double(b[k * N + j]);
      if (float(sum) != c[i * N + j])
        return std::printf("floats (%d, %d): %g, not %g\n", i, j, double(c[i * N + j]), sum), 1;
    }
  return 0;
}

}  // namespace

int main() {
  int wrong = check_floats();
  for (bool by_hand : {false, true}) wrong += check<bfloat16>(by_hand) + check<float16>(by_hand);
  return wrong;
}
