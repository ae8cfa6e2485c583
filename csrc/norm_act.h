// What norm_act.cpp asks of norm_act_kernel.cpp, per level.
#pragma once

#include <cstdint>

#include "bf16.h"

namespace wavlm_fast {

// out = activation(layer norm of each of the rows x C); in place when out is x. weight and bias may be null.
template <class T>
using NormAct = void(const T* x, const float* weight, const float* bias, float eps, std::int64_t rows, std::int64_t C,
                     int activation, T* out);

struct NormActKernels {
  NormAct<float>* of_float;
  NormAct<bf16>* of_bf16;
};

}  // namespace wavlm_fast
