#include "gated_attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <tuple>

#include "dispatch.h"
#include "entries.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(GatedAttentionKernels, gated_attention_kernels)

namespace {

using at::Tensor;

// Tasks per thread: utterances of a batch differ in length, so threads take tasks as they finish.
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kAlignment = 64;

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
  TORCH_CHECK(!key_lengths || key_lengths->sizes() == at::IntArrayRef({B}),
              "gated_attention: expected key_lengths of [", B, "]");
  TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0 && (dropout_p == 0.0 || seed),
              "gated_attention: expected 0 <= dropout_p < 1, and a seed when it is not 0, got ", dropout_p);
}

Tensor with_frames_contiguous(const Tensor& x) { return x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous(); }

Dropout dropout(double p, const std::optional<Tensor>& seed) {
  if (p == 0.0) return {0, 0, 1.0f};
  const auto low = static_cast<uint32_t>(seed->item<int64_t>());
  return {static_cast<uint32_t>(p * (1 << 24)), low, static_cast<float>(1.0 / (1.0 - p))};
}

FrameStrides strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

template <class T>
GatedAttention<T> call_on(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate,
                          const Tensor& rel_bias, const Tensor& key_lengths, const Dropout& dropout, double scale,
                          const Tensor& out, const Tensor& lse) {
  GatedAttention<T> call;
  call.q = static_cast<const T*>(q.const_data_ptr());
  call.k = static_cast<const T*>(k.const_data_ptr());
  call.v = static_cast<const T*>(v.const_data_ptr());
  call.q_strides = strides(q), call.k_strides = strides(k), call.v_strides = strides(v);
  call.gate = gate.const_data_ptr<float>();
  call.rel_bias = rel_bias.const_data_ptr<float>();
  call.key_lengths = key_lengths.defined() ? key_lengths.const_data_ptr<int64_t>() : nullptr;
  call.out = static_cast<T*>(out.mutable_data_ptr());
  call.lse = lse.mutable_data_ptr<float>();
  call.B = q.size(0), call.T_ = q.size(1), call.H = q.size(2), call.D = q.size(3);
  call.scale = static_cast<float>(scale);
  call.dropout = dropout;
  return call;
}

// As many query blocks per task as share a packed tile of keys well, fewer when threads would go without work.
int64_t blocks_per_task(int64_t blocks, int64_t pairs, const GatedAttentionKernels& kernels) {
  const int64_t wanted = kTasksPerThread * at::get_num_threads();
  const int64_t least = (blocks + kernels.most_blocks - 1) / kernels.most_blocks;
  const int64_t tasks = std::max((wanted + pairs - 1) / pairs, least);
  return (blocks + tasks - 1) / tasks;
}

template <class T>
void run(const GatedAttention<T>& call, GatedAttentionForward<T>* kernel, const GatedAttentionKernels& kernels) {
  const int64_t blocks = (call.T_ + kernels.queries - 1) / kernels.queries, pairs = call.B * call.H;
  if (blocks == 0 || pairs == 0) return;
  const int64_t queries = blocks_per_task(blocks, pairs, kernels) * kernels.queries;
  const int64_t per_pair = (call.T_ + queries - 1) / queries, tasks = pairs * per_pair;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    const int64_t size = kernels.scratch_size(call.D) * sizeof(float);
    const Tensor memory = at::empty({size + kAlignment}, at::kByte);
    const auto at = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
    float* scratch = reinterpret_cast<float*>((at + kAlignment - 1) / kAlignment * kAlignment);
    for (int64_t task = next++; task < tasks; task = next++) {
      const int64_t pair = task / per_pair, first = task % per_pair * queries;
      kernel(call, pair / call.H, pair % call.H, first, std::min(queries, call.T_ - first), scratch);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> gated_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate,
                                           const Tensor& rel_bias, const std::optional<Tensor>& key_lengths,
                                           double dropout_p, const std::optional<Tensor>& seed, double scale) {
  check(q, k, v, gate, rel_bias, key_lengths, dropout_p, seed);
  const Tensor q_ = with_frames_contiguous(q), k_ = with_frames_contiguous(k), v_ = with_frames_contiguous(v);
  const Tensor gate_ = gate.to(at::kFloat).contiguous(), bias_ = rel_bias.to(at::kFloat).contiguous();
  const Tensor lengths = key_lengths ? key_lengths->to(at::kLong).contiguous() : Tensor();
  const Tensor out = at::empty(q.sizes(), q.options());
  const Tensor lse = at::empty(gate.sizes(), q.options().dtype(at::kFloat));
  const Dropout dropped = dropout(dropout_p, seed);
  const auto& kernels = gated_attention_kernels();
  if (q.scalar_type() == at::kFloat) {
    run(call_on<float>(q_, k_, v_, gate_, bias_, lengths, dropped, scale, out, lse), kernels.forward_float, kernels);
  } else {
    run(call_on<bf16>(q_, k_, v_, gate_, bias_, lengths, dropped, scale, out, lse), kernels.forward_bf16, kernels);
  }
  return {out, lse};
}

namespace {

TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) { m.impl("gated_attention", &gated_attention); }

}  // namespace
}  // namespace wavlm_fast
