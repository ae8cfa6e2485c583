// The activations that kernels fuse.
#pragma once

#include "exp.h"
#include "vec.h"

namespace wavlm_fast {

enum class Activation { none, relu, gelu, gelu_tanh };

namespace WAVLM_FAST_ISA {

// x * Phi(x), absolute error within 1e-7 * max(1, |x|), and down to x = -6 within 0.1 % of the value too.
// Phi(-u) = 2^-q(u) with q smooth, so one polynomial and one exponential serve both signs without cancelling.
WAVLM_FAST_INLINE Floats gelu(Floats x) {
  const Floats u = magnitude(x);
  const Floats near = minimum(splat(6.0f), u);
  // Fitted to log2(2 Phi(-u)) on [0, 6]; the fit's error in Phi is 1e-8.
  Floats q = splat(2.56506370e-7f);
  q = q * near - 5.82293514e-6f;
  q = q * near + 5.30163982e-5f;
  q = q * near - 2.17199841e-4f;
  q = q * near - 1.00129562e-4f;
  q = q * near + 7.04199427e-3f;
  q = q * near - 5.24915189e-2f;
  q = q * near - 0.459208006f;
  q = q * near - 1.15110531f;
  q = q * near - 1.0f;
  const Floats far = u - near;
  q = far * (far * -0.72134752f - 8.887f) + q;
  const Floats tail = exp2_of_tail(maximum(splat(-126.0f), q));
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

// z = 2 sqrt(2 / pi) * (x + 0.044715 x^3), of which gelu_tanh is x * sigmoid(z).
WAVLM_FAST_INLINE Floats gelu_tanh_argument(Floats x) { return x * (x * x * 0.0713548163f + 1.59576912f); }

// Above zero x less a small part of it: that rounds once.
WAVLM_FAST_INLINE Floats gelu_tanh(Floats x) {
  const Floats e = exp_of_negative(-magnitude(gelu_tanh_argument(x)));
  const Floats part = minimum(splat(30.0f), x) * (e / (1.0f + e));  // of infinity, too, a small part
  return x < 0.0f ? part : x - part;
}

template <Activation activation>
WAVLM_FAST_INLINE Floats activate(Floats x) {
  if constexpr (activation == Activation::relu) return x < 0.0f ? Floats{} : x;
  if constexpr (activation == Activation::gelu) return gelu(x);
  if constexpr (activation == Activation::gelu_tanh) return gelu_tanh(x);
  return x;
}

// gelu'(-u) = exp(-u^2 / 2) * q(u) and gelu'(u) = 1 - gelu'(-u), u >= 0; absolute error within 1e-7.
WAVLM_FAST_INLINE Floats gelu_derivative(Floats x) {
  const Floats near = minimum(splat(14.0f), magnitude(x));
  // Fitted on [0, 7] for the error in the product, which is 4e-9.
  Floats q = splat(5.85337965e-8f);
  q = q * near + -1.60367767e-6f;
  q = q * near + 1.98931775e-5f;
  q = q * near + -1.49792060e-4f;
  q = q * near + 7.79677357e-4f;
  q = q * near + -3.05535737e-3f;
  q = q * near + 9.65980906e-3f;
  q = q * near + -2.60691829e-2f;
  q = q * near + 6.22623935e-2f;
  q = q * near + -1.32916898e-1f;
  q = q * near + 2.49991104e-1f;
  q = q * near + -7.97884047e-1f;
  q = q * near + 0.5f;
  const Floats below = exp_of_negative(near * near * -0.5f) * q;
  return (x < 0.0f ? below : 1.0f - below) + x * 0.0f;  // NaN at infinity, as torch has it
}

// s + x * s * (1 - s) * z'(x) with s = sigmoid(z(x)), past 14 as at 14; absolute error within 2e-7. The factor 1 - s would
// cancel where s is near one.
WAVLM_FAST_INLINE Floats gelu_tanh_derivative(Floats x) {
  const Floats zero = x * 0.0f;  // or NaN at infinity, as torch has it
  x = maximum(splat(-14.0f), minimum(splat(14.0f), x));
  const Floats e = exp_of_negative(-magnitude(gelu_tanh_argument(x))), r = 1.0f / (1.0f + e);
  return (x < 0.0f ? e : splat(1.0f)) * r + x * (e * r * r) * (x * x * 0.214064449f + 1.59576912f) + zero;
}

// An activation as a type.
template <Activation value>
struct Of {
  static constexpr Activation activation = value;
};

// Calls body(Of<...>{}) for an activation that an entry has handed over as a number.
template <class Body>
WAVLM_FAST_INLINE void with_activation(int activation, const Body& body) {
  switch (static_cast<Activation>(activation)) {
    case Activation::none:
      return body(Of<Activation::none>{});
    case Activation::relu:
      return body(Of<Activation::relu>{});
    case Activation::gelu:
      return body(Of<Activation::gelu>{});
    case Activation::gelu_tanh:
      return body(Of<Activation::gelu_tanh>{});
  }
}

// What flows back through the activation of x.
template <Activation activation>
WAVLM_FAST_INLINE Floats through(Floats grad, Floats x) {
  if constexpr (activation == Activation::relu) return x > 0.0f ? grad : Floats{};
  if constexpr (activation == Activation::gelu) return grad * gelu_derivative(x);
  if constexpr (activation == Activation::gelu_tanh) return grad * gelu_tanh_derivative(x);
  return grad;
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
