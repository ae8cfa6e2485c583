// What gated_attention.cpp does for other entries, its gradient's first.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "gated_attention.h"
#include "integers.h"
#include "tensor.h"

namespace wavlm_fast {

// The ops' inputs, checked, and as the kernels want them.
struct AttentionTensors {
  Tensor q, k, v, gate;
  std::vector<float> bias;  // [H, bias_stride]
  std::optional<Tensor> key_lengths;
  std::vector<Utterance> utterances;  // the longest first
  Dropout dropout;
  double scale;
  int64_t bias_stride;

  // `bounds` are of packed frames, see bounds_of, and empty of dense ones. `queries` is the kernels' number of queries
  // of a block.
  AttentionTensors(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate, const Tensor& rel_bias,
                   const std::optional<Tensor>& key_lengths, double dropout_p, const std::optional<Tensor>& seed,
                   double scale, Sizes bounds, int64_t queries);

  int64_t longest() const { return utterances.empty() ? 0 : utterances[0].T; }

  template <class T>
  void fill(AttentionInputs<T>& call) const {
    call.q = data<T>(q), call.k = data<T>(k), call.v = data<T>(v);
    call.q_strides = strides(q), call.k_strides = strides(k), call.v_strides = strides(v);
    call.gate = data<float>(gate);
    call.key_lengths = data<int64_t>(key_lengths);
    call.frames = q.size(1), call.H = q.size(2), call.D = q.size(3), call.longest = longest();
    call.bias = bias.data(), call.bias_stride = bias_stride;
    int exponent;
    call.unit = 2.0f * std::frexp(call.scale = static_cast<float>(scale), &exponent);
    call.power = std::ldexp(1.0f, exponent - 1);
    call.dropout = dropout;
  }

  static FrameStrides strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }
};

// As the op gated_attention, into `out`, which is like q and may be q itself; returns the log-sum-exp. `bounds` are those
// of packed frames (packed_frames.h), and empty for a dense batch.
Tensor gated_attention_into(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate,
                            const Tensor& rel_bias, const std::optional<Tensor>& key_lengths, double dropout_p,
                            const std::optional<Tensor>& seed, double scale, Sizes bounds);

// Whether the kernels of the level in use have products on tiles.
bool gated_attention_has_tiles();

// Changes the sign of every number of a contiguous tensor, float32 or bfloat16.
void negate(const Tensor& x);

// What is done at a time: blocks of queries of one utterance and head.
struct AttentionTask {
  int64_t utterance, h, part, first_block, end_block;
};

// The work of a call, an utterance and head cut into as many parts as its share of all is worth. What is long comes
// first, and threads take tasks as they finish: in the end all of them have short ones.
class AttentionTasks {
 public:
  // `wanted` tasks, or more; parts_of(blocks, parts) says in how many parts so many blocks are cut instead of `parts`.
  template <class PartsOf>
  AttentionTasks(const std::vector<Utterance>& utterances, int64_t H, int64_t queries, int64_t wanted,
                 const PartsOf& parts_of) {
    int64_t cost = 0;  // of queries times keys
    for (const Utterance& of : utterances) cost += squared(divided_up(of.T, queries));
    for (const Utterance& of : utterances) {
      const int64_t blocks = divided_up(of.T, queries);
      if (blocks == 0 || H == 0) break;
      const int64_t parts = parts_of(blocks, divided_up(wanted * squared(blocks), H * cost));
      shares_.push_back({blocks, parts, count_});
      count_ += H * parts;
    }
  }

  int64_t count() const { return count_; }
  // Utterances that have tasks at all, and in how many parts they are.
  int64_t utterances() const { return shares_.size(); }
  int64_t parts(int64_t utterance) const { return shares_[utterance].parts; }

  AttentionTask operator[](int64_t task) const {
    const auto after = std::upper_bound(shares_.begin(), shares_.end(), task,
                                        [](int64_t task, const Share& share) { return task < share.first_task; });
    const Share& share = *(after - 1);
    const int64_t own = task - share.first_task, part = own % share.parts;
    return {after - 1 - shares_.begin(), own / share.parts, part, part * share.blocks / share.parts,
            (part + 1) * share.blocks / share.parts};
  }

 private:
  struct Share {
    int64_t blocks, parts, first_task;
  };

  static constexpr int64_t squared(int64_t n) { return n * n; }

  int64_t count_ = 0;
  std::vector<Share> shares_;
};

}  // namespace wavlm_fast
