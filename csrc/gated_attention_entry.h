// What the entries of gated_attention and its gradient share.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>

#include "gated_attention.h"

namespace wavlm_fast {

// The ops' inputs, checked, and as the kernels want them.
struct AttentionTensors {
  at::Tensor q, k, v, gate, bias, key_lengths;
  Dropout dropout;
  double scale;

  // `queries` is the kernels' number of queries of a block.
  AttentionTensors(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& gate,
                   const at::Tensor& rel_bias, const std::optional<at::Tensor>& key_lengths, double dropout_p,
                   const std::optional<at::Tensor>& seed, double scale, int64_t queries);

  template <class T>
  void fill(AttentionInputs<T>& call) const {
    call.q = static_cast<const T*>(q.const_data_ptr());
    call.k = static_cast<const T*>(k.const_data_ptr());
    call.v = static_cast<const T*>(v.const_data_ptr());
    call.q_strides = strides(q), call.k_strides = strides(k), call.v_strides = strides(v);
    call.gate = gate.const_data_ptr<float>();
    call.bias = bias.const_data_ptr<float>(), call.bias_stride = bias.size(1);
    call.key_lengths = key_lengths.defined() ? key_lengths.const_data_ptr<int64_t>() : nullptr;
    call.B = q.size(0), call.T_ = q.size(1), call.H = q.size(2), call.D = q.size(3);
    int exponent;
    call.unit = 2.0f * std::frexp(call.scale = static_cast<float>(scale), &exponent);
    call.power = std::ldexp(1.0f, exponent - 1);
    call.dropout = dropout;
  }

  static FrameStrides strides(const at::Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }
};

}  // namespace wavlm_fast
