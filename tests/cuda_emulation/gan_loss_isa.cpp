// The CUDA kernels under the names of an instruction set "emulated", with scratch of exactly the size that
// they ask for.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "isa.h"

namespace {
using Run = const char* (*)(const fastgan::GanLossArgs&, void*);
void run(Run kernel, fastgan::GanLossArgs args, bool is_backward) {
  size_t size = args.dtype == fastgan::Dtype::float64 ? sizeof(double) : sizeof(float);
  auto workspace =
      std::make_unique<char[]>(size_t(fastgan_gan_loss_workspace_cuda(args, is_backward)) * size);
  args.workspace = workspace.get();
  if (const char* error = kernel(args, nullptr)) std::puts(error), std::exit(1);
}
}  // namespace

void fastgan_gan_loss_forward_emulated(const fastgan::GanLossArgs& args, const fastgan::Threads&) {
  run(fastgan_gan_loss_forward_cuda, args, false);
}
void fastgan_gan_loss_backward_emulated(const fastgan::GanLossArgs& args, const fastgan::Threads&) {
  run(fastgan_gan_loss_backward_cuda, args, true);
}
