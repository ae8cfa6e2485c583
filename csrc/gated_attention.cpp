#include "gated_attention_entry.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "check.h"
#include "dispatch.h"
#include "library.h"
#include "packed_frames.h"
#include "parallel.h"
#include "tile_unit.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(GatedAttentionKernels, gated_attention_kernels)

namespace {

// Tasks per thread, so that threads end together.
constexpr int64_t kTasksPerThread = 4;

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate, const Tensor& rel_bias,
           const std::optional<Tensor>& key_lengths, double dropout_p, const std::optional<Tensor>& seed,
           Sizes bounds) {
  ENTRY_CHECK(dtype_of(q) == kFloat || dtype_of(q) == kBFloat16, "gated_attention: expected float32 or bfloat16, got ",
              dtype_of(q));
  ENTRY_CHECK(q.dim() == 4 && q.size(3) > 0, "gated_attention: expected q of [B, T, H, D], got ", q.sizes());
  for (const Tensor* other : {&k, &v}) {
    ENTRY_CHECK(dtype_of(*other) == dtype_of(q) && other->sizes().equals(q.sizes()),
                "gated_attention: expected q, k and v alike, got ", dtype_of(q), " ", q.sizes(), " and ",
                dtype_of(*other), " ", other->sizes());
  }
  const int64_t B = q.size(0), T = q.size(1), H = q.size(2);
  ENTRY_CHECK(gate.sizes().equals({B, H, T}), "gated_attention: expected gate of [", B, ", ", H, ", ", T, "], got ",
              gate.sizes());
  if (bounds.empty()) {
    ENTRY_CHECK(rel_bias.sizes().equals({H, 2 * T - 1}), "gated_attention: expected rel_bias of [", H, ", ", 2 * T - 1,
                "], got ", rel_bias.sizes());
  } else {
    ENTRY_CHECK(B == 1 && bounds.back() == T && !key_lengths,
                "gated_attention: expected packed frames [1, N, H, D] and no lengths beside offsets, got ", q.sizes());
    ENTRY_CHECK(rel_bias.dim() == 2 && rel_bias.size(0) == H && rel_bias.size(1) % 2 == 1,
                "gated_attention: expected rel_bias of [", H, ", 2L - 1], got ", rel_bias.sizes());
  }
  check_lengths("gated_attention", key_lengths, B);
  ENTRY_CHECK(dropout_p >= 0.0 && dropout_p < 1.0 && (dropout_p == 0.0 || seed),
              "gated_attention: expected 0 <= dropout_p < 1, and a seed when it is not 0, got ", dropout_p);
}

Tensor with_frames_contiguous(const Tensor& x) { return x.stride(3) == 1 || x.size(3) == 1 ? x : contiguous_of(x); }

Dropout dropout_of(double p, const std::optional<Tensor>& seed) {
  if (p == 0.0) return {0, 0, 1.0f};
  ENTRY_CHECK(seed->numel() == 1, "a Tensor with ", seed->numel(), " elements cannot be converted to Scalar");
  int64_t value;
  TORCH_ERROR_CODE_CHECK(aoti_torch_item_int64(seed->get(), &value));
  return {static_cast<uint32_t>(p * (1 << 24)), static_cast<uint32_t>(value), static_cast<float>(1.0 / (1.0 - p))};
}

// The longest first; of equal ones the order stays.
std::vector<Utterance> utterances_of(const Tensor& q, Sizes bounds) {
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

// [H, 2L-1] -> [H, 2T-1 + queries], what the longest utterance of T frames has of it: of query i and key j at
// i - j + T - 1, so that a key's biases are a run of neighbours. The last vector of queries may end past T: zeros follow.
std::vector<float> centre_reversed(const Tensor& rel_bias, int64_t T, int64_t queries) {
  const int64_t H = rel_bias.size(0), all = rel_bias.size(1), longest = (all + 1) / 2, entries = 2 * T - 1;
  ENTRY_CHECK(T <= longest, "gated_attention: expected rel_bias for ", T,
              " frames, the longest utterance between offsets, got it for ", longest);
  const Tensor wide = contiguous_of(rel_bias, kFloat);
  std::vector<float> bias(H * (entries + queries));
  const float* from = data<float>(wide) + (longest - T);
  for (int64_t h = 0; h < H; ++h) {
    std::reverse_copy(from + h * all, from + h * all + entries, bias.begin() + h * (entries + queries));
  }
  return bias;
}

template <class Word>
void flip(void* numbers, int64_t count) {
  Word* words = static_cast<Word*>(numbers);
  for (int64_t i = 0; i < count; ++i) words[i] ^= Word{1} << (8 * sizeof(Word) - 1);
}

// q as the kernels want it for the scale's absolute value, by which they divide.
Tensor for_scale(const Tensor& q, double scale) {
  if (scale > 0) return with_frames_contiguous(q);
  if (scale == 0) return zeros(q, q.sizes(), dtype_of(q));
  const Tensor copy = copy_of(q, dtype_of(q));
  negate(copy);
  return copy;
}

}  // namespace

AttentionTensors::AttentionTensors(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate,
                                   const Tensor& rel_bias, const std::optional<Tensor>& key_lengths, double dropout_p,
                                   const std::optional<Tensor>& seed, double scale, Sizes bounds, int64_t queries) {
  check(q, k, v, gate, rel_bias, key_lengths, dropout_p, seed, bounds);
  utterances = utterances_of(q, bounds);
  this->q = for_scale(q, scale);
  this->scale = scale == 0 ? 1.0 : std::abs(scale);
  this->k = with_frames_contiguous(k), this->v = with_frames_contiguous(v);
  this->gate = contiguous_of(gate, kFloat);
  const int64_t T = bounds.empty() ? q.size(1) : longest();
  bias = centre_reversed(rel_bias, T, queries), bias_stride = 2 * T - 1 + queries;
  this->key_lengths = contiguous_of(key_lengths, ScalarType::Long);
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
  const int64_t threads = num_threads();
  const AttentionTasks tasks(utterances, call.H, kernels.queries, kTasksPerThread * threads, parts_of);
  for_each_task(tasks.count(), kernels.scratch_size(call.D), [&](int64_t i, float* memory) {
    const AttentionTask task = tasks[i];
    kernel(call, utterances[task.utterance], task.h, task.first_block, task.end_block, memory);
  });
}

template <class T>
void attend(const AttentionTensors& tensors, const Tensor& out, const Tensor& lse, GatedAttentionForward<T>* kernel) {
  GatedAttention<T> call;
  tensors.fill(call);
  call.out = mutable_data<T>(out), call.out_strides = AttentionTensors::strides(out);
  call.lse = mutable_data<float>(lse);
  run(call, tensors.utterances, kernel, gated_attention_kernels());
}

GatedAttentionForward<bf16>* forward_bf16() {
  const auto& kernels = gated_attention_kernels();
  switch (tiles(TileWork::attention)) {
    case Tiles::unit:
      return kernels.on_tiles;
    case Tiles::emulated:
      return kernels.on_emulated_tiles;
    default:
      return kernels.forward_bf16;
  }
}

}  // namespace

bool gated_attention_has_tiles() { return gated_attention_kernels().on_tiles; }

void negate(const Tensor& x) {
  dtype_of(x) == kFloat ? flip<uint32_t>(x.mutable_data_ptr(), x.numel())
                        : flip<uint16_t>(x.mutable_data_ptr(), x.numel());
}

Tensor gated_attention_into(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate,
                            const Tensor& rel_bias, const std::optional<Tensor>& key_lengths, double dropout_p,
                            const std::optional<Tensor>& seed, double scale, Sizes bounds) {
  const auto& kernels = gated_attention_kernels();
  const AttentionTensors tensors(q, k, v, gate, rel_bias, key_lengths, dropout_p, seed, scale, bounds, kernels.queries);
  const Tensor lse = fresh(q, gate.sizes(), kFloat);
  if (dtype_of(q) == kFloat) {
    attend(tensors, out, lse, kernels.forward_float);
  } else {
    attend(tensors, out, lse, forward_bf16());
  }
  return lse;
}

namespace {

std::tuple<Tensor, Tensor> gated_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate,
                                           const Tensor& rel_bias, const std::optional<Tensor>& key_lengths,
                                           double dropout_p, const std::optional<Tensor>& seed, double scale,
                                           const std::optional<Tensor>& offsets) {
  const auto bounds = bounds_of("gated_attention", offsets, q);
  const Tensor out = fresh_like(q);
  const Tensor lse = gated_attention_into(out, q, k, v, gate, rel_bias, key_lengths, dropout_p, seed, scale, bounds);
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) { m.impl("gated_attention", TORCH_BOX(&gated_attention)); }

}  // namespace
}  // namespace wavlm_fast
