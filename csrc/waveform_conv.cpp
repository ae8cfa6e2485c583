
#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "integers.h"
#include "library.h"
#include "parallel.h"
#include "waveform_conv.h"
#include "waveform_conv_entry.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(WaveformConvKernels, waveform_conv_kernels)

namespace {

// Windows are summed in so many parts at most, and of so many windows at least, whatever the number of threads: the result
// does not depend on it.
constexpr int64_t kMostParts = 64, kLeastWindows = 512;
// Their products take the square of the taps, for each part.
constexpr int64_t kMostTaps = 128;

}  // namespace

WindowStatistics::WindowStatistics(const float* utterance, int64_t windows, int64_t stride, int64_t K)
    : mean_(K), covariance_(K * K) {
  const int64_t own = std::max(kLeastWindows, divided_up(windows, kMostParts));
  const int64_t parts = divided_up(windows, own), size = K + K * K;
  std::vector<double> partial(parts * size);
  const auto add_windows = waveform_conv_kernels().add_windows;
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      double* sums = partial.data() + part * size;
      const int64_t first = part * own;
      add_windows(utterance + first * stride, std::min(own, windows - first), stride, K, sums, sums + K);
    }
  });
  for (int64_t part = 0; part < parts; ++part) {
    const double* sums = partial.data() + part * size;
    for (int64_t k = 0; k < K; ++k) mean_[k] += sums[k] / windows;
    for (int64_t i = 0; i < K * K; ++i) covariance_[i] += sums[K + i] / windows;
  }
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t l = 0; l < K; ++l) covariance_[k * K + l] -= mean_[k] * mean_[l];
  }
}

double WindowStatistics::mean_of(const float* weight) const {
  double mean = 0.0;
  for (size_t k = 0; k < mean_.size(); ++k) mean += weight[k] * mean_[k];
  return mean;
}

double WindowStatistics::variance_of(const float* weight) const {
  const size_t K = mean_.size();
  double variance = 0.0;
  for (size_t k = 0; k < K; ++k) {
    for (size_t l = 0; l < K; ++l) variance += static_cast<double>(weight[k]) * weight[l] * covariance_[k * K + l];
  }
  return std::max(variance, 0.0);  // rounding may leave silence a little below
}

FirstConv::FirstConv(const Tensor& weight, const Tensor& packed, const std::optional<Tensor>& bias, int64_t stride,
                     bool group_norm, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                     double eps, const std::string& activation)
    : packed_(packed),
      norm_weight_(contiguous_of(norm_weight, kFloat)),
      norm_bias_(contiguous_of(norm_bias, kFloat)),
      stride_(stride),
      group_norm_(group_norm),
      eps_(eps),
      activation_(activation_number(activation)) {
  ENTRY_CHECK(weight.dim() == 3 && weight.size(1) == 1 && dtype_of(weight) == kFloat && stride > 0,
              "waveform_conv: expected a float32 weight of [C, 1, K], got ", dtype_of(weight), " ", weight.sizes());
  check_positive("waveform_conv", {{"taps", weight.size(2)}});
  ENTRY_CHECK(!group_norm || weight.size(2) <= kMostTaps, "waveform_conv: expected up to ", kMostTaps,
              " taps before a group norm, got ", weight.size(2));
  check_vector("waveform_conv", "bias", bias, weight.size(0));
  check_vector("waveform_conv", "norm_weight", norm_weight, weight.size(0));
  check_vector("waveform_conv", "norm_bias", norm_bias, weight.size(0));
  filters_ = contiguous_of(weight), channels_ = weight.size(0), taps_ = weight.size(2);
  ENTRY_CHECK(
      packed.is_contiguous() && dtype_of(packed) == kFloat && packed.numel() == packed_size(channels_, 1, taps_, false),
      "waveform_conv: expected the weight packed by pack_conv");
  own_bias_ = contiguous_of(bias, kFloat);
}

void FirstConv::listen(const float* waveform, const ResizedFrames& utterances) {
  const int64_t B = utterances.count();
  samples_.clear();
  for (int64_t b = 0; b < B; ++b) samples_.push_back(waveform + utterances.in(b));
  if (!group_norm_) return;
  for (std::vector<float>* vectors : {&bias_, &gain_, &offset_}) vectors->resize(B * channels_);
  // Fewer utterances than threads are divided over all of them inside.
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) normalise(b, frames(utterances.in_frames(b)));
  };
  B < num_threads() ? some(0, B) : parallel_for(0, B, 1, some);
}

template <class Out>
PackedConv<float, Out> FirstConv::on(int64_t b) const {
  const auto own = [&](const std::vector<float>& vectors) {
    return group_norm_ ? vectors.data() + b * channels_ : nullptr;
  };
  PackedConv<float, Out> call{};
  call.x = samples_[b];
  call.packed = data<void>(packed_);
  call.bias = group_norm_ ? own(bias_) : data<float>(own_bias_), call.gain = own(gain_), call.offset = own(offset_);
  call.C = taps_, call.taps = 1, call.row_step = stride_, call.channels = channels_;
  call.activation = activation_;
  return call;
}

template PackedConv<float, float> FirstConv::on(int64_t) const;
template PackedConv<float, bf16> FirstConv::on(int64_t) const;

void FirstConv::normalise(int64_t b, int64_t windows) {
  const int64_t K = taps_;
  const WindowStatistics statistics(samples_[b], windows, stride_, K);
  const float *w = data<float>(filters_), *norm_weight = data<float>(norm_weight_);
  const float *norm_bias = data<float>(norm_bias_), *own_bias = data<float>(own_bias_);
  const auto own = [&](std::vector<float>& vectors) { return vectors.data() + b * channels_; };
  float *bias = own(bias_), *gain = own(gain_), *offset = own(offset_);
  const auto of_channel = [&](int64_t i, const float* w) {
    // The conv's own bias moves the mean and nothing else, so the norm takes it out again, if it is finite.
    bias[i] = (own_bias ? 0.0f * own_bias[i] : 0.0f) - statistics.mean_of(w);
    gain[i] = (norm_weight ? norm_weight[i] : 1.0) / std::sqrt(statistics.variance_of(w) + eps_);
    // A single frame is its own mean: what is left of it is rounding, which the gain would blow up.
    if (windows == 1) gain[i] *= 0.0f;
    offset[i] = norm_bias ? norm_bias[i] : 0.0f;
    // Differences from the mean have both signs; torch multiplies first and subtracts then.
    if (std::isfinite(gain[i])) return;
    const float mean = -bias[i];
    bias[i] = own_bias ? own_bias[i] : 0.0f;
    offset[i] -= (mean + bias[i]) * gain[i];
  };
  parallel_for(0, channels_, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) of_channel(i, w + i * K);
  });
}

namespace {

template <class Out>
void run(FirstConv& conv, const Tensor& waveform, const ResizedFrames& utterances, const Tensor& out) {
  conv.listen(data<float>(waveform), utterances);
  Out* to = mutable_data<Out>(out);
  std::vector<ConvPiece<float, Out>> pieces;
  for (int64_t b = 0; b < utterances.count(); ++b) {
    auto call = conv.on<Out>(b);
    call.out = to + utterances.out(b) * call.channels;
    pieces.push_back({call, utterances.out_frames(b)});
  }
  convolve(pieces, false);
}

// [B, S] float32 -> [B, T, C] float32 or bfloat16, with group norm, or without norm; or packed samples beside their
// offsets.
Tensor waveform_conv(const Tensor& waveform, const Tensor& weight, const Tensor& packed,
                     const std::optional<Tensor>& bias, int64_t stride, bool group_norm,
                     const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double eps,
                     const Text& activation, bool to_bf16, const std::optional<Tensor>& offsets,
                     const std::optional<Tensor>& out_offsets, std::optional<int64_t> out_frames) {
  FirstConv conv(weight, packed, bias, stride, group_norm, norm_weight, norm_bias, eps, activation);
  ENTRY_CHECK(waveform.dim() == 2 && dtype_of(waveform) == kFloat && waveform.size(1) >= weight.size(2),
              "waveform_conv: expected a float32 waveform of [B, S] with S >= ", weight.size(2), ", got ",
              dtype_of(waveform), " ", waveform.sizes());
  const Tensor x = contiguous_of(waveform);
  const auto utterances = resized_frames("waveform_conv", x.size(0), x.size(1), offsets, out_offsets, out_frames,
                                         [&](int64_t samples) { return conv.frames(samples); });
  const Tensor out = fresh(x, {x.size(0), utterances.row_frames(), conv.channels()}, to_bf16 ? kBFloat16 : kFloat);
  to_bf16 ? run<bf16>(conv, x, utterances, out) : run<float>(conv, x, utterances, out);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) { m.impl("waveform_conv", TORCH_BOX(&waveform_conv)); }

}  // namespace
}  // namespace wavlm_fast
