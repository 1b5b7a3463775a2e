// Included before a harness of tests/kernel_harness, so that it runs the emulated CUDA kernel in place of an
// instruction set's (FASTGAN_ISA=emulated): what the contract headers would declare for that one.
#pragma once
#include "attention/attention.h"
#include "gan_loss/gan_loss.h"
#include "norm_act/norm_act.h"

extern "C" {
void fastgan_norm_act_forward_emulated(const fastgan::NormActArgs&, const fastgan::Threads&);
void fastgan_norm_act_backward_emulated(const fastgan::NormActArgs&, const fastgan::Threads&);
void fastgan_attention_forward_emulated(const fastgan::AttentionArgs&, const fastgan::Threads&);
void fastgan_attention_backward_emulated(const fastgan::AttentionArgs&, const fastgan::Threads&);
void fastgan_attention_weights_emulated(const fastgan::AttentionArgs&, const fastgan::Threads&);
void fastgan_attention_jvp_emulated(const fastgan::AttentionArgs&, const fastgan::Threads&);
void fastgan_attention_double_backward_emulated(const fastgan::AttentionArgs&, const fastgan::Threads&);
void fastgan_gan_loss_forward_emulated(const fastgan::GanLossArgs&, const fastgan::Threads&);
void fastgan_gan_loss_backward_emulated(const fastgan::GanLossArgs&, const fastgan::Threads&);
}
