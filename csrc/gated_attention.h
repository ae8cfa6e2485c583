// What gated_attention.cpp asks of gated_attention_kernel.cpp, per level.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bf16.h"

namespace wavlm_fast {

// Strides of a [B, T, H, D] tensor in elements; D is contiguous.
struct FrameStrides {
  std::int64_t b, t, h;
};

// Of the attention weights, as wavlm_fast/ops/_dropout.py defines it.
struct Dropout {
  std::uint32_t threshold;  // of the 24 random bits of a weight; 0: none is dropped
  std::uint32_t seed;
  float kept_scale;
};

template <class T>
struct GatedAttention {
  const T* q;
  const T* k;
  const T* v;
  FrameStrides q_strides, k_strides, v_strides;
  const float* gate;                 // [B, H, T]
  const float* rel_bias;             // [H, 2T-1], entry j - i + T - 1
  const std::int64_t* key_lengths;   // [B], or null
  T* out;                            // [B, T, H, D]
  float* lse;                        // [B, H, T]
  std::int64_t B, T_, H, D;
  float scale;
  Dropout dropout;
};

// Computes queries first .. first + count - 1 of one batch entry and head.
template <class T>
using GatedAttentionForward = void(const GatedAttention<T>& call, std::int64_t b, std::int64_t h, std::int64_t first,
                                   std::int64_t count, float* scratch);

struct GatedAttentionKernels {
  std::int64_t queries;      // of one block: `count` of a call is best a multiple of it
  std::int64_t most_blocks;  // `count` is at most queries * most_blocks
  // Floats of 64-byte aligned scratch that a call of most_blocks blocks needs.
  std::size_t (*scratch_size)(std::int64_t D);
  GatedAttentionForward<float>* forward_float;
  GatedAttentionForward<bf16>* forward_bf16;
};

}  // namespace wavlm_fast
