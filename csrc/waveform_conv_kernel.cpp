// Sums over the windows of a waveform, in float64: a constant offset far above the signal must not cancel it.
#include "waveform_conv.h"

#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {
namespace {

constexpr int kHalf = kLanes / 2;
typedef double Doubles __attribute__((vector_size(kHalf * 8)));
typedef float HalfFloats __attribute__((vector_size(kHalf * 4)));

WAVLM_FAST_INLINE Doubles load_wide(const float* from) {
  HalfFloats narrow;
  std::memcpy(&narrow, from, sizeof(narrow));
  return __builtin_convertvector(narrow, Doubles);
}

// A window is kWide vectors wide, of which K numbers count; all sums stay in registers.
template <int K>
void add_windows_of(const float* x, std::int64_t windows, std::int64_t stride, double* sums, double* products) {
  constexpr int kWide = (K + kHalf - 1) / kHalf;
  Doubles sum[kWide] = {}, product[K][kWide] = {};
  for (std::int64_t t = 0; t < windows; ++t, x += stride) {
    // The last windows may end with the waveform: what lies behind them is not read.
    float window[kWide * kHalf];
    std::memcpy(window, x, K * sizeof(float));
    for (int k = K; k < kWide * kHalf; ++k) window[k] = 0.0f;
    Doubles wide[kWide];
#pragma GCC unroll 8
    for (int v = 0; v < kWide; ++v) {
      wide[v] = load_wide(window + v * kHalf);
      sum[v] += wide[v];
    }
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
#pragma GCC unroll 8
      for (int v = 0; v < kWide; ++v) product[k][v] += wide[v] * static_cast<double>(x[k]);
    }
  }
  for (int k = 0; k < K; ++k) {
    sums[k] += sum[k / kHalf][k % kHalf];
    for (int l = 0; l < K; ++l) products[k * K + l] += product[k][l / kHalf][l % kHalf];
  }
}

void add_windows(const float* x, std::int64_t windows, std::int64_t stride, std::int64_t K, double* sums,
                 double* products) {
  if (K == 10) return add_windows_of<10>(x, windows, stride, sums, products);
  for (std::int64_t t = 0; t < windows; ++t, x += stride) {
    for (std::int64_t k = 0; k < K; ++k) {
      sums[k] += x[k];
      for (std::int64_t l = 0; l < K; ++l) products[k * K + l] += static_cast<double>(x[k]) * x[l];
    }
  }
}

}  // namespace

const WaveformConvKernels& waveform_conv_kernels() {
  static constexpr WaveformConvKernels kernels = {add_windows};
  return kernels;
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
