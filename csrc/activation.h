// The activations that kernels fuse.
#pragma once

#include "exp.h"
#include "vec.h"

namespace wavlm_fast {

enum class Activation { none, relu, gelu, gelu_tanh };

namespace WAVLM_FAST_ISA {

// x * Phi(x), absolute error within 1e-7 * max(1, |x|), for negative x relative to Phi(x) too.
// Phi(-u) = exp(-p(u)) / 2 with p smooth, so one polynomial and one exponential serve both signs without cancelling.
WAVLM_FAST_INLINE Floats gelu(Floats x) {
  const Floats u = x < 0.0f ? -x : x;
  const Floats near = u > 6.0f ? splat(6.0f) : u;
  // Fitted to -log(2 Phi(-u)) on [0, 6]; the fit's error in Phi is 6e-9.
  Floats p = splat(-3.13571621e-7f);
  p = p * near + 6.04270302e-6f;
  p = p * near - 4.86652271e-5f;
  p = p * near + 1.87294049e-4f;
  p = p * near + 6.06935723e-6f;
  p = p * near - 4.82000625e-3f;
  p = p * near + 3.63531222e-2f;
  p = p * near + 3.18306071e-1f;
  p = p * near + 7.97884841e-1f;
  p = p * near;
  const Floats far = u - near;
  p = p + far * (far * 0.5f + 6.16f);
  const Floats tail = 0.5f * exp_of_negative(-p);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

// x * sigmoid(2 y) with y = sqrt(2 / pi) * (x + 0.044715 x^3).
WAVLM_FAST_INLINE Floats gelu_tanh(Floats x) {
  return x * sigmoid(x * (x * x * 0.0713548163f + 1.59576912f));
}

template <Activation activation>
WAVLM_FAST_INLINE Floats activate(Floats x) {
  if constexpr (activation == Activation::relu) return x < 0.0f ? Floats{} : x;
  if constexpr (activation == Activation::gelu) return gelu(x);
  if constexpr (activation == Activation::gelu_tanh) return gelu_tanh(x);
  return x;
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
