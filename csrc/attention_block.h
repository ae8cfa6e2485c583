// What the attention kernels share: blocks of queries, their scores and weights, and the dropout mask.
//
// Lanes are queries: a vector holds one number of kLanes neighbouring queries. So the maximum and the sum of the
// softmax are lane-wise, the gate is a vector, and the Toeplitz bias of one key is a run of consecutive numbers.
#pragma once

#include "attention_copy.h"
#include "exp.h"
#include "gated_attention.h"
#include "tiles.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {

constexpr int kQueries = kColumns;  // of a block, at most
constexpr float kLog2E = 1.44269504f;

// The first query of a block. Blocks differ by one vector at most: one that is much smaller would be slow.
constexpr std::int64_t first_query(std::int64_t block, std::int64_t T) {
  const std::int64_t vectors = divided_up(T, kLanes);
  return block * vectors / divided_up(vectors, kVectors) * kLanes;
}

// Keys of an utterance. A length out of range is the caller's mistake, but no reason to read what is not there.
template <class T>
constexpr std::int64_t keys_of(const AttentionInputs<T>& call, const Utterance& of) {
  const std::int64_t length = call.key_lengths ? call.key_lengths[of.b] : of.T;
  return length < 0 ? 0 : least(length, of.T);
}

// Where a head of an utterance begins in [B, frames, H, D].
template <class T>
constexpr T* head_of(T* x, const FrameStrides& strides, const Utterance& of, std::int64_t h) {
  return x + of.b * strides.b + of.first * strides.t + h * strides.h;
}

// The row of a query among all [B, H, frames].
template <class T>
constexpr std::int64_t row_of(const AttentionInputs<T>& call, const Utterance& of, std::int64_t h, std::int64_t query) {
  return (of.b * call.H + h) * call.frames + of.first + query;
}

// The biases of an utterance's first query and key.
template <class T>
constexpr const float* bias_of(const AttentionInputs<T>& call, std::int64_t h) {
  return call.bias + h * call.bias_stride + call.longest - 1;
}

// A run of keys as rows of words.
struct Keys {
  const float* rows;
  std::int64_t stride, count;
  std::int64_t words;  // of a row
};

// The products of a key with queries -> scores, stored, and into `top` the greatest so far. `bias` is the key's, of the
// first query.
template <int N>
WAVLM_FAST_INLINE void add_bias(Floats (&products)[N], const Floats (&gate)[N], const float* bias, float* to,
                                Floats (&top)[N]) {
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    products[n] += gate[n] * load(bias + n * kLanes);
    top[n] = maximum(products[n], top[n]);
    store(to + n * kLanes, products[n]);
  }
}

// Scores of keys, [count][N * kLanes], and into `top` the greatest so far. The queries are multiplied by the power of two
// in the scale, which rounds nothing and keeps products in range; scores are in units of the rest, one to two, and so is
// the gate. The rest enters only once, with the exponential. `bias` is that of the first key and the first query. Of keys,
// whole groups of kRows are read.
template <class Element, int N>
WAVLM_FAST_INLINE void score(Registers, const Keys& keys, const float* q, const float* gates, const float* bias,
                             float* to, Floats (&top)[N]) {
  Floats gate[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) gate[n] = load(gates + n * kLanes);
  for (std::int64_t first = 0; first < keys.count; first += kRows) {
    const Word* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = keys.rows + (first + r) * keys.stride;
    Floats acc[kRows][N] = {};
    multiply<Element>(rows, 1, q, keys.words, acc);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= keys.count) break;
      add_bias(acc[r], gate, bias - first - r, to + (first + r) * N * kLanes, top);
    }
  }
}

// What turns the score of a lane into a weight.
struct Softmax {
  Floats top;
  float slope;
  float floor;  // a score that is further below counts as this one: no power of two leaves the range of floats

  Softmax() = default;
  Softmax(Floats top_or_none, float unit) : slope(unit * kLog2E), floor(-125.0f / slope) {
    top = top_or_none == -__builtin_inff() ? Floats{} : top_or_none;  // no score yet, or none that is not -inf: not NaN
  }

  // The difference first: the products could leave the range.
  WAVLM_FAST_INLINE Floats weight(Floats score) const { return exp2_of(maximum(splat(floor), score - top), slope); }
};

// Scores -> weights, in place.
template <int N>
WAVLM_FAST_INLINE void weigh(Single, float* scores, std::int64_t keys, const Softmax (&softmax)[N],
                             Floats (&total)[N]) {
  for (std::int64_t j = 0; j < keys; ++j, scores += N * kLanes) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const Floats weight = softmax[n].weight(load(scores + n * kLanes));
      total[n] += weight;
      store(scores + n * kLanes, weight);
    }
  }
}

// All bits of the first n lanes.
WAVLM_FAST_INLINE Words first_lanes(std::int64_t n) {
  Words lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? ~0u : 0u;
  return lanes;
}

WAVLM_FAST_INLINE Words mix(Words x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// The key of kLanes rows of weights from `row` on, see row_of: as wavlm_fast/ops/_dropout.py has it.
WAVLM_FAST_INLINE Words dropout_keys(const Dropout& dropout, std::int64_t row) {
  Words lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return mix(mix(lane + static_cast<std::uint32_t>(row)) + dropout.seed);
}

// All bits where the weights of key j are kept, none where they are dropped.
WAVLM_FAST_INLINE Words kept(const Dropout& dropout, Words keys, std::int64_t j) {
  const Words kept = (mix(keys + static_cast<std::uint32_t>(j) * 0x9e3779b9u) >> 8) >= dropout.threshold;
  return kept;
}

WAVLM_FAST_INLINE Floats masked(Floats value, Words mask) { return floats_of(bits_of(value) & mask); }

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
