// What packed_conv.cpp asks of packed_conv_kernel.cpp, per level.
#pragma once

#include <cstddef>
#include <cstdint>

namespace wavlm_fast {

// out[t, :] = activation(bias + sum over taps k of x[t * stride + k * dilation, :] * weight of tap k) for the frames
// of one utterance, or of any rows of memory: a linear layer has one tap.
struct PackedConv {
  const float* x;        // frames of C numbers, one after the other
  const float* packed;   // [groups of columns][taps][C][columns of the group], the last group narrower
  const float* bias;     // [channels], or null
  float* out;            // [T, channels]
  std::int64_t T, C, taps, stride, dilation, channels;
  int activation;        // as Activation in activation.h
};

// Output frames first .. first + count - 1 of the groups from group_begin to group_end.
using PackedConvForward = void(const PackedConv& call, std::int64_t first, std::int64_t count,
                               std::int64_t group_begin, std::int64_t group_end, float* scratch);

struct PackedConvKernels {
  std::int64_t columns;      // of a group
  std::int64_t lanes;        // what the width of the last group is rounded up to
  std::int64_t most_frames;  // `count` is at most this, and best a multiple of `rows`
  std::int64_t rows;
  std::size_t scratch_size;  // floats, 64-byte aligned
  PackedConvForward* forward;
};

}  // namespace wavlm_fast
