#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "gated_attention_entry.h"
#include "integers.h"
#include "scratch.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(GatedAttentionBackwardKernels, gated_attention_backward_kernels)

namespace {

using at::Tensor;

// An utterance and head is one task where there are enough of them, and so many ranges of query blocks where not. The
// number of threads has no say: it would change the order of sums.
constexpr int64_t kLeastTasks = 24;
constexpr int64_t kLeastBlocks = 4;  // of a task: it copies all keys and values
// A thread keeps no more than that from call to call.
constexpr int64_t kMostKept = 1 << 22;

struct Tasks {
  int64_t blocks, parts, pairs;

  Tasks(int64_t B, int64_t T, int64_t H, int64_t queries) : blocks(divided_up(T, queries)), pairs(B * H) {
    const int64_t wanted = divided_up(kLeastTasks, std::max<int64_t>(pairs, 1));
    parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(blocks / kLeastBlocks, 1));
  }

  int64_t first_block(int64_t part) const { return part * blocks / parts; }
};

// The diagonals' sums of all tasks, [pairs * parts, 2T-1] with room on both sides -> [H, 2T-1], in one fixed order.
void add_up_bias(const Tensor& sums, const Tasks& tasks, int64_t B, int64_t queries, const Tensor& drel_bias) {
  const int64_t H = drel_bias.size(0), entries = drel_bias.size(1);
  at::parallel_for(0, H, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> total(entries);
    for (int64_t h = begin; h < end; ++h) {
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t task = 0; task < B * tasks.parts; ++task) {
        const int64_t row = (task / tasks.parts * H + h) * tasks.parts + task % tasks.parts;
        const float* from = sums.const_data_ptr<float>() + row * sums.size(1) + queries;
        for (int64_t x = 0; x < entries; ++x) total[x] += from[x];
      }
      std::reverse_copy(total.begin(), total.end(), drel_bias.mutable_data_ptr<float>() + h * entries);
    }
  });
}

template <class T>
void run(const GatedAttentionBackward<T>& call, const Tensor& drel_bias, GatedAttentionBackwardBlocks<T>* of_blocks,
         GatedAttentionBackwardKeys<T>* of_keys, const GatedAttentionBackwardKernels& kernels) {
  const Tasks tasks(call.B, call.T_, call.H, kernels.queries);
  const int64_t n_tasks = tasks.pairs * tasks.parts, n_sums = kernels.sums_size(call.T_, call.D);
  const int64_t n_scratch = kernels.scratch_size(call.T_, call.D), n_bias = 2 * call.T_ - 1 + 2 * kernels.queries;
  const bool whole = tasks.parts == 1;  // a task's sums are those of its keys
  const Tensor bias_sums = at::empty({n_tasks, n_bias}, at::kFloat);
  const Tensor sums = at::empty({whole ? 0 : n_tasks * n_sums}, at::kFloat);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(n_tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    const int64_t bytes = (n_scratch + (whole ? n_sums : 0)) * sizeof(float);
    const Tensor large = at::empty({bytes > kMostKept ? bytes : 0}, at::kByte);
    float* memory = static_cast<float*>(bytes > kMostKept ? large.mutable_data_ptr() : scratch<Scratch::task>(bytes));
    for (int64_t task = next++; task < n_tasks; task = next++) {
      const int64_t pair = task / tasks.parts, part = task % tasks.parts, b = pair / call.H, h = pair % call.H;
      float* own = whole ? memory + n_scratch : sums.mutable_data_ptr<float>() + task * n_sums;
      float* bias = bias_sums.mutable_data_ptr<float>() + task * n_bias + kernels.queries;
      of_blocks(call, b, h, tasks.first_block(part), tasks.first_block(part + 1), own, bias, memory);
      if (whole) of_keys(call, b, h, own, 1);
    }
  });
  if (!whole) {
    at::parallel_for(0, tasks.pairs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        const float* own = sums.const_data_ptr<float>() + pair * tasks.parts * n_sums;
        of_keys(call, pair / call.H, pair % call.H, own, tasks.parts);
      }
    });
  }
  add_up_bias(bias_sums, tasks, call.B, kernels.queries, drel_bias);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
void differentiate(const AttentionTensors& tensors, const Tensor& grad, const Tensor& lse, const Gradients& gradients,
                   GatedAttentionBackwardBlocks<T>* of_blocks, GatedAttentionBackwardKeys<T>* of_keys) {
  const auto& [dq, dk, dv, dgate, drel_bias] = gradients;
  GatedAttentionBackward<T> call;
  tensors.fill(call);
  call.grad = static_cast<const T*>(grad.const_data_ptr());
  call.lse = lse.const_data_ptr<float>();
  call.dq = static_cast<T*>(dq.mutable_data_ptr());
  call.dk = static_cast<T*>(dk.mutable_data_ptr());
  call.dv = static_cast<T*>(dv.mutable_data_ptr());
  call.dgate = dgate.mutable_data_ptr<float>();
  run(call, drel_bias, of_blocks, of_keys, gated_attention_backward_kernels());
}

Gradients gated_attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& gate, const Tensor& rel_bias,
                                   const std::optional<Tensor>& key_lengths, const Tensor& out, const Tensor& lse,
                                   double dropout_p, const std::optional<Tensor>& seed, double scale) {
  const auto& kernels = gated_attention_backward_kernels();
  const AttentionTensors tensors(q, k, v, gate, rel_bias, key_lengths, dropout_p, seed, scale, kernels.queries);
  TORCH_CHECK(grad.scalar_type() == q.scalar_type() && grad.sizes() == q.sizes(),
              "gated_attention_backward: expected a gradient like q, got ", grad.scalar_type(), " ", grad.sizes());
  TORCH_CHECK(lse.scalar_type() == at::kFloat && lse.sizes() == gate.sizes(),
              "gated_attention_backward: expected a float32 lse of ", gate.sizes(), ", got ", lse.scalar_type(), " ",
              lse.sizes());
  const Tensor grad_ = grad.contiguous(), lse_ = lse.contiguous();
  const auto empty = [](const Tensor& x) { return at::empty(x.sizes(), x.options()); };
  const Gradients gradients = {empty(q), empty(k), empty(v), empty(lse), empty(rel_bias)};
  if (q.scalar_type() == at::kFloat) {
    differentiate(tensors, grad_, lse_, gradients, kernels.blocks_float, kernels.keys_float);
  } else {
    differentiate(tensors, grad_, lse_, gradients, kernels.blocks_bf16, kernels.keys_bf16);
  }
  // The kernels saw the scale's absolute value.
  if (scale < 0) std::get<0>(gradients).neg_();
  if (scale == 0) std::get<0>(gradients).zero_();
  return gradients;
}

TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) { m.impl("gated_attention_backward", &gated_attention_backward); }

}  // namespace
}  // namespace wavlm_fast
