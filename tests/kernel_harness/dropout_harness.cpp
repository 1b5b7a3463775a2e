// Dropout against Philox written out: counts around blocks and vectors, 1 and 3 threads.
#include "dropout/dropout.h"

#include "harness.h"
#include "philox_word.h"

using fastgan::DropoutArgs;

namespace {

template <class T>
void run(int64_t count, int threads, fastgan::Dtype dtype) {
  auto input = harness::normal<T>(count);
  harness::Buffer<T> output(count);
  DropoutArgs args{};
  args.dtype = dtype, args.count = count, args.seed = 0x123456789abcdef0u, args.offset = 0xfffffff0u;
  args.threshold = 0x40000000u, args.scale = 4.0 / 3, args.input = input.get(), args.output = output.get();
  FASTGAN_KERNEL(dropout_forward)(args, harness::threads(threads));
  for (int64_t i = 0; i < count; ++i) {
    bool kept = harness::philox_word(args.seed, args.offset, uint64_t(i)) >= args.threshold;
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
