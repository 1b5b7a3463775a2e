// Blocks of a cluster: they run at the same time and read each other's shared memory. GPUs of sm_90 and
// later. arrive and wait are for all threads of all blocks of the cluster, each at the same place of the
// program. A block must not end while another may read its memory: between the last read and the end are an
// arrival and a wait for it.
#pragma once
#include <cstdint>

#include "common/cuda_block.h"

namespace fastgan {

constexpr int kMostBlocks = 8;  // that every such GPU runs as one cluster

// Whether this compilation is for such a GPU; where not, nothing here is instantiated.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;
#endif

FASTGAN_DEVICE int rank_in_cluster() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}

// What was written before the arrival is seen after the wait (release and acquire, the instructions'
// default).
FASTGAN_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive;" ::: "memory"); }
FASTGAN_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait;" ::: "memory"); }

// What lies, in the shared memory of block `rank` of the cluster, where `at` lies in this block's.
template <class T>
FASTGAN_DEVICE T load_of_block(const T* at, int rank) {
  static_assert(sizeof(T) == 16);
  uint32_t place = static_cast<uint32_t>(__cvta_generic_to_shared(at)), there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(place), "r"(rank));
  union {
    uint64_t words[2];
    T value;
  } out;
  asm volatile("ld.shared::cluster.v2.u64 {%0, %1}, [%2];"
               : "=l"(out.words[0]), "=l"(out.words[1])
               : "r"(there)
               : "memory");
  return out.value;
}

}  // namespace fastgan
