// Exponentials for kernels.
#pragma once

#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {

// Added to a number it leaves the nearest integer in the low bits of the sum.
constexpr float kRounder = 0x1.8p23f;

// value * 2^n, n being an integer plus kRounder.
WAVLM_FAST_INLINE Floats times_power_of_two(Floats value, Floats n) {
  return floats_of(bits_of(value) + (bits_of(n) << 23));
}

// e^x for x <= 0, within 1.5 ulp down to e^-30 and 4 ulp below; at x < -87 it stops at e^-87 instead of becoming
// denormal. NaN stays NaN.
WAVLM_FAST_INLINE Floats exp_of_negative(Floats x) {
  x = maximum(splat(-87.0f), x);
  const Floats shifted = x * 1.44269504f + kRounder;
  const Floats f = x - (shifted - kRounder) * 0.693147181f;
  // Minimax for the relative error on [-log(2)/2, log(2)/2]: 2e-9 before rounding.
  Floats p = splat(0.00138368347f);
  p = p * f + 0.00837482404f;
  p = p * f + 0.0416682262f;
  p = p * f + 0.166664201f;
  p = p * f + 0.499999921f;
  p = p * f + 1.00000004f;
  p = p * f + 1.0f;
  return times_power_of_two(p, shifted);
}

// 2^(x * slope) for -126 <= x * slope <= 126, within 1 ulp of that of the exact product. NaN stays NaN.
WAVLM_FAST_INLINE Floats exp2_of(Floats x, float slope) {
  const Floats shifted = x * slope + kRounder;
  const Floats f = x * slope - (shifted - kRounder);
  // Minimax for the relative error on [-1/2, 1/2]: 3e-9 before rounding.
  Floats p = splat(1.5594672e-4f);
  p = p * f + 1.3406643e-3f;
  p = p * f + 9.617693e-3f;
  p = p * f + 5.5503104e-2f;
  p = p * f + 2.4022652e-1f;
  p = p * f + 6.9314724e-1f;
  p = p * f + 1.0f;
  return times_power_of_two(p, shifted);
}

// 2^x for -126 <= x <= 0 within a relative error of 1.5e-7: enough for a factor of at most one half.
WAVLM_FAST_INLINE Floats exp2_of_tail(Floats x) {
  const Floats shifted = x + kRounder;
  const Floats f = x - (shifted - kRounder);
  Floats p = splat(0.00132647272f);
  p = p * f + 0.00967151264f;
  p = p * f + 0.0555073374f;
  p = p * f + 0.240222421f;
  p = p * f + 0.693146978f;
  p = p * f + 1.0f;
  return times_power_of_two(p, shifted);
}

// 1 / (1 + e^-x), within 4 ulp down to e^-30; NaN stays NaN.
WAVLM_FAST_INLINE Floats sigmoid(Floats x) {
  const Floats e = exp_of_negative(-magnitude(x));
  return (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
