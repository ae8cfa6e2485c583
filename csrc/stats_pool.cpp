#include "stats_pool.h"

#include <algorithm>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "integers.h"
#include "library.h"
#include "packed_frames.h"
#include "parallel.h"
#include "scratch.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(StatsPoolKernels, stats_pool_kernels)

namespace {

void check(const char* op, const Tensor& x, const std::optional<Tensor>& lengths) {
  ENTRY_CHECK(dtype_of(x) == kFloat || dtype_of(x) == kBFloat16, op, ": expected float32 or bfloat16, got ",
              dtype_of(x));
  ENTRY_CHECK(x.dim() == 3, op, ": expected x of [B, T, C], got ", x.sizes());
  check_lengths(op, lengths, x.size(0));
}

// Where the utterances of x [B, T, C] or [1, N, C] begin, as frames one behind the other.
struct Utterances {
  std::vector<int64_t> bounds;  // of packed frames; empty where every utterance has `frames`
  int64_t count, frames;

  Utterances(const char* op, const Tensor& x, const std::optional<Tensor>& lengths,
             const std::optional<Tensor>& offsets) {
    check(op, x, lengths);
    ENTRY_CHECK(!lengths || !offsets, op, ": expected lengths or offsets, got both");
    bounds = bounds_of(op, offsets, x);
    count = bounds.empty() ? x.size(0) : bounds.size() - 1;
    frames = x.size(1);
  }

  int64_t first(int64_t b) const { return bounds.empty() ? b * frames : bounds[b]; }
  int64_t frames_of(int64_t b) const { return first(b + 1) - first(b); }
};

// body(columns, b, first channel, work) for every block of channels of every utterance. Each thread has blocks that
// follow each other, of about as many frames as the others' (one more each: an utterance may have none): to share an
// utterance's frames between threads block by block takes twice as long.
template <class T, class Body>
void for_blocks(const Tensor& x, const Utterances& utterances, const std::optional<Tensor>& lengths, const Body& body) {
  const int64_t B = utterances.count, C = x.size(2), blocks = divided_up(C, kPoolChannels);
  const T* from = data<T>(x);
  const int64_t* valid = data<int64_t>(lengths);
  parallel_for(0, (utterances.first(B) + B) * blocks, 1, [&](int64_t begin, int64_t end) {
    const Memory memory(Scratch::task, sizeof(PoolWork));
    auto& work = *memory.as<PoolWork>();
    for (int64_t task = 0; task < B * blocks; ++task) {
      const int64_t b = task / blocks, block = task % blocks, c = block * kPoolChannels;
      const int64_t frames = utterances.frames_of(b);
      const int64_t place = (utterances.first(b) + b) * blocks + block * (frames + 1);
      if (place < begin || place >= end) continue;
      const int64_t length = valid ? valid[b] : frames;
      const T* first = from + utterances.first(b) * C + c;
      // A length out of range is the caller's mistake, but no reason to read what is not there.
      body(PoolColumns<T>{first, C, std::clamp<int64_t>(length, 0, frames), std::min(kPoolChannels, C - c)}, b, c,
           work);
    }
  });
}

template <class T>
void run_forward(StatsPoolForward<T>* kernel, const Tensor& x, const Utterances& utterances,
                 const std::optional<Tensor>& lengths, const Tensor& out) {
  const int64_t C = x.size(2);
  T* to = mutable_data<T>(out);
  for_blocks<T>(x, utterances, lengths, [&](const PoolColumns<T>& columns, int64_t b, int64_t c, PoolWork& work) {
    T* mean = to + b * 2 * C + c;
    kernel(columns, work, mean, mean + C);
  });
}

template <class T>
void run_backward(StatsPoolBackward<T>* kernel, const Tensor& grad, const Tensor& x, const Utterances& utterances,
                  const std::optional<Tensor>& lengths, const Tensor& dx) {
  const int64_t C = x.size(2);
  const T* from = data<T>(grad);
  T* to = mutable_data<T>(dx);
  for_blocks<T>(x, utterances, lengths, [&](const PoolColumns<T>& columns, int64_t b, int64_t c, PoolWork& work) {
    const T* grad_mean = from + b * 2 * C + c;
    kernel(columns, work, grad_mean, grad_mean + C, utterances.frames_of(b), to + utterances.first(b) * C + c);
  });
}

Tensor stats_pool(const Tensor& x, const std::optional<Tensor>& lengths, const std::optional<Tensor>& offsets) {
  const Utterances utterances("stats_pool", x, lengths, offsets);
  const Tensor x_ = contiguous_of(x);
  const auto lengths_ = contiguous_of(lengths, ScalarType::Long);
  const Tensor out = fresh(x, {utterances.count, 2 * x.size(2)});
  const auto& kernels = stats_pool_kernels();
  if (dtype_of(x) == kFloat) {
    run_forward<float>(kernels.forward_float, x_, utterances, lengths_, out);
  } else {
    run_forward<bf16>(kernels.forward_bf16, x_, utterances, lengths_, out);
  }
  return out;
}

// The deviation is computed again: `out` has it rounded to the dtype of x.
Tensor stats_pool_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& lengths,
                           const Tensor& /*out*/, const std::optional<Tensor>& offsets) {
  const Utterances utterances("stats_pool_backward", x, lengths, offsets);
  const int64_t B = utterances.count;
  ENTRY_CHECK(dtype_of(grad) == dtype_of(x) && grad.sizes().equals({B, 2 * x.size(2)}),
              "stats_pool_backward: expected grad of ", dtype_of(x), " [", B, ", ", 2 * x.size(2), "], got ",
              dtype_of(grad), " ", grad.sizes());
  const Tensor grad_ = contiguous_of(grad), x_ = contiguous_of(x);
  const auto lengths_ = contiguous_of(lengths, ScalarType::Long);
  const Tensor dx = fresh_like(x_);
  const auto& kernels = stats_pool_kernels();
  if (dtype_of(x) == kFloat) {
    run_backward<float>(kernels.backward_float, grad_, x_, utterances, lengths_, dx);
  } else {
    run_backward<bf16>(kernels.backward_bf16, grad_, x_, utterances, lengths_, dx);
  }
  return dx;
}

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) {
  m.impl("stats_pool", TORCH_BOX(&stats_pool));
  m.impl("stats_pool_backward", TORCH_BOX(&stats_pool_backward));
}

}  // namespace
}  // namespace wavlm_fast
