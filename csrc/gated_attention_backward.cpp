
#include <algorithm>
#include <tuple>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "gated_attention_entry.h"
#include "library.h"
#include "packed_frames.h"
#include "parallel.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(GatedAttentionBackwardKernels, gated_attention_backward_kernels)

namespace {

// An utterance and head is one task where that gives every thread one and a half, and its parts are tasks where not. The
// number of threads has no say in what is added to what, which would change the sums.
constexpr int64_t wanted_tasks(int64_t threads) { return threads + threads / 2; }
constexpr int64_t kKeys = 64;  // of a task that adds up what parts found for them

// Where the sums of the parts of each utterance are, all in one piece of memory.
struct Sums {
  std::vector<int64_t> first, size, parts;  // floats: before the utterance, and of each of its parts
  int64_t total = 0;

  // An utterance of so many parts, each with its own sums.
  void add(int64_t H, int64_t parts_of_utterance, int64_t size_of_part) {
    first.push_back(total), size.push_back(size_of_part), parts.push_back(parts_of_utterance);
    total += H * parts_of_utterance * size_of_part;
  }

  // The sums of a part of an utterance and head. Its other parts follow.
  int64_t at(int64_t u, int64_t h, int64_t part) const { return first[u] + (h * parts[u] + part) * size[u]; }
};

// The diagonals' sums of all parts, with room on both sides, around the centre of [H, 2L-1], in one fixed order.
void add_up_bias(const float* memory, const Sums& sums, int64_t queries, const Tensor& drel_bias) {
  const int64_t H = drel_bias.size(0), entries = drel_bias.size(1);
  float* out = mutable_data<float>(drel_bias);
  parallel_for(0, H, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> total(entries);
    for (int64_t h = begin; h < end; ++h) {
      std::fill(total.begin(), total.end(), 0.0);
      for (size_t u = 0; u < sums.first.size(); ++u) {
        const int64_t own = sums.size[u] - 2 * queries;
        double* to = total.data() + (entries - own) / 2;
        for (int64_t part = 0; part < sums.parts[u]; ++part) {
          const float* from = memory + sums.at(u, h, part) + queries;
          for (int64_t x = 0; x < own; ++x) to[x] += from[x];
        }
      }
      std::reverse_copy(total.begin(), total.end(), out + h * entries);
    }
  });
}

template <class T>
void run(const GatedAttentionBackward<T>& call, const std::vector<Utterance>& utterances, const Tensor& drel_bias,
         GatedAttentionBackwardParts<T>* of_parts, GatedAttentionBackwardKeys<T>* of_keys,
         const GatedAttentionBackwardKernels& kernels) {
  const AttentionTasks tasks(utterances, call.H, kernels.queries, wanted_tasks(num_threads()),
                             [&](int64_t blocks, int64_t wanted) { return wanted > 1 ? kernels.parts(blocks) : 1; });
  // What one task computes needs no place for sums of keys: the thread has one.
  const auto whole = [&](int64_t u) { return tasks.parts(u) == 1; };
  Sums of_bias, of_sums;
  struct Keys {
    int64_t utterance, h, first;
  };
  std::vector<Keys> in_parts;  // whose sums have to be added up
  int64_t n_whole = 0;
  for (int64_t u = 0; u < tasks.utterances(); ++u) {
    const int64_t T_ = utterances[u].T, size = kernels.sums_size(T_, call.D);
    of_bias.add(call.H, kernels.parts(divided_up(T_, kernels.queries)), 2 * T_ - 1 + 2 * kernels.queries);
    of_sums.add(call.H, tasks.parts(u), whole(u) ? 0 : size);
    if (whole(u)) n_whole = std::max(n_whole, size);
    for (int64_t at = 0; !whole(u) && at < call.H * T_;) {
      in_parts.push_back({u, at / T_, at % T_});
      at += std::min(kKeys, T_ - at % T_);
    }
  }
  const int64_t n_scratch = kernels.scratch_size(call.longest, call.D);
  const int64_t of_bias_lines = divided_up(of_bias.total, 16) * 16;
  const Memory all(Scratch::call, (of_bias_lines + of_sums.total) * sizeof(float));
  float *bias_sums = all.as<float>(), *sums = bias_sums + of_bias_lines;
  const auto of_task = [&](int64_t i, float* memory) {
    const AttentionTask task = tasks[i];
    const int64_t u = task.utterance, h = task.h, first = task.part;
    float* own = whole(u) ? memory + n_scratch : sums + of_sums.at(u, h, first);
    float* bias = bias_sums + of_bias.at(u, h, first) + kernels.queries;
    of_parts(call, utterances[u], h, first, whole(u) ? of_bias.parts[u] : first + 1, own, bias, memory);
    if (whole(u)) of_keys(call, utterances[u], h, 0, utterances[u].T, own, 1);
  };
  for_each_task(tasks.count(), n_scratch + n_whole, of_task);
  parallel_for(0, in_parts.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [u, h, first] = in_parts[i];
      const int64_t behind = std::min(first + kKeys, utterances[u].T);
      of_keys(call, utterances[u], h, first, behind, sums + of_sums.at(u, h, 0), tasks.parts(u));
    }
  });
  if (drel_bias.numel()) add_up_bias(bias_sums, of_bias, kernels.queries, drel_bias);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
void differentiate(const AttentionTensors& tensors, const Tensor& grad, const Tensor& lse, const Gradients& gradients,
                   GatedAttentionBackwardParts<T>* of_parts, GatedAttentionBackwardKeys<T>* of_keys) {
  const auto& [dq, dk, dv, dgate, drel_bias] = gradients;
  GatedAttentionBackward<T> call;
  tensors.fill(call);
  call.grad = data<T>(grad);
  call.lse = data<float>(lse);
  call.dq = mutable_data<T>(dq), call.dk = mutable_data<T>(dk), call.dv = mutable_data<T>(dv);
  call.dgate = mutable_data<float>(dgate);
  run(call, tensors.utterances, drel_bias, of_parts, of_keys, gated_attention_backward_kernels());
}

Gradients gated_attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& gate, const Tensor& rel_bias, const std::optional<Tensor>& key_lengths,
                                   const Tensor& /*out*/, const Tensor& lse, double dropout_p,
                                   const std::optional<Tensor>& seed, double scale, const std::vector<bool>& wanted,
                                   const std::optional<Tensor>& offsets) {
  const auto& kernels = gated_attention_backward_kernels();
  const auto bounds = bounds_of("gated_attention_backward", offsets, q);
  const AttentionTensors tensors(q, k, v, gate, rel_bias, key_lengths, dropout_p, seed, scale, bounds, kernels.queries);
  ENTRY_CHECK(dtype_of(grad) == dtype_of(q) && grad.sizes().equals(q.sizes()),
              "gated_attention_backward: expected a gradient like q, got ", dtype_of(grad), " ", grad.sizes());
  ENTRY_CHECK(dtype_of(lse) == kFloat && lse.sizes().equals(gate.sizes()),
              "gated_attention_backward: expected a float32 lse of ", gate.sizes(), ", got ", dtype_of(lse), " ",
              lse.sizes());
  ENTRY_CHECK(wanted.size() == 5, "gated_attention_backward: expected 5 truth values, got ", wanted.size());
  const Tensor grad_ = contiguous_of(grad), lse_ = contiguous_of(lse);
  Gradients gradients = {fresh_like(q), fresh_like(k), fresh_like(v), fresh_like(lse),
                         wanted[4] ? fresh_like(rel_bias) : fresh(q, {0})};
  if (dtype_of(q) == kFloat) {
    differentiate(tensors, grad_, lse_, gradients, kernels.parts_float, kernels.keys_float);
  } else {
    differentiate(tensors, grad_, lse_, gradients, kernels.parts_bf16, kernels.keys_bf16);
  }
  // The kernels saw the scale's absolute value.
  if (scale < 0) negate(std::get<0>(gradients));
  if (scale == 0) std::get<0>(gradients) = zeros(q, q.sizes(), dtype_of(q));
  auto& [dq, dk, dv, dgate, drel_bias] = gradients;
  for (const auto& [i, gradient] : {std::pair{0, &dq}, {1, &dk}, {2, &dv}, {3, &dgate}}) {
    if (!wanted[i]) *gradient = fresh(q, {0});
  }
  return gradients;
}

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) {
  m.impl("gated_attention_backward", TORCH_BOX(&gated_attention_backward));
}

}  // namespace
}  // namespace wavlm_fast
