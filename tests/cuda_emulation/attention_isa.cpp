// The CUDA kernels under the names of an instruction set "emulated"; a workspace of exactly the size that
// they ask for.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "isa.h"

namespace {

template <class Kernel>
void run(Kernel kernel, fastgan::AttentionArgs args, bool backward) {
  std::vector<char> workspace(size_t(fastgan_attention_workspace_cuda(args, backward)));
  args.workspace = workspace.data();
  if (const char* error = kernel(args, nullptr)) std::puts(error), std::exit(1);
}

}  // namespace

void fastgan_attention_forward_emulated(const fastgan::AttentionArgs& args, const fastgan::Threads&) {
  run(fastgan_attention_forward_cuda, args, false);
}
void fastgan_attention_backward_emulated(const fastgan::AttentionArgs& args, const fastgan::Threads&) {
  run(fastgan_attention_backward_cuda, args, true);
}
void fastgan_attention_weights_emulated(const fastgan::AttentionArgs& args, const fastgan::Threads&) {
  run(fastgan_attention_weights_cuda, args, false);
}
#if !defined(HARNESS_FIRST_ORDER)
void fastgan_attention_jvp_emulated(const fastgan::AttentionArgs& args, const fastgan::Threads&) {
  run(fastgan_attention_jvp_cuda, args, false);
}
void fastgan_attention_double_backward_emulated(const fastgan::AttentionArgs& args, const fastgan::Threads&) {
  run(fastgan_attention_double_backward_cuda, args, true);
}
#endif
