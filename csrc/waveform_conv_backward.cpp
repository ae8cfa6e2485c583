// Gradients of the first convolution with its group norm. Of the frames' gradients only sums are needed: with g the
// gradient of the norm's output, of g, of g times the window, and of g times the normed output. How the norm's
// statistics depend on weights and waveform follows from the mean and the covariance of the windows.
#include "waveform_conv_backward.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "integers.h"
#include "library.h"
#include "packed_conv_entry.h"
#include "parallel.h"
#include "parts.h"
#include "resized_frames.h"
#include "scratch.h"
#include "waveform_conv_entry.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(WaveformBackwardKernels, waveform_backward_kernels)

namespace {

// Frames are summed in parts of this many, whatever the number of threads: the result does not depend on it.
constexpr int64_t kPart = 4096;
// Frames of a task, so few that threads end together on a second of samples.
constexpr int64_t kSpreadFrames = 128;

template <class T>
CollectGradient<T>* collect_kernel();
template <>
CollectGradient<float>* collect_kernel() {
  return waveform_backward_kernels().collect_float;
}
template <>
CollectGradient<bf16>* collect_kernel() {
  return waveform_backward_kernels().collect_bf16;
}

template <class T>
SpreadGradient<T>* spread_kernel();
template <>
SpreadGradient<float>* spread_kernel() {
  return waveform_backward_kernels().spread_float;
}
template <>
SpreadGradient<bf16>* spread_kernel() {
  return waveform_backward_kernels().spread_bf16;
}

// Rows of the gradient op's work, C numbers each.
enum Row { kShift, kRstd, kNormWeight, kNormBias, kMean, kMeanNormed, kRows };

// Sums over frames, [K + 2, C], as the kernel has them.
template <class T>
std::vector<double> collect(const WaveformGradient<T>& call, int64_t frames) {
  const int64_t parts = divided_up(frames, kPart), C = call.C, lanes = waveform_backward_kernels().lanes;
  const int64_t size = (call.K + 2) * C, vectors = C / lanes;
  std::vector<float> partial(parts * size);
  parallel_for(0, parts * vectors, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / vectors, c = task % vectors * lanes, first = part * kPart;
      float* sums = partial.data() + part * size;
      collect_kernel<T>()(call, first, std::min(kPart, frames - first), c, c + lanes, sums);
    }
  });
  return total_of<double>(partial, size);
}

// Samples of one utterance, each by the task that owns it: frames at a task's edge are computed twice.
template <class T>
void spread(const WaveformGradient<T>& call, int64_t frames, int64_t samples, float* dx) {
  const int64_t K = call.K, stride = call.stride, before = (K - 1) / stride;
  std::fill(dx, dx + samples, 0.0f);
  parallel_for(0, divided_up(samples, kSpreadFrames * stride), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t own = task * kSpreadFrames, first = std::max<int64_t>(0, own - before);
      const int64_t last = std::min(frames, own + kSpreadFrames);
      const int64_t from = own * stride, to = std::min(samples, (own + kSpreadFrames) * stride);
      if (first >= last) continue;
      const Memory memory(Scratch::task, (last - first) * K * sizeof(float));
      float* windows = memory.as<float>();
      spread_kernel<T>()(call, first, last - first, windows);
      for (int64_t t = first; t < last; ++t) {
        for (int64_t k = 0; k < K; ++k) {
          const int64_t s = t * stride + k;
          if (s >= from && s < to) dx[s] += windows[(t - first) * K + k];
        }
      }
    }
  });
}

struct Gradients {
  Tensor waveform;
  std::vector<double> weight, norm_weight, norm_bias;
};

template <class OfChannel>
void for_channels(int64_t channels, const OfChannel& of_channel) {
  parallel_for(0, channels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) of_channel(c);
  });
}

template <class T>
void add_utterance(WaveformGradient<T> call, const float* weight, double eps, int64_t samples, float* vectors,
                   Gradients& to, float* dx) {
  const int64_t K = call.K, C = call.C, frames = (samples - K) / call.stride + 1;
  const WindowStatistics statistics(call.x, frames, call.stride, K);
  const auto row = [&](Row r) { return vectors + r * C; };
  for_channels(call.channels, [&](int64_t c) {
    row(kShift)[c] = -statistics.mean_of(weight + c * K);
    // As in the forward: a single frame is its own mean.
    row(kRstd)[c] = frames == 1 ? 0.0 : 1.0 / std::sqrt(statistics.variance_of(weight + c * K) + eps);
  });
  const std::vector<double> sum = collect(call, frames);
  for_channels(call.channels, [&](int64_t c) {
    const float* w = weight + c * K;
    const double rstd = row(kRstd)[c], scale = rstd * row(kNormWeight)[c];
    // The last would follow from the others, but where the taps cancel it would be mostly rounding.
    const double total = sum[K * C + c], normed = sum[(K + 1) * C + c];
    for (int64_t k = 0; k < K; ++k) {
      double covariance = 0.0;  // of the output and the window's k-th sample
      for (int64_t l = 0; l < K; ++l) covariance += w[l] * statistics.covariance(l, k);
      to.weight[c * K + k] += scale * (sum[k * C + c] - total * statistics.mean(k) - normed * rstd * covariance);
    }
    to.norm_weight[c] += normed;
    to.norm_bias[c] += total;
    row(kMean)[c] = total / frames;
    row(kMeanNormed)[c] = normed / frames;
  });
  if (dx) spread(call, frames, samples, dx);
}

// The samples of an utterance less their mean, in float64 until they are rounded.
void centre(const float* samples, int64_t count, std::vector<float>& centred) {
  const int64_t parts = divided_up(count, kPart);
  std::vector<double> sums(parts);
  parallel_for(0, parts, 4, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      sums[part] = std::accumulate(samples + part * kPart, samples + std::min(count, (part + 1) * kPart), 0.0);
    }
  });
  const double mean = std::accumulate(sums.begin(), sums.end(), 0.0) / count;
  const double shift = std::isfinite(mean) ? mean : 0.0;  // not finite: for what no window may have seen
  centred.resize(count);
  parallel_for(0, count, 4 * kPart, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) centred[s] = static_cast<float>(samples[s] - shift);
  });
}

template <class T>
void run(const Tensor& grad, const Tensor& waveform, const ResizedFrames& utterances, const Tensor& filters,
         int64_t stride, const Tensor& norm_weight, const Tensor& norm_bias, double eps, int activation, Gradients& to,
         bool wants_waveform) {
  const int64_t channels = filters.size(0), K = filters.size(2), lanes = waveform_backward_kernels().lanes;
  const int64_t C = divided_up(channels, lanes) * lanes;
  const float *weight = data<float>(filters), *samples = data<float>(waveform);
  const T* grads = data<T>(grad);
  float* dwaveform = mutable_data<float>(to.waveform);
  // Padding has weights of zero, and a gradient of zero.
  std::vector<float> taps(K * C), vectors(kRows * C), centred;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t k = 0; k < K; ++k) taps[k * C + c] = weight[c * K + k];
  }
  float* at = vectors.data();
  std::copy_n(data<float>(norm_weight), channels, at + kNormWeight * C);
  std::copy_n(data<float>(norm_bias), channels, at + kNormBias * C);
  for (int64_t b = 0; b < utterances.count(); ++b) {
    // The norm takes a constant out; before the sums it costs them fewer digits.
    centre(samples + utterances.in(b), utterances.in_frames(b), centred);
    WaveformGradient<T> call;
    call.x = centred.data();
    call.grad = grads + utterances.out(b) * channels;
    call.weight = taps.data();
    call.shift = at + kShift * C, call.rstd = at + kRstd * C;
    call.norm_weight = at + kNormWeight * C, call.norm_bias = at + kNormBias * C;
    call.mean = at + kMean * C, call.mean_normed = at + kMeanNormed * C;
    call.C = C, call.channels = channels, call.K = K, call.stride = stride, call.activation = activation;
    float* dx = wants_waveform ? dwaveform + utterances.in(b) : nullptr;
    add_utterance(call, weight, eps, utterances.in_frames(b), at, to, dx);
  }
}

// Gradients of waveform, empty unless it is wanted, weight, norm_weight and norm_bias, all float32. grad is float32 or
// bfloat16, everything else float32. That of the convolution's own bias is zero: the norm takes it out.
std::tuple<Tensor, Tensor, Tensor, Tensor> waveform_conv_backward(
    const Tensor& grad, const Tensor& waveform, const Tensor& weight, int64_t stride, const Tensor& norm_weight,
    const Tensor& norm_bias, double eps, const Text& activation, bool wants_waveform,
    const std::optional<Tensor>& offsets, const std::optional<Tensor>& out_offsets, std::optional<int64_t> out_frames) {
  ENTRY_CHECK(weight.dim() == 3 && weight.size(1) == 1 && waveform.dim() == 2 && weight.size(2) > 0 &&
                  waveform.size(1) >= weight.size(2) && weight.size(2) <= waveform_backward_kernels().most_taps,
              "waveform_conv_backward: expected a waveform of [B, S] and a weight of [C, 1, K] with K up to ",
              waveform_backward_kernels().most_taps, ", got ", waveform.sizes(), " and ", weight.sizes());
  check_positive("waveform_conv_backward", {{"stride", stride}});
  stride = std::min(stride, waveform.size(1));  // one frame either way, and nothing overflows
  const int64_t C = weight.size(0), K = weight.size(2);
  const auto utterances =
      resized_frames("waveform_conv_backward", waveform.size(0), waveform.size(1), offsets, out_offsets, out_frames,
                     [&](int64_t samples) { return samples < K ? 0 : (samples - K) / stride + 1; });
  const int64_t T = utterances.row_frames();
  check_vector("waveform_conv_backward", "norm_weight", norm_weight, C);
  check_vector("waveform_conv_backward", "norm_bias", norm_bias, C);
  ENTRY_CHECK(grad.sizes().equals({waveform.size(0), T, C}), "waveform_conv_backward: expected grad of [",
              waveform.size(0), ", ", T, ", ", C, "], got ", grad.sizes());
  for (const Tensor* x : {&waveform, &weight, &norm_weight, &norm_bias}) {
    ENTRY_CHECK(dtype_of(*x) == kFloat, "waveform_conv_backward: expected float32, got ", dtype_of(*x));
  }
  Gradients to = {wants_waveform ? fresh_like(waveform) : fresh(waveform, {0}), std::vector<double>(C * K),
                  std::vector<double>(C), std::vector<double>(C)};
  const Tensor grad_ = contiguous_of(grad), x = contiguous_of(waveform), filters = contiguous_of(weight);
  const Tensor gain = contiguous_of(norm_weight), offset = contiguous_of(norm_bias);
  const int number = activation_number(activation);
  if (dtype_of(grad) == kFloat) {
    run<float>(grad_, x, utterances, filters, stride, gain, offset, eps, number, to, wants_waveform);
  } else {
    ENTRY_CHECK(dtype_of(grad) == kBFloat16, "waveform_conv_backward: expected float32 or bfloat16, got ",
                dtype_of(grad));
    run<bf16>(grad_, x, utterances, filters, stride, gain, offset, eps, number, to, wants_waveform);
  }
  return {to.waveform, rounded(weight, {C, 1, K}, to.weight.data(), kFloat),
          rounded(weight, {C}, to.norm_weight.data(), kFloat), rounded(weight, {C}, to.norm_bias.data(), kFloat)};
}

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) {
  m.impl("waveform_conv_backward", TORCH_BOX(&waveform_conv_backward));
}

}  // namespace
}  // namespace wavlm_fast
