// What position_gate.cpp does for other entries.
#pragma once

#include "tensor.h"

namespace wavlm_fast {

// As the op of that name.
Tensor position_gate(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& constant);

}  // namespace wavlm_fast
