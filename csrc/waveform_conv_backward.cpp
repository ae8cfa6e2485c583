// Gradients of the first convolution with its group norm. Of the frames' gradients only sums are needed: with g the
// gradient of the norm's output, of g, of g times the window, and of g times the normed output. How the norm's
// statistics depend on weights and waveform follows from the mean and the covariance of the windows.
#include "waveform_conv_backward.h"

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "check.h"
#include "dispatch.h"
#include "integers.h"
#include "packed_conv_entry.h"
#include "resized_frames.h"
#include "scratch.h"
#include "waveform_conv_entry.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(WaveformBackwardKernels, waveform_backward_kernels)

namespace {

using at::Tensor;

// Frames are summed in parts of this many, whatever the number of threads: the result does not depend on it.
constexpr int64_t kPart = 4096;
// Frames of a task, so few that threads end together on a second of samples.
constexpr int64_t kSpreadFrames = 128;

template <class T>
CollectGradient<T>* collect_kernel();
template <>
CollectGradient<float>* collect_kernel() { return waveform_backward_kernels().collect_float; }
template <>
CollectGradient<bf16>* collect_kernel() { return waveform_backward_kernels().collect_bf16; }

template <class T>
SpreadGradient<T>* spread_kernel();
template <>
SpreadGradient<float>* spread_kernel() { return waveform_backward_kernels().spread_float; }
template <>
SpreadGradient<bf16>* spread_kernel() { return waveform_backward_kernels().spread_bf16; }

// Rows of the gradient op's work, C numbers each.
enum Row { kShift, kRstd, kNormWeight, kNormBias, kMean, kMeanNormed, kRows };

// Sums over frames, [K + 2, C], as the kernel has them.
template <class T>
Tensor collect(const WaveformGradient<T>& call, int64_t frames) {
  const int64_t parts = divided_up(frames, kPart), C = call.C, lanes = waveform_backward_kernels().lanes;
  const Tensor partial = at::zeros({parts, call.K + 2, C}, at::kFloat);
  const int64_t vectors = C / lanes;
  at::parallel_for(0, parts * vectors, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / vectors, c = task % vectors * lanes, first = part * kPart;
      float* sums = partial.mutable_data_ptr<float>() + part * (call.K + 2) * C;
      collect_kernel<T>()(call, first, std::min(kPart, frames - first), c, c + lanes, sums);
    }
  });
  return partial.sum(0, false, at::kDouble);
}

// Samples of one utterance, each by the task that owns it: frames at a task's edge are computed twice.
template <class T>
void spread(const WaveformGradient<T>& call, int64_t frames, int64_t samples, float* dx) {
  const int64_t K = call.K, stride = call.stride, before = (K - 1) / stride;
  std::fill(dx, dx + samples, 0.0f);
  at::parallel_for(0, divided_up(samples, kSpreadFrames * stride), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t own = task * kSpreadFrames, first = std::max<int64_t>(0, own - before);
      const int64_t last = std::min(frames, own + kSpreadFrames);
      const int64_t from = own * stride, to = std::min(samples, (own + kSpreadFrames) * stride);
      if (first >= last) continue;
      float* windows = static_cast<float*>(scratch<Scratch::task>((last - first) * K * sizeof(float)));
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
  Tensor waveform, weight, norm_weight, norm_bias;  // float64 but for the first
};

template <class OfChannel>
void for_channels(int64_t channels, const OfChannel& of_channel) {
  at::parallel_for(0, channels, 64, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) of_channel(c);
  });
}

template <class T>
void add_utterance(WaveformGradient<T> call, const Tensor& filters, double eps, int64_t samples, float* vectors,
                   const Gradients& to, float* dx) {
  const int64_t K = call.K, C = call.C, frames = (samples - K) / call.stride + 1;
  const WindowStatistics statistics(call.x, frames, call.stride, K);
  const float* weight = filters.const_data_ptr<float>();  // [channels, K]
  const auto row = [&](Row r) { return vectors + r * C; };
  for_channels(call.channels, [&](int64_t c) {
    row(kShift)[c] = -statistics.mean_of(weight + c * K);
    // As in the forward: a single frame is its own mean.
    row(kRstd)[c] = frames == 1 ? 0.0 : 1.0 / std::sqrt(statistics.variance_of(weight + c * K) + eps);
  });
  const Tensor sums = collect(call, frames);
  const double* sum = sums.const_data_ptr<double>();
  double *dweight = to.weight.mutable_data_ptr<double>(), *dnorm_weight = to.norm_weight.mutable_data_ptr<double>();
  double* dnorm_bias = to.norm_bias.mutable_data_ptr<double>();
  for_channels(call.channels, [&](int64_t c) {
    const float* w = weight + c * K;
    const double rstd = row(kRstd)[c], scale = rstd * row(kNormWeight)[c];
    // The last would follow from the others, but where the taps cancel it would be mostly rounding.
    const double total = sum[K * C + c], normed = sum[(K + 1) * C + c];
    for (int64_t k = 0; k < K; ++k) {
      double covariance = 0.0;  // of the output and the window's k-th sample
      for (int64_t l = 0; l < K; ++l) covariance += w[l] * statistics.covariance(l, k);
      dweight[c * K + k] += scale * (sum[k * C + c] - total * statistics.mean(k) - normed * rstd * covariance);
    }
    dnorm_weight[c] += normed;
    dnorm_bias[c] += total;
    row(kMean)[c] = total / frames;
    row(kMeanNormed)[c] = normed / frames;
  });
  if (dx) spread(call, frames, samples, dx);
}

template <class T>
void run(const Tensor& grad, const Tensor& waveform, const ResizedFrames& utterances, const Tensor& filters,
         int64_t stride, const Tensor& norm_weight, const Tensor& norm_bias, double eps, int activation,
         const Gradients& to, bool wants_waveform) {
  const int64_t channels = filters.size(0), K = filters.size(1), lanes = waveform_backward_kernels().lanes;
  const int64_t C = divided_up(channels, lanes) * lanes;
  // Padding has weights of zero, and a gradient of zero.
  const Tensor taps = at::constant_pad_nd(filters.t(), {0, C - channels}).contiguous();
  const Tensor vectors = at::zeros({kRows, C}, at::kFloat);
  const auto set = [&](Row row, const Tensor& from) { vectors[row].narrow(0, 0, channels).copy_(from); };
  set(kNormWeight, norm_weight), set(kNormBias, norm_bias);
  float* at = vectors.mutable_data_ptr<float>();
  const Tensor samples = waveform.view({-1});
  for (int64_t b = 0; b < utterances.count(); ++b) {
    // The norm takes a constant out; before the sums it costs them fewer digits.
    const Tensor wide = samples.slice(0, utterances.in(b), utterances.in(b + 1)).to(at::kDouble);
    const double mean = wide.mean().item<double>();  // not finite: for what no window may have seen
    const Tensor centred = wide.sub(std::isfinite(mean) ? mean : 0.0).to(at::kFloat);
    WaveformGradient<T> call;
    call.x = centred.const_data_ptr<float>();
    call.grad = static_cast<const T*>(grad.const_data_ptr()) + utterances.out(b) * channels;
    call.weight = taps.const_data_ptr<float>();
    call.shift = at + kShift * C, call.rstd = at + kRstd * C;
    call.norm_weight = at + kNormWeight * C, call.norm_bias = at + kNormBias * C;
    call.mean = at + kMean * C, call.mean_normed = at + kMeanNormed * C;
    call.C = C, call.channels = channels, call.K = K, call.stride = stride, call.activation = activation;
    float* dx = wants_waveform ? to.waveform.mutable_data_ptr<float>() + utterances.in(b) : nullptr;
    add_utterance(call, filters, eps, utterances.in_frames(b), at, to, dx);
  }
}

// Gradients of waveform, empty unless it is wanted, weight, norm_weight and norm_bias, all float32. grad is float32 or
// bfloat16, everything else float32. That of the convolution's own bias is zero: the norm takes it out.
std::tuple<Tensor, Tensor, Tensor, Tensor> waveform_conv_backward(const Tensor& grad, const Tensor& waveform,
                                                                  const Tensor& weight, int64_t stride,
                                                                  const Tensor& norm_weight, const Tensor& norm_bias,
                                                                  double eps, const std::string& activation,
                                                                  bool wants_waveform,
                                                                  const std::optional<Tensor>& offsets,
                                                                  const std::optional<Tensor>& out_offsets,
                                                                  std::optional<int64_t> out_frames) {
  TORCH_CHECK(weight.dim() == 3 && weight.size(1) == 1 && waveform.dim() == 2 && weight.size(2) > 0 &&
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
  TORCH_CHECK(grad.sizes() == at::IntArrayRef({waveform.size(0), T, C}),
              "waveform_conv_backward: expected grad of [", waveform.size(0), ", ", T, ", ", C, "], got ",
              grad.sizes());
  for (const Tensor* x : {&waveform, &weight, &norm_weight, &norm_bias}) {
    TORCH_CHECK(x->scalar_type() == at::kFloat, "waveform_conv_backward: expected float32, got ", x->scalar_type());
  }
  const auto wide = [](at::IntArrayRef sizes) { return at::zeros(sizes, at::kDouble); };
  const Gradients to = {wants_waveform ? at::empty(waveform.sizes(), at::kFloat) : at::empty({0}, at::kFloat),
                        wide({C, K}), wide({C}), wide({C})};
  const Tensor grad_ = grad.contiguous(), x = waveform.contiguous(), filters = weight.contiguous().view({C, K});
  const int number = activation_number(activation);
  if (grad.scalar_type() == at::kFloat) {
    run<float>(grad_, x, utterances, filters, stride, norm_weight, norm_bias, eps, number, to, wants_waveform);
  } else {
    TORCH_CHECK(grad.scalar_type() == at::kBFloat16, "waveform_conv_backward: expected float32 or bfloat16, got ",
                grad.scalar_type());
    run<bf16>(grad_, x, utterances, filters, stride, norm_weight, norm_bias, eps, number, to, wants_waveform);
  }
  return {to.waveform, to.weight.to(at::kFloat).view({C, 1, K}), to.norm_weight.to(at::kFloat),
          to.norm_bias.to(at::kFloat)};
}

TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) { m.impl("waveform_conv_backward", &waveform_conv_backward); }

}  // namespace
}  // namespace wavlm_fast
