// What packed_conv.cpp asks of packed_conv_kernel.cpp, per level.
#pragma once

#include <cstddef>
#include <cstdint>

namespace wavlm_fast {

// out[t, :] = activation(offset + gain * (bias + sum over taps k of the C numbers at x + t * row_step + k * tap_step,
// times the weight of tap k)). Rows may overlap. A linear layer has one tap; so has a convolution of the waveform, with a
// window for C.
struct PackedConv {
  const float* x;
  const float* packed;  // [groups of columns][taps][C][columns of the group], the last group narrower
  const float* bias;    // [channels], or null
  const float* gain;    // [channels], or null: no gain and no offset
  const float* offset;  // [channels]
  float* out;           // [T, channels]
  std::int64_t T, C, taps, row_step, tap_step, channels;
  int activation;       // as Activation in activation.h
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
