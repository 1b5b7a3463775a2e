// Kernels with a planted fault each, beside the right one: `faults NAME` runs one and prints what came back.
#include <cstdio>
#include <string_view>
#include <vector>

#include "common/cuda_cluster.h"
#include "common/cuda_tensor_core.h"

using namespace fastgan;

namespace {

constexpr int kThreads = 64;

// Sums of 64 numbers: right, unless one of the flags breaks it.
struct Faults {
  bool no_barrier, divergent_barrier, other_barrier, early_end, beyond_array, beyond_launch, unwritten,
      blocks_race;
};

__global__ void sum(const float* in, float* out, Faults f) {
  SharedMemory memory;
  float* values = memory.take<float>(kThreads);
  if (f.beyond_launch) memory.take<float>(kThreads);
  int i = int(threadIdx.x);
  if (f.early_end && i == 40) return;
  if (!f.unwritten || i != 5) values[i] = in[blockIdx.x * kThreads + i];
  if (f.divergent_barrier) {
    if (i < 32) block_sync();
  } else if (f.other_barrier && i < 32) {
    block_sync();
  } else if (!f.no_barrier) {
    block_sync();
  }
  float total = 0;
  for (int j = 0; j < kThreads + (f.beyond_array ? 1 : 0); ++j) total += values[j];
  if (i == 0) out[f.blocks_race ? 0 : blockIdx.x] = total;
}

__global__ void sum_right(const float* in, float* out) {
  SharedMemory memory;
  float* values = memory.take<float>(kThreads);
  int i = int(threadIdx.x);
  values[i] = in[blockIdx.x * kThreads + i];
  for (int half = kThreads / 2; half > 0; half /= 2) {
    block_sync();
    if (i < half) values[i] += values[i + half];
  }
  if (i == 0) out[blockIdx.x] = values[0];
}

__global__ void warps(const float* in, float* out, bool diverge) {
  int i = int(threadIdx.x);
  float value = in[i];
  if (!diverge || i % kWarp < 16)
    for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  if (i % kWarp == 0) out[i / kWarp] = value;
}

// A warp's message through shared memory: a shuffle orders no memory, warp_sync does.
__global__ void message(float* out, bool ordered) {
  SharedMemory memory;
  float* box = memory.take<float>(kWarp);
  int i = int(threadIdx.x);
  box[i] = float(i);
  if (ordered)
    warp_sync();
  else
    shuffle(i, 0);
  out[i] = box[(i + 1) % kWarp];
}

__global__ void copied(const float* in, float* out, bool wait) {
  SharedMemory memory;
  float* values = memory.take<float>(4 * kWarp);
  int i = int(threadIdx.x);
  async_copy16(values + 4 * i, in + 4 * i, i < 16);
  async_commit();
  if (wait) async_wait<0>();
  block_sync();
  float total = 0;
  for (int j = 0; j < 4 * kWarp; ++j) total += values[j];
  out[i] = total;
}

// The sum of all blocks' sums by each block of a cluster: right, unless one of the flags breaks it.
struct ClusterFaults {
  bool early_read, no_wait, divergent, early_end, beyond;
};

__global__ void cluster_sum(const float* in, double* out, ClusterFaults f) {
  struct alignas(16) Pair {
    double first, second;
  };
  SharedMemory memory;
  Pair* mine = memory.take<Pair>(2);
  const int blocks = 4, i = int(threadIdx.x), rank = rank_in_cluster();
  if (i == 0) {
    Pair sum = {};
    for (int j = 0; j < kThreads; ++j) sum.first += double(in[j]);
    mine[0] = mine[1] = {sum.first, double(rank)};
  }
  if (f.divergent && rank == 1) return;
  cluster_arrive();
  if (!f.early_read) cluster_wait();
  double total = 0;
  if (i == 0 && !(f.early_end && rank == 0))
    for (int b = 0; b < blocks; ++b) total += load_of_block(mine + (f.beyond ? 2 : 1), b).first;
  if (f.early_read) cluster_wait();
  if (!f.early_end) {
    cluster_arrive();
    if (!f.no_wait) cluster_wait();
  }
  if (i == 0) out[blockIdx.x] = total;
}

}  // namespace

int main(int argc, char** argv) {
  std::string_view name = argc > 1 ? argv[1] : "";
  std::vector<float> in(2 * kThreads, 1.0f), out(kThreads, -1.0f);
  Error error = "unknown case";
  Faults f{};
  auto run = [&] {
    error = launch(sum, 2, kThreads, kThreads * sizeof(float), nullptr, in.data(), out.data(), f);
  };
  if (name == "right") {
    error = launch(sum_right, 2, kThreads, kThreads * sizeof(float), nullptr, in.data(), out.data());
    if (!error) error = launch(warps, 1, kThreads, 0, nullptr, in.data(), out.data() + 2, false);
    if (!error) error = launch(message, 1, kWarp, kWarp * sizeof(float), nullptr, out.data() + 4, true);
    if (!error)
      error = launch(copied, 1, kWarp, 4 * kWarp * sizeof(float), nullptr, in.data(), out.data() + 6, true);
    bool right = out[0] == 64 && out[1] == 64 && out[2] == 32 && out[3] == 32 && out[4] == 1 && out[6] == 64;
    if (!error && !right) error = "wrong sums";
  }
  std::vector<double> sums(8, -1.0);
  ClusterFaults c{};
  auto run_clusters = [&] {
    error = launch_clusters(cluster_sum, 8, 4, kThreads, 2 * 16, nullptr, in.data(), sums.data(), c);
    out[0] = float(sums[0]), out[1] = float(sums[7]);
  };
  if (name == "clusters") run_clusters();
  if (name == "cluster read too early") c.early_read = true, run_clusters();
  if (name == "cluster not waited for") c.no_wait = true, run_clusters();
  if (name == "divergent cluster") c.divergent = true, run_clusters();
  if (name == "cluster ends early") c.early_end = true, run_clusters();
  if (name == "beyond a cluster's array") c.beyond = true, run_clusters();
  if (name == "part of a cluster")
    error = launch_clusters(cluster_sum, 6, 4, kThreads, 2 * 16, nullptr, in.data(), sums.data(), c);
  if (name == "race") f.no_barrier = true, run();
  if (name == "divergent barrier") f.divergent_barrier = true, run();
  if (name == "other barrier") f.other_barrier = true, run();
  if (name == "early end") f.early_end = true, run();
  if (name == "beyond array") f.beyond_array = true, run();
  if (name == "beyond launch") f.beyond_launch = true, run();
  if (name == "unwritten") f.unwritten = true, run();
  if (name == "race of blocks") f.blocks_race = true, run();
  if (name == "divergent shuffle")
    error = launch(warps, 1, kThreads, 0, nullptr, in.data(), out.data(), true);
  if (name == "race in a warp")
    error = launch(message, 1, kWarp, kWarp * sizeof(float), nullptr, out.data(), false);
  if (name == "copy not waited for")
    error = launch(copied, 1, kWarp, 4 * kWarp * sizeof(float), nullptr, in.data(), out.data(), false);
  std::printf("%s; %g %g\n", error ? error : "no error", double(out[0]), double(out[1]));
  return error != nullptr;
}
