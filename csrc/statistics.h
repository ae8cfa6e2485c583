// Mean and deviation of a row, for kernels.
#pragma once

#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {

struct Statistics {
  float mean;
  float rstd;

  WAVLM_FAST_INLINE Floats normed(Floats x) const { return (x - mean) * rstd; }
};

// Of a row with this sum. The squares are of what differs from the mean, in a pass of their own: E[x^2] - E[x]^2 would
// cancel.
template <class T>
WAVLM_FAST_INLINE Statistics statistics(const T* row, std::int64_t C, float eps, float total) {
  float mean = total / C;
  if (mean - mean != 0.0f) {  // large numbers may leave the range in their sum where their mean does not
    Floats means[kUnroll] = {};
    sweep(C, [&](std::int64_t i, auto lanes, int u) { means[u] += lanes.load(row + i) / static_cast<float>(C); });
    mean = sum(means);
  }
  Floats squares[kUnroll] = {};
  sweep(C, [&](std::int64_t i, auto lanes, int u) {
    const Floats centred = lanes.keep(lanes.load(row + i) - mean);
    squares[u] += centred * centred;
  });
  return {mean, 1.0f / __builtin_sqrtf(sum(squares) / C + eps)};
}

template <class T>
WAVLM_FAST_INLINE Statistics statistics(const T* row, std::int64_t C, float eps) {
  Floats total[kUnroll] = {};
  sweep(C, [&](std::int64_t i, auto lanes, int u) { total[u] += lanes.load(row + i); });
  return statistics(row, C, eps, sum(total));
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
