// Dropout. What it costs is drawing numbers: torch draws one after the other from a serial generator, 6 ns
// each, and keeps a mask. A number of Philox depends on its place alone, so that threads and vectors draw at
// once and the backward draws again.
//
// A block of numbers is drawn into L1 and used there. Blocks are aligned, so that the counter's low word does
// not run over within one.
#include "dropout/dropout.h"

#include "common/philox.h"
#include "common/vector.h"

namespace fastgan {
namespace {

constexpr int64_t kBlock = 1024;

template <class S>
void run(const DropoutArgs& args, const Threads& threads) {
  using T = Accumulate<S>;
  constexpr int L = lanes<T>;
  parallel_for(threads, (args.count + kBlock - 1) / kBlock, 8, [&](int64_t begin, int64_t end) {
    uint32_t words[kBlock];
    const T scale = T(args.scale);
    for (int64_t block = begin; block < end; ++block) {
      const S* x = static_cast<const S*>(args.input) + block * kBlock;
      S* y = static_cast<S*>(args.output) + block * kBlock;
      const int64_t left = args.count - block * kBlock, count = left < kBlock ? left : kBlock;
      const uint64_t first = uint64_t(block) * (kBlock / 4);
      philox_row(words, count, args.seed, args.offset, 0, uint32_t(first >> 32), uint32_t(first));
      int64_t i = 0;
      for (; i + L <= count; i += L)
        store(y + i, select(kept<T>(words + i, args.threshold), load<T>(x + i) * scale, Vec<T>{}));
      if (int rest = int(count - i))
        store_partial<T>(
            y + i, select(kept<T>(words + i, args.threshold), load_partial<T>(x + i, rest) * scale, Vec<T>{}),
            rest);
    }
  });
}

}  // namespace
}  // namespace fastgan

extern "C" void FASTGAN_KERNEL(dropout_forward)(const fastgan::DropoutArgs& args,
                                                const fastgan::Threads& threads) {
  fastgan::with_storage(args.dtype, [&]<class S>(S) { fastgan::run<S>(args, threads); });
}
