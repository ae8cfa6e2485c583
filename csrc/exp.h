// e^x for kernels.
#pragma once

#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {

// e^x for x <= 0, within 1.5 ulp down to e^-30 and 4 ulp below; at x < -87 it stops at e^-87 instead of becoming
// denormal. NaN stays NaN.
WAVLM_FAST_INLINE Floats exp_of_negative(Floats x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
  const Floats shifted = x * 1.44269504f + 0x1.8p23f;
  const Floats f = x - (shifted - 0x1.8p23f) * 0.693147181f;
  // Minimax for the relative error on [-log(2)/2, log(2)/2]: 2e-9 before rounding.
  Floats p = splat(0.00138368347f);
  p = p * f + 0.00837482404f;
  p = p * f + 0.0416682262f;
  p = p * f + 0.166664201f;
  p = p * f + 0.499999921f;
  p = p * f + 1.00000004f;
  p = p * f + 1.0f;
  Words bits, exponent;
  std::memcpy(&bits, &p, sizeof(bits));
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  bits += exponent << 23;
  std::memcpy(&p, &bits, sizeof(p));
  return p;
}

// 1 / (1 + e^-x), within 4 ulp down to e^-30; NaN stays NaN.
WAVLM_FAST_INLINE Floats sigmoid(Floats x) {
  const Floats e = exp_of_negative(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
