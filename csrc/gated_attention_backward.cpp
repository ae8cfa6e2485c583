
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

// An utterance and head is one task where there are enough of them, and so many ranges of query blocks where not. The
// number of threads has no say: it would change the order of sums.
constexpr int64_t kLeastTasks = 24;
constexpr int64_t kLeastBlocks = 4;  // of a task: it copies all keys and values
// A thread keeps no more than that from call to call.
constexpr int64_t kMostKept = 1 << 22;

// Where the sums of the tasks of each utterance are, all in one piece of memory.
struct Sums {
  std::vector<int64_t> first, size;  // floats: before the utterance, and of each of its tasks
  int64_t total = 0;

  template <class SizeOf>
  Sums(const AttentionTasks& tasks, int64_t H, const SizeOf& size_of) {
    for (int64_t u = 0; u < tasks.utterances(); ++u) {
      first.push_back(total), size.push_back(size_of(u));
      total += H * tasks.parts(u) * size[u];
    }
  }

  // The sums of a part of an utterance and head. Its other parts follow.
  int64_t at(const AttentionTasks& tasks, int64_t u, int64_t h, int64_t part) const {
    return first[u] + (h * tasks.parts(u) + part) * size[u];
  }
};

// The diagonals' sums of all tasks, with room on both sides, around the centre of [H, 2L-1], in one fixed order.
void add_up_bias(const float* memory, const Sums& sums, const AttentionTasks& tasks, int64_t queries,
                 const Tensor& drel_bias) {
  const int64_t H = drel_bias.size(0), entries = drel_bias.size(1);
  float* out = mutable_data<float>(drel_bias);
  parallel_for(0, H, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> total(entries);
    for (int64_t h = begin; h < end; ++h) {
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t u = 0; u < tasks.utterances(); ++u) {
        const int64_t own = sums.size[u] - 2 * queries;
        double* to = total.data() + (entries - own) / 2;
        for (int64_t part = 0; part < tasks.parts(u); ++part) {
          const float* from = memory + sums.at(tasks, u, h, part) + queries;
          for (int64_t x = 0; x < own; ++x) to[x] += from[x];
        }
      }
      std::reverse_copy(total.begin(), total.end(), out + h * entries);
    }
  });
}

template <class T>
void run(const GatedAttentionBackward<T>& call, const std::vector<Utterance>& utterances, const Tensor& drel_bias,
         GatedAttentionBackwardBlocks<T>* of_blocks, GatedAttentionBackwardKeys<T>* of_keys,
         const GatedAttentionBackwardKernels& kernels) {
  const AttentionTasks tasks(utterances, call.H, kernels.queries, kLeastTasks, [](int64_t blocks, int64_t parts) {
    return std::clamp<int64_t>(parts, 1, std::max<int64_t>(blocks / kLeastBlocks, 1));
  });
  // Of an utterance in one part a task's sums are those of its keys.
  const auto whole = [&](int64_t u) { return tasks.parts(u) == 1; };
  const auto sums_size = [&](int64_t u) { return static_cast<int64_t>(kernels.sums_size(utterances[u].T, call.D)); };
  const auto bias_size = [&](int64_t u) { return 2 * utterances[u].T - 1 + 2 * kernels.queries; };
  const Sums of_bias(tasks, call.H, bias_size);
  const Sums of_parts(tasks, call.H, [&](int64_t u) { return whole(u) ? 0 : sums_size(u); });
  const int64_t n_scratch = kernels.scratch_size(call.longest, call.D);
  int64_t n_whole = 0, cut = 0;  // utterances up to the last that is in parts
  for (int64_t u = 0; u < tasks.utterances(); ++u) {
    if (whole(u))
      n_whole = std::max(n_whole, sums_size(u));
    else
      cut = u + 1;
  }
  const Tensor all = fresh(drel_bias, {of_bias.total + of_parts.total}, kFloat);
  float *bias_sums = mutable_data<float>(all), *sums = bias_sums + of_bias.total;
  const auto of_task = [&](int64_t i, float* memory) {
    const auto [u, h, part, first_block, end_block] = tasks[i];
    float* own = whole(u) ? memory + n_scratch : sums + of_parts.at(tasks, u, h, part);
    float* bias = bias_sums + of_bias.at(tasks, u, h, part) + kernels.queries;
    of_blocks(call, utterances[u], h, first_block, end_block, own, bias, memory);
    if (whole(u)) of_keys(call, utterances[u], h, own, 1);
  };
  for_each_task(tasks.count(), n_scratch + n_whole, of_task, kMostKept);
  parallel_for(0, cut * call.H, 1, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t u = pair / call.H, h = pair % call.H;
      if (whole(u)) continue;
      const float* own = sums + of_parts.at(tasks, u, h, 0);
      of_keys(call, utterances[u], h, own, tasks.parts(u));
    }
  });
  if (drel_bias.numel()) add_up_bias(bias_sums, of_bias, tasks, kernels.queries, drel_bias);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
void differentiate(const AttentionTensors& tensors, const Tensor& grad, const Tensor& lse, const Gradients& gradients,
                   GatedAttentionBackwardBlocks<T>* of_blocks, GatedAttentionBackwardKeys<T>* of_keys) {
  const auto& [dq, dk, dv, dgate, drel_bias] = gradients;
  GatedAttentionBackward<T> call;
  tensors.fill(call);
  call.grad = data<T>(grad);
  call.lse = data<float>(lse);
  call.dq = mutable_data<T>(dq), call.dk = mutable_data<T>(dk), call.dv = mutable_data<T>(dv);
  call.dgate = mutable_data<float>(dgate);
  run(call, tensors.utterances, drel_bias, of_blocks, of_keys, gated_attention_backward_kernels());
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
    differentiate(tensors, grad_, lse_, gradients, kernels.blocks_float, kernels.keys_float);
  } else {
    differentiate(tensors, grad_, lse_, gradients, kernels.blocks_bf16, kernels.keys_bf16);
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
