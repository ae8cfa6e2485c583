// Entries that other entries call.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace wavlm_fast {

// As the op of that name.
at::Tensor position_gate(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                         const at::Tensor& constant);

// As the op gated_attention, into `out`, which is like q and may be q itself; returns the log-sum-exp. `bounds` are those
// of packed frames (packed_frames.h), and empty for a dense batch.
at::Tensor gated_attention_into(const at::Tensor& out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const at::Tensor& gate, const at::Tensor& rel_bias,
                                const std::optional<at::Tensor>& key_lengths, double dropout_p,
                                const std::optional<at::Tensor>& seed, double scale,
                                at::ArrayRef<int64_t> bounds = {});

}  // namespace wavlm_fast
