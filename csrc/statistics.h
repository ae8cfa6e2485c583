// Mean and deviation of a row, for kernels.
#pragma once

#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {

struct Statistics {
  float mean;
  float rstd;
};

// Two passes over the row: the mean first, then the squares of what differs from it. E[x^2] - E[x]^2 would cancel.
template <class T>
WAVLM_FAST_INLINE Statistics statistics(const T* row, std::int64_t C, float eps) {
  Floats total[kUnroll] = {};
  sweep(C, [&](std::int64_t i, auto lanes, int u) { total[u] += lanes.load(row + i); });
  const float mean = sum(total) / C;
  Floats squares[kUnroll] = {};
  sweep(C, [&](std::int64_t i, auto lanes, int u) {
    const Floats centred = lanes.keep(lanes.load(row + i) - mean);
    squares[u] += centred * centred;
  });
  return {mean, 1.0f / __builtin_sqrtf(sum(squares) / C + eps)};
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
