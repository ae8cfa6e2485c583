// What position_gate.cpp asks of position_gate_kernel.cpp, per level.
#pragma once

#include <cstdint>

#include "bf16.h"

namespace wavlm_fast {

// Consecutive frames of one utterance, at most kGateFrames.
template <class T>
struct GateFrames {
  const T* x;  // [count, H, D], frame_step numbers from frame to frame
  std::int64_t frame_step;
  std::int64_t count;
  std::int64_t H, D;
  const float* weight;  // [2, D], rows of four already added up
  const float* bias;    // [2], likewise
  const float* scale;   // [H]
};

constexpr std::int64_t kGateFrames = 32;

// Numbers to work in.
inline constexpr std::int64_t gate_scratch(std::int64_t H) { return 2 * H * kGateFrames; }

// out[h * head_step + t] = a * (b * scale[h] - 1) + 2.
template <class T>
using PositionGateForward = void(const GateFrames<T>& frames, float* work, float* out, std::int64_t head_step);

// grad as out. dx of [count, H, D]; added to are dweight [2, D], dbias [2] and dscale [H], one after the other at sums.
template <class T>
using PositionGateBackward = void(const GateFrames<T>& frames, float* work, const float* grad, std::int64_t head_step,
                                  T* dx, float* sums);

struct PositionGateKernels {
  PositionGateForward<float>* forward_float;
  PositionGateForward<bf16>* forward_bf16;
  PositionGateBackward<float>* backward_float;
  PositionGateBackward<bf16>* backward_bf16;
};

}  // namespace wavlm_fast
