// Entries that other entries call.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace wavlm_fast {

// As the ops of these names.
at::Tensor position_gate(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                         const at::Tensor& constant);

std::tuple<at::Tensor, at::Tensor> gated_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                   const at::Tensor& gate, const at::Tensor& rel_bias,
                                                   const std::optional<at::Tensor>& key_lengths, double dropout_p,
                                                   const std::optional<at::Tensor>& seed, double scale);

}  // namespace wavlm_fast
