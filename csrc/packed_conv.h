// What packed_conv.cpp asks of packed_conv_kernel.cpp, per level.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bf16.h"

namespace wavlm_fast {

// out[t, :] = residual + activation(offset + gain * (bias + sum over taps k of the C numbers at x + t * row_step +
// k * tap_step, times the weight of tap k)). Rows may overlap. A linear layer has one tap; so has a convolution of the
// waveform, with a window for C.
template <class In, class Out>
struct PackedConv {
  const In* x;
  const void* packed;   // [groups of columns][taps][C][columns of the group], the last group narrower; where In is
                        // bfloat16 and has products of its own, channels in pairs: [C / 2][columns][2]
  const void* weight;   // where `packed` is null: [channels][taps][C], bfloat16 in pairs as well. Not for `filtered`.
  const float* bias;    // [channels], or null
  const float* gain;    // [channels], or null: no gain and no offset
  const float* offset;  // [channels]
  const Out* residual;  // [., channels], or null; may be out
  Out* out;             // [., channels]
  std::int64_t C, taps, row_step, tap_step, channels;
  int activation;            // as Activation in activation.h
  const std::int64_t* rows;  // null, or of every output frame the numbers from x to its row, instead of t * row_step:
                             // of packed utterances. Not for `filtered`.
  bool copies;  // whether `direct` multiplies copies of the rows, of some channels at a time: the same numbers
};

// Output frames first .. first + count - 1 of the groups from group_begin to group_end.
template <class In, class Out>
using PackedConvForward = void(const PackedConv<In, Out>& call, std::int64_t first, std::int64_t count,
                               std::int64_t group_begin, std::int64_t group_end, float* scratch);

// C numbers of each of `columns` rows -> one tap of a group of `width` columns as `packed` has it, zeros where there is no
// row.
template <class In>
using PackRows = void(const In* const* rows, std::int64_t columns, std::int64_t C, std::int64_t width, float* to);

// `filtered` is for three taps at a stride of two, with the weight's five combinations of taps for `packed` (see
// kernel), row_step = 2 * C and tap_step = C.
template <class In, class Out>
struct PackedConvVariants {
  PackedConvForward<In, Out>* direct;
  PackedConvForward<In, Out>* filtered;
  PackRows<In>* pack;
};

struct PackedConvKernels {
  std::int64_t columns;        // of a group
  std::int64_t lanes;          // what the width of the last group is rounded up to
  std::int64_t rows;           // `count` is best a multiple of it
  std::int64_t most_frames;    // and at most this,
  std::int64_t most_unpacked;  // where there is no packed weight this,
  std::int64_t most_filtered;  // and if filtered this, a multiple of 3
  // Floats of 64-byte aligned scratch.
  std::size_t (*scratch_size)(std::int64_t C, bool filtered);
  PackedConvVariants<float, float> of_float;
  PackedConvVariants<float, bf16> to_bf16;
  PackedConvVariants<bf16, bf16> of_bf16;  // `filtered` is null where bfloat16 has no products of its own
  bool pairs;  // Whether it has, of packed pairs. Else rows are widened as they are read, and packed is float32.
  // The same numbers from the same packed weights, on tiles and as if on tiles; null where the level has none.
  PackedConvVariants<bf16, bf16> on_tiles, on_emulated_tiles;
};

}  // namespace wavlm_fast
