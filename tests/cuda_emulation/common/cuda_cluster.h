// csrc/common/cuda_cluster.h for the emulator.
#pragma once
#include "common/cuda_block.h"

namespace fastgan {

constexpr int kMostBlocks = 8;
constexpr bool kHasClusters = true;

FASTGAN_DEVICE int rank_in_cluster() { return int(emulator::rank_in_cluster()); }
FASTGAN_DEVICE void cluster_arrive(emulator::Where where = emulator::Where::current()) {
  emulator::cluster_arrive(where);
}
FASTGAN_DEVICE void cluster_wait(emulator::Where where = emulator::Where::current()) {
  emulator::cluster_wait(where);
}

template <class T>
FASTGAN_DEVICE T load_of_block(const T* at, int rank) {
  static_assert(sizeof(T) == 16);
  return *static_cast<const T*>(emulator::shared_of(unsigned(rank), at, sizeof(T)));
}

}  // namespace fastgan
