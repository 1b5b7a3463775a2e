// The CUDA kernels under the names of an instruction set "emulated".
#include <cstdio>
#include <cstdlib>

#include "isa.h"

void fastgan_gan_loss_forward_emulated(const fastgan::GanLossArgs& args, const fastgan::Threads&) {
  if (const char* error = fastgan_gan_loss_forward_cuda(args, nullptr)) std::puts(error), std::exit(1);
}
void fastgan_gan_loss_backward_emulated(const fastgan::GanLossArgs& args, const fastgan::Threads&) {
  if (const char* error = fastgan_gan_loss_backward_cuda(args, nullptr)) std::puts(error), std::exit(1);
}
