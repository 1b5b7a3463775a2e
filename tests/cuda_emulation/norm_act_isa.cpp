// The CUDA kernels under the names of an instruction set "emulated"; scratch of exactly the size that they
// ask for.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "isa.h"

namespace {

template <class Kernel>
void run(Kernel kernel, fastgan::NormActArgs args) {
  std::vector<double> scratch(size_t(fastgan_norm_act_scratch_cuda(args)));
  args.scratch = scratch.data();
  if (const char* error = kernel(args, nullptr)) std::puts(error), std::exit(1);
}

}  // namespace

void fastgan_norm_act_forward_emulated(const fastgan::NormActArgs& args, const fastgan::Threads&) {
  run(fastgan_norm_act_forward_cuda, args);
}
void fastgan_norm_act_backward_emulated(const fastgan::NormActArgs& args, const fastgan::Threads&) {
  run(fastgan_norm_act_backward_cuda, args);
}
