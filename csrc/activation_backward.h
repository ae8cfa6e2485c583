// What activation_backward.cpp asks of activation_backward_kernel.cpp, per level.
#pragma once

#include <cstdint>

#include "bf16.h"

namespace wavlm_fast {

// out = grad * the activation's derivative at pre.
template <class T>
using ActivationBackward = void(const T* grad, const T* pre, std::int64_t size, int activation, T* out);

struct ActivationBackwardKernels {
  ActivationBackward<float>* of_float;
  ActivationBackward<bf16>* of_bf16;
};

}  // namespace wavlm_fast
