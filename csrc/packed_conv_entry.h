// What packed_conv.cpp does for other entries.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "packed_conv.h"

namespace wavlm_fast {

// The number by which kernels know an activation; an error for an unknown name.
int activation_number(const std::string& name);

// [channels, taps, C] float32 -> the order that the kernel of this process reads, one-dimensional.
at::Tensor pack_conv(const at::Tensor& weight);

// The call is for the first of B utterances; the next one begins utterance_step numbers later. On all threads.
void convolve(const PackedConv& first_call, int64_t B, int64_t utterance_step);

}  // namespace wavlm_fast
