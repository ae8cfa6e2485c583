#include "gated_attention_entry.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <tuple>

#include "check.h"
#include "dispatch.h"
#include "entries.h"
#include "integers.h"
#include "scratch.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(GatedAttentionKernels, gated_attention_kernels)

using at::Tensor;

namespace {

// Tasks per thread: utterances of a batch differ in length, so threads take tasks as they finish.
constexpr int64_t kTasksPerThread = 4;

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate, const Tensor& rel_bias,
           const std::optional<Tensor>& key_lengths, double dropout_p, const std::optional<Tensor>& seed) {
  TORCH_CHECK(q.scalar_type() == at::kFloat || q.scalar_type() == at::kBFloat16,
              "gated_attention: expected float32 or bfloat16, got ", q.scalar_type());
  TORCH_CHECK(q.dim() == 4 && q.size(3) > 0, "gated_attention: expected q of [B, T, H, D], got ", q.sizes());
  for (const Tensor* other : {&k, &v}) {
    TORCH_CHECK(other->scalar_type() == q.scalar_type() && other->sizes() == q.sizes(),
                "gated_attention: expected q, k and v alike, got ", q.scalar_type(), " ", q.sizes(), " and ",
                other->scalar_type(), " ", other->sizes());
  }
  const int64_t B = q.size(0), T = q.size(1), H = q.size(2);
  TORCH_CHECK(gate.sizes() == at::IntArrayRef({B, H, T}), "gated_attention: expected gate of [", B, ", ", H, ", ", T,
              "], got ", gate.sizes());
  TORCH_CHECK(rel_bias.sizes() == at::IntArrayRef({H, 2 * T - 1}), "gated_attention: expected rel_bias of [", H, ", ",
              2 * T - 1, "], got ", rel_bias.sizes());
  check_lengths("gated_attention", key_lengths, B);
  TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0 && (dropout_p == 0.0 || seed),
              "gated_attention: expected 0 <= dropout_p < 1, and a seed when it is not 0, got ", dropout_p);
}

Tensor with_frames_contiguous(const Tensor& x) { return x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous(); }

Dropout dropout_of(double p, const std::optional<Tensor>& seed) {
  if (p == 0.0) return {0, 0, 1.0f};
  const auto low = static_cast<uint32_t>(seed->item<int64_t>());
  return {static_cast<uint32_t>(p * (1 << 24)), low, static_cast<float>(1.0 / (1.0 - p))};
}

// [H, 2T-1] -> [H, 2T-1 + queries]: of query i and key j at i - j + T - 1, so that a key's biases are a run of
// neighbours. The last vector of queries may end past T: zeros follow.
Tensor reversed(const Tensor& rel_bias, int64_t queries) {
  const int64_t H = rel_bias.size(0), entries = rel_bias.size(1);
  const Tensor bias = at::empty({H, entries + queries}, rel_bias.options());
  const float* from = rel_bias.const_data_ptr<float>();
  float* to = bias.mutable_data_ptr<float>();
  for (int64_t h = 0; h < H; ++h, from += entries, to += entries + queries) {
    std::reverse_copy(from, from + entries, to);
    std::fill_n(to + entries, queries, 0.0f);
  }
  return bias;
}

}  // namespace

AttentionTensors::AttentionTensors(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate,
                                   const Tensor& rel_bias, const std::optional<Tensor>& key_lengths,
                                   double dropout_p, const std::optional<Tensor>& seed, double scale,
                                   int64_t queries) {
  check(q, k, v, gate, rel_bias, key_lengths, dropout_p, seed);
  // The kernels divide by the scale.
  this->q = with_frames_contiguous(scale > 0 ? q : scale < 0 ? q.neg() : at::zeros_like(q));
  this->scale = scale == 0 ? 1.0 : std::abs(scale);
  this->k = with_frames_contiguous(k), this->v = with_frames_contiguous(v);
  this->gate = gate.to(at::kFloat).contiguous();
  bias = reversed(rel_bias.to(at::kFloat).contiguous(), queries);
  if (key_lengths) this->key_lengths = key_lengths->to(at::kLong).contiguous();
  dropout = dropout_of(dropout_p, seed);
}

namespace {

// As many query blocks per task as share a copied tile of keys well, fewer when threads would go without work.
int64_t blocks_per_task(int64_t blocks, int64_t pairs, const GatedAttentionKernels& kernels) {
  const int64_t wanted = kTasksPerThread * at::get_num_threads();
  const int64_t least = divided_up(blocks, kernels.most_blocks);
  const int64_t tasks = std::max(divided_up(wanted, pairs), least);
  return divided_up(blocks, tasks);
}

template <class T>
void run(const GatedAttention<T>& call, GatedAttentionForward<T>* kernel, const GatedAttentionKernels& kernels) {
  const int64_t blocks = divided_up(call.T_, kernels.queries), pairs = call.B * call.H;
  if (blocks == 0 || pairs == 0) return;
  const int64_t step = blocks_per_task(blocks, pairs, kernels);
  const int64_t per_pair = divided_up(blocks, step), tasks = pairs * per_pair;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    float* memory = static_cast<float*>(scratch<Scratch::task>(kernels.scratch_size(call.D) * sizeof(float)));
    for (int64_t task = next++; task < tasks; task = next++) {
      const int64_t pair = task / per_pair, first = task % per_pair * step;
      kernel(call, pair / call.H, pair % call.H, first, std::min(first + step, blocks), memory);
    }
  });
}

template <class T>
void attend(const AttentionTensors& tensors, const Tensor& out, const Tensor& lse, GatedAttentionForward<T>* kernel) {
  GatedAttention<T> call;
  tensors.fill(call);
  call.out = static_cast<T*>(out.mutable_data_ptr()), call.out_strides = AttentionTensors::strides(out);
  call.lse = lse.mutable_data_ptr<float>();
  run(call, kernel, gated_attention_kernels());
}

}  // namespace

Tensor gated_attention_into(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate,
                            const Tensor& rel_bias, const std::optional<Tensor>& key_lengths, double dropout_p,
                            const std::optional<Tensor>& seed, double scale) {
  const auto& kernels = gated_attention_kernels();
  const AttentionTensors tensors(q, k, v, gate, rel_bias, key_lengths, dropout_p, seed, scale, kernels.queries);
  const Tensor lse = at::empty(gate.sizes(), q.options().dtype(at::kFloat));
  if (q.scalar_type() == at::kFloat) {
    attend(tensors, out, lse, kernels.forward_float);
  } else {
    attend(tensors, out, lse, kernels.forward_bf16);
  }
  return lse;
}

namespace {

std::tuple<Tensor, Tensor> gated_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate,
                                           const Tensor& rel_bias, const std::optional<Tensor>& key_lengths,
                                           double dropout_p, const std::optional<Tensor>& seed, double scale) {
  const Tensor out = at::empty(q.sizes(), q.options());
  const Tensor lse = gated_attention_into(out, q, k, v, gate, rel_bias, key_lengths, dropout_p, seed, scale);
  return {out, lse};
}

TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) { m.impl("gated_attention", &gated_attention); }

}  // namespace
}  // namespace wavlm_fast
