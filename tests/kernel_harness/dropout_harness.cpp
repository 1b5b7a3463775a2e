// Dropout against Philox written out: counts around blocks and vectors, 1 and 3 threads.
#include "dropout/dropout.h"

#include "harness.h"

using fastgan::DropoutArgs;

namespace {

uint32_t word(uint64_t seed, uint32_t offset, uint64_t index) {
  uint32_t c[4] = {offset, 0, uint32_t(index / 4 >> 32), uint32_t(index / 4)};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = uint64_t(c[0]) * 0xD2511F53u, p1 = uint64_t(c[2]) * 0xCD9E8D57u;
    uint32_t n[4] = {uint32_t(p1 >> 32) ^ c[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ k1,
                     uint32_t(p0)};
    for (int i = 0; i < 4; ++i) c[i] = n[i];
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return c[index % 4];
}

template <class T>
void run(int64_t count, int threads, fastgan::Dtype dtype) {
  auto input = harness::normal<T>(count);
  harness::Buffer<T> output(count);
  DropoutArgs args{};
  args.dtype = dtype, args.count = count, args.seed = 0x123456789abcdef0u, args.offset = 0xfffffff0u;
  args.threshold = 0x40000000u, args.scale = 4.0 / 3, args.input = input.get(), args.output = output.get();
  FASTGAN_KERNEL(dropout_forward)(args, harness::threads(threads));
  for (int64_t i = 0; i < count; ++i) {
    bool kept = word(args.seed, args.offset, uint64_t(i)) >= args.threshold;
    harness::expect(output[i] == (kept ? input[i] * T(args.scale) : T(0)), "output", double(output[i]));
  }
}

}  // namespace

int main() {
  for (int64_t count : {0, 1, 7, 16, 1023, 1024, 1025, 20001})
    for (int threads : {1, 3}) {
      run<float>(count, threads, fastgan::Dtype::float32);
      run<double>(count, threads, fastgan::Dtype::float64);
    }
  return harness::result();
}
