// What the entries of gated_attention and its gradient ask of their kernels, per level.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bf16.h"

namespace wavlm_fast {

// Strides of a [B, T, H, D] tensor in elements; D is contiguous.
struct FrameStrides {
  std::int64_t b, t, h;
};

// Where the frames of an utterance are: a batch entry is one, or of packed frames the only entry has them all.
struct Utterance {
  std::int64_t b, first, T;
};

// Of the attention weights, as wavlm_fast/ops/_dropout.py defines it.
struct Dropout {
  std::uint32_t threshold;  // of the 24 random bits of a weight; 0: none is dropped
  std::uint32_t seed;
  float kept_scale;
};

template <class T>
struct AttentionInputs {
  const T* q;
  const T* k;
  const T* v;
  FrameStrides q_strides, k_strides, v_strides;
  const float* gate;                // [B, H, frames]
  const float* bias;                // [H, bias_stride], of query i and key j at i - j + longest - 1
  const std::int64_t* key_lengths;  // [B], or null
  std::int64_t frames, H, D;        // frames of a batch entry
  std::int64_t longest;             // T of an utterance
  std::int64_t bias_stride;
  float scale;  // positive, `power` times `unit`
  float power;  // of two
  float unit;   // from 1 to 2
  Dropout dropout;
};

template <class T>
struct GatedAttention : AttentionInputs<T> {
  T* out;  // may be where q is: a call has read its own queries before it writes
  FrameStrides out_strides;
  float* lse;  // [B, H, frames]
};

// Computes the blocks of queries first_block .. end_block - 1 of one utterance and head.
template <class T>
using GatedAttentionForward = void(const GatedAttention<T>& call, const Utterance& of, std::int64_t h,
                                   std::int64_t first_block, std::int64_t end_block, float* scratch);

struct GatedAttentionKernels {
  std::int64_t queries;      // a block has at most so many, and there are no more blocks than that makes necessary
  std::int64_t most_blocks;  // of a call
  // Floats of 64-byte aligned scratch that a call of most_blocks blocks needs.
  std::size_t (*scratch_size)(std::int64_t D);
  GatedAttentionForward<float>* forward_float;
  GatedAttentionForward<bf16>* forward_bf16;
  // The same with products on tiles, and as if on tiles; null where the level has none.
  GatedAttentionForward<bf16>*on_tiles, *on_emulated_tiles;
};

template <class T>
struct GatedAttentionBackward : AttentionInputs<T> {
  const T* grad;     // [B, frames, H, D], as are dq, dk and dv
  const float* lse;  // [B, H, frames]
  T* dq;
  T* dk;
  T* dv;
  float* dgate;  // [B, H, frames]
};

// The blocks of an utterance and head in parts, whose number depends on theirs alone: sums over queries are sums of the
// parts' sums, in their order, whoever computes which of them.
//
// Computes parts first .. end - 1: dq and dgate of their queries, into `sums` what they add to those of the keys, all
// together, and into `dbias` what each adds to that of the bias, one behind the other. dbias[x] is of the bias at
// x = i - j + T - 1, T being the utterance's; `queries` floats before and behind it are written too.
template <class T>
using GatedAttentionBackwardParts = void(const GatedAttentionBackward<T>& call, const Utterance& of, std::int64_t h,
                                         std::int64_t first, std::int64_t end, float* sums, float* dbias,
                                         float* scratch);

// dk and dv of keys first .. end - 1 of one utterance and head from `count` sums, which lie one behind the other.
template <class T>
using GatedAttentionBackwardKeys = void(const GatedAttentionBackward<T>& call, const Utterance& of, std::int64_t h,
                                        std::int64_t first, std::int64_t end, const float* sums, std::int64_t count);

struct GatedAttentionBackwardKernels {
  std::int64_t queries;
  std::int64_t (*parts)(std::int64_t blocks);
  // Floats of 64-byte aligned memory for an utterance of T frames: scratch, and the sums of keys.
  std::size_t (*scratch_size)(std::int64_t T, std::int64_t D);
  std::size_t (*sums_size)(std::int64_t T, std::int64_t D);
  GatedAttentionBackwardParts<float>* parts_float;
  GatedAttentionBackwardParts<bf16>* parts_bf16;
  GatedAttentionBackwardKeys<float>* keys_float;
  GatedAttentionBackwardKeys<bf16>* keys_bf16;
};

}  // namespace wavlm_fast
