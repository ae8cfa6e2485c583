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
#include "packed_frames.h"
#include "scratch.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(GatedAttentionKernels, gated_attention_kernels)

using at::Tensor;

namespace {

// Tasks per thread, so that threads end together.
constexpr int64_t kTasksPerThread = 4;

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate, const Tensor& rel_bias,
           const std::optional<Tensor>& key_lengths, double dropout_p, const std::optional<Tensor>& seed,
           at::ArrayRef<int64_t> bounds) {
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
  if (bounds.empty()) {
    TORCH_CHECK(rel_bias.sizes() == at::IntArrayRef({H, 2 * T - 1}), "gated_attention: expected rel_bias of [", H, ", ",
                2 * T - 1, "], got ", rel_bias.sizes());
  } else {
    TORCH_CHECK(B == 1 && bounds.back() == T && !key_lengths,
                "gated_attention: expected packed frames [1, N, H, D] and no lengths beside offsets, got ", q.sizes());
    TORCH_CHECK(rel_bias.dim() == 2 && rel_bias.size(0) == H && rel_bias.size(1) % 2 == 1,
                "gated_attention: expected rel_bias of [", H, ", 2L - 1], got ", rel_bias.sizes());
  }
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

// The longest first; of equal ones the order stays.
std::vector<Utterance> utterances_of(const Tensor& q, at::ArrayRef<int64_t> bounds) {
  std::vector<Utterance> utterances;
  utterances.reserve(bounds.empty() ? q.size(0) : bounds.size());
  if (bounds.empty()) {
    for (int64_t b = 0; b < q.size(0); ++b) utterances.push_back({b, 0, q.size(1)});
    return utterances;
  }
  for (std::size_t b = 1; b < bounds.size(); ++b) utterances.push_back({0, bounds[b - 1], bounds[b] - bounds[b - 1]});
  std::stable_sort(utterances.begin(), utterances.end(), [](const auto& a, const auto& b) { return a.T > b.T; });
  return utterances;
}

// [H, 2L-1] -> [H, 2T-1], what the longest utterance has of it.
Tensor centre(const Tensor& rel_bias, int64_t T) {
  const int64_t longest = (rel_bias.size(1) + 1) / 2;
  TORCH_CHECK(T <= longest, "gated_attention: expected rel_bias for ", T,
              " frames, the longest utterance between offsets, got it for ", longest);
  return rel_bias.narrow(1, longest - T, 2 * T - 1);
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
                                   at::ArrayRef<int64_t> bounds, int64_t queries) {
  check(q, k, v, gate, rel_bias, key_lengths, dropout_p, seed, bounds);
  utterances = utterances_of(q, bounds);
  // The kernels divide by the scale.
  this->q = with_frames_contiguous(scale > 0 ? q : scale < 0 ? q.neg() : at::zeros_like(q));
  this->scale = scale == 0 ? 1.0 : std::abs(scale);
  this->k = with_frames_contiguous(k), this->v = with_frames_contiguous(v);
  this->gate = gate.to(at::kFloat).contiguous();
  const Tensor own_bias = bounds.empty() ? rel_bias : centre(rel_bias, longest());
  bias = reversed(own_bias.to(at::kFloat).contiguous(), queries);
  if (key_lengths) this->key_lengths = key_lengths->to(at::kLong).contiguous();
  dropout = dropout_of(dropout_p, seed);
}

namespace {

template <class T>
void run(const GatedAttention<T>& call, const std::vector<Utterance>& utterances, GatedAttentionForward<T>* kernel,
         const GatedAttentionKernels& kernels) {
  // As many query blocks per task as share a copied tile of keys well, fewer when threads would go without work.
  const auto parts_of = [&](int64_t blocks, int64_t parts) {
    return divided_up(blocks, divided_up(blocks, std::max(parts, divided_up(blocks, kernels.most_blocks))));
  };
  const int64_t threads = at::get_num_threads();
  const AttentionTasks tasks(utterances, call.H, kernels.queries, kTasksPerThread * threads, parts_of);
  if (tasks.count() == 0) return;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(tasks.count(), threads), 1, [&](int64_t, int64_t) {
    float* memory = static_cast<float*>(scratch<Scratch::task>(kernels.scratch_size(call.D) * sizeof(float)));
    for (int64_t i = next++; i < tasks.count(); i = next++) {
      const AttentionTask task = tasks[i];
      kernel(call, utterances[task.utterance], task.h, task.first_block, task.end_block, memory);
    }
  });
}

template <class T>
void attend(const AttentionTensors& tensors, const Tensor& out, const Tensor& lse, GatedAttentionForward<T>* kernel) {
  GatedAttention<T> call;
  tensors.fill(call);
  call.out = static_cast<T*>(out.mutable_data_ptr()), call.out_strides = AttentionTensors::strides(out);
  call.lse = lse.mutable_data_ptr<float>();
  run(call, tensors.utterances, kernel, gated_attention_kernels());
}

}  // namespace

Tensor gated_attention_into(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate,
                            const Tensor& rel_bias, const std::optional<Tensor>& key_lengths, double dropout_p,
                            const std::optional<Tensor>& seed, double scale, at::ArrayRef<int64_t> bounds) {
  const auto& kernels = gated_attention_kernels();
  const AttentionTensors tensors(q, k, v, gate, rel_bias, key_lengths, dropout_p, seed, scale, bounds,
                                 kernels.queries);
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
                                           double dropout_p, const std::optional<Tensor>& seed, double scale,
                                           const std::optional<Tensor>& offsets) {
  const auto bounds = bounds_of("gated_attention", offsets, q);
  const Tensor out = at::empty(q.sizes(), q.options());
  const Tensor lse = gated_attention_into(out, q, k, v, gate, rel_bias, key_lengths, dropout_p, seed, scale, bounds);
  return {out, lse};
}

TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) { m.impl("gated_attention", &gated_attention); }

}  // namespace
}  // namespace wavlm_fast
