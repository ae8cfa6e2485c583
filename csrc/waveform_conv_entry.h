// The first convolution, for other entries.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "packed_conv_entry.h"
#include "resized_frames.h"
#include "tensor.h"

namespace wavlm_fast {

// Mean [K] and covariance [K, K] of the windows of one utterance.
class WindowStatistics {
 public:
  // On all threads; the numbers do not depend on how many.
  WindowStatistics(const float* utterance, int64_t windows, int64_t stride, int64_t K);

  double mean(int64_t k) const { return mean_[k]; }
  double covariance(int64_t k, int64_t l) const { return covariance_[k * mean_.size() + l]; }

  // Of the convolution's output with the taps `weight` [K], without its bias.
  double mean_of(const float* weight) const;
  double variance_of(const float* weight) const;

 private:
  std::vector<double> mean_, covariance_;
};

// With group norm the conv output is never needed to know its statistics: mean and variance of a channel follow from
// the mean and the Gram matrix of the waveform's windows, so the norm becomes a bias, a gain and an offset.
class FirstConv {
 public:
  // weight [C, 1, K] and the same packed by pack_conv, both float32; vectors of [C] in any dtype.
  FirstConv(const Tensor& weight, const Tensor& packed, const std::optional<Tensor>& bias, int64_t stride,
            bool group_norm, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
            double eps, const std::string& activation);

  int64_t channels() const { return channels_; }
  int64_t frames(int64_t samples) const { return samples < taps_ ? 0 : (samples - taps_) / stride_ + 1; }

  // Takes the statistics of all utterances, whose samples begin at `waveform`, on all threads.
  void listen(const float* waveform, const ResizedFrames& utterances);

  // The call for utterance b of those; its output is not set.
  template <class Out>
  PackedConv<float, Out> on(int64_t b) const;

 private:
  void normalise(int64_t b, int64_t windows);

  std::optional<Tensor> filters_, own_bias_;
  Tensor packed_;
  std::optional<Tensor> norm_weight_, norm_bias_;
  int64_t channels_ = 0, taps_ = 0;
  std::vector<float> bias_, gain_, offset_;  // [B, C] each, of the group norm
  std::vector<const float*> samples_;
  int64_t stride_;
  bool group_norm_;
  double eps_;
  int activation_;
};

}  // namespace wavlm_fast
