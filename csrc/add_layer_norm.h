// What add_layer_norm.cpp asks of add_layer_norm_kernel.cpp, per level.
#pragma once

#include <cstdint>

#include "bf16.h"

namespace wavlm_fast {

// rows x C, one row or more, one after another. sum = x + residual, rounded to T, not written where sum is null; normed =
// layer norm of that sum. `row` is for C floats to work in.
template <class T>
using AddLayerNormForward = void(const T* x, const T* residual, const float* weight, const float* bias, float eps,
                                 std::int64_t rows, std::int64_t C, float* row, T* sum, T* normed);

// dx of rows x C; grad_sum may be null, for zeros; dweight and dbias [C] are added to.
template <class T>
using AddLayerNormBackward = void(const T* grad_sum, const T* grad_normed, const T* sum, const float* weight, float eps,
                                  std::int64_t rows, std::int64_t C, T* dx, float* dweight, float* dbias);

struct AddLayerNormKernels {
  AddLayerNormForward<float>* forward_float;
  AddLayerNormForward<bf16>* forward_bf16;
  AddLayerNormBackward<float>* backward_float;
  AddLayerNormBackward<bf16>* backward_bf16;
};

}  // namespace wavlm_fast
