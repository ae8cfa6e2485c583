// What waveform_conv_backward.cpp asks of waveform_conv_backward_kernel.cpp, per level.
#pragma once

#include <cstdint>

#include "bf16.h"

namespace wavlm_fast {

// The first convolution of one utterance with its group norm: n = (window * weight + shift) * rstd is normed, and
// activation(n * norm_weight + norm_bias) the output. T is the gradient's type.
template <class T>
struct WaveformGradient {
  const float* x;
  const T* grad;        // [frames, C]
  const float* weight;  // [K, C]
  const float* shift;   // [C] each, C a multiple of the vectors' lanes
  const float* rstd;
  const float* norm_weight;
  const float* norm_bias;
  const float* mean;                    // of the gradient of the norm's output, and
  const float* mean_normed;             // of that times n: for `spread`
  std::int64_t C, channels, K, stride;  // `channels` is C without its padding
  int activation;
};

// With g the gradient of the norm's output: adds to sums [K + 2, C] those of g times the window, of g, and of g times
// n, over frames first .. first + count - 1 and the channels from begin to end, a multiple of the lanes.
template <class T>
using CollectGradient = void(const WaveformGradient<T>& call, std::int64_t first, std::int64_t count,
                             std::int64_t begin, std::int64_t end, float* sums);

// Gradients of the windows of these frames, [count, K].
template <class T>
using SpreadGradient = void(const WaveformGradient<T>& call, std::int64_t first, std::int64_t count, float* windows);

struct WaveformBackwardKernels {
  std::int64_t lanes;
  std::int64_t most_taps;
  CollectGradient<float>* collect_float;
  CollectGradient<bf16>* collect_bf16;
  SpreadGradient<float>* spread_float;
  SpreadGradient<bf16>* spread_bf16;
};

}  // namespace wavlm_fast
