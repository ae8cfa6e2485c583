// What waveform_conv.cpp asks of waveform_conv_kernel.cpp, per level.
#pragma once

#include <cstdint>

namespace wavlm_fast {

// Adds to sums [K] those of x[k] over windows that begin `stride` numbers apart, and to products [K, K] those of
// x[k] * x[l].
using AddWindows = void(const float* x, std::int64_t windows, std::int64_t stride, std::int64_t K, double* sums,
                        double* products);

struct WaveformConvKernels {
  AddWindows* add_windows;
};

}  // namespace wavlm_fast
