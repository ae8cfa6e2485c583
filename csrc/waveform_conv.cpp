// The first convolution. With group norm the conv output is never needed to know its statistics: mean and variance of
// a channel follow from the mean and the Gram matrix of the waveform's windows, so the norm becomes a bias, a gain and
// an offset, and one pass writes the activated frames.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "packed_conv_entry.h"

namespace wavlm_fast {
namespace {

using at::Tensor;

// Windows are summed in parts of this many, whatever the number of threads: the result does not depend on it.
constexpr int64_t kPart = 4096;

// Sums over windows of x[k], and of x[k] * x[l] for l <= k, into [K] and [K, K].
void add_windows(const float* x, int64_t windows, int64_t stride, int64_t K, double* sums, double* products) {
  for (int64_t t = 0; t < windows; ++t, x += stride) {
    for (int64_t k = 0; k < K; ++k) {
      sums[k] += x[k];
      for (int64_t l = 0; l <= k; ++l) products[k * K + l] += static_cast<double>(x[k]) * x[l];
    }
  }
}

// Mean [K] and covariance [K, K], its lower half, of the windows of one utterance, in float64.
std::tuple<Tensor, Tensor> window_statistics(const float* x, int64_t windows, int64_t stride, int64_t K) {
  const int64_t parts = (windows + kPart - 1) / kPart;
  const Tensor partial = at::zeros({parts, K + K * K}, at::kDouble);
  double* at_part = partial.mutable_data_ptr<double>();
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      double* sums = at_part + part * (K + K * K);
      const int64_t first = part * kPart;
      add_windows(x + first * stride, std::min(kPart, windows - first), stride, K, sums, sums + K);
    }
  });
  const Tensor mean = at::zeros({K}, at::kDouble), covariance = at::zeros({K, K}, at::kDouble);
  double *m = mean.mutable_data_ptr<double>(), *c = covariance.mutable_data_ptr<double>();
  for (int64_t part = 0; part < parts; ++part) {
    const double* sums = at_part + part * (K + K * K);
    for (int64_t k = 0; k < K; ++k) m[k] += sums[k] / windows;
    for (int64_t i = 0; i < K * K; ++i) c[i] += sums[K + i] / windows;
  }
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t l = 0; l <= k; ++l) c[k * K + l] -= m[k] * m[l];
  }
  return {mean, covariance};
}

// The group norm of the convolution with these window statistics, as bias, gain and offset of its channels.
void fold(const Tensor& window_mean, const Tensor& covariance, const Tensor& weight, const Tensor& norm_weight,
          const Tensor& norm_bias, double eps, const Tensor& bias, const Tensor& gain, const Tensor& offset) {
  const int64_t C = weight.size(0), K = weight.size(1);
  const double *m = window_mean.const_data_ptr<double>(), *c = covariance.const_data_ptr<double>();
  const float* w = weight.const_data_ptr<float>();
  const auto entry = [](const Tensor& vector, int64_t i, double absent) {
    return vector.defined() ? static_cast<double>(vector.const_data_ptr<float>()[i]) : absent;
  };
  for (int64_t i = 0; i < C; ++i, w += K) {
    double mean = 0.0, variance = 0.0;
    for (int64_t k = 0; k < K; ++k) {
      mean += w[k] * m[k];
      for (int64_t l = 0; l <= k; ++l) variance += (k == l ? 1.0 : 2.0) * w[k] * w[l] * c[k * K + l];
    }
    // The conv's own bias moves the mean and nothing else, so the norm takes it out again.
    const double scale = entry(norm_weight, i, 1.0) / std::sqrt(std::max(variance, 0.0) + eps);
    bias.mutable_data_ptr<float>()[i] = -mean;
    gain.mutable_data_ptr<float>()[i] = scale;
    offset.mutable_data_ptr<float>()[i] = entry(norm_bias, i, 0.0);
  }
}

Tensor optional_vector(const std::optional<Tensor>& vector) {
  return vector ? vector->to(at::kFloat).contiguous() : Tensor();
}

// [B, S] float32 -> [B, T, C], with group norm, or without norm. `packed` is the weight [C, 1, K] after pack_conv.
Tensor waveform_conv(const Tensor& waveform, const Tensor& weight, const Tensor& packed,
                     const std::optional<Tensor>& bias, int64_t stride, bool group_norm,
                     const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double eps,
                     const std::string& activation) {
  TORCH_CHECK(waveform.dim() == 2 && weight.dim() == 3 && weight.size(1) == 1 && stride > 0 &&
                  waveform.size(1) >= weight.size(2),
              "waveform_conv: expected waveform of [B, S] and weight of [C, 1, K] with S >= K, got ", waveform.sizes(),
              " and ", weight.sizes());
  TORCH_CHECK(waveform.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat,
              "waveform_conv: expected float32, got ", waveform.scalar_type(), " and ", weight.scalar_type());
  const int64_t B = waveform.size(0), S = waveform.size(1), C = weight.size(0), K = weight.size(2);
  const int64_t T = (S - K) / stride + 1;
  TORCH_CHECK(packed.is_contiguous() && packed.scalar_type() == at::kFloat && packed.numel() >= C * K,
              "waveform_conv: expected the weight packed by pack_conv");
  const Tensor x = waveform.contiguous(), filters = weight.contiguous().view({C, K});
  const Tensor norm_gain = optional_vector(norm_weight), norm_offset = optional_vector(norm_bias);
  const Tensor shift = group_norm ? at::empty({C}, x.options()) : optional_vector(bias);
  const Tensor gain = group_norm ? at::empty({C}, x.options()) : Tensor();
  const Tensor offset = group_norm ? at::empty({C}, x.options()) : Tensor();
  const Tensor out = at::empty({B, T, C}, x.options());
  PackedConv call{};
  call.packed = packed.const_data_ptr<float>();
  call.T = T, call.C = K, call.taps = 1, call.row_step = stride, call.channels = C;
  call.activation = activation_number(activation);
  call.bias = shift.defined() ? shift.const_data_ptr<float>() : nullptr;
  call.gain = group_norm ? gain.const_data_ptr<float>() : nullptr;
  call.offset = group_norm ? offset.const_data_ptr<float>() : nullptr;
  for (int64_t b = 0; b < B; ++b) {
    call.x = x.const_data_ptr<float>() + b * S;
    call.out = out.mutable_data_ptr<float>() + b * T * C;
    if (group_norm) {
      const auto [mean, covariance] = window_statistics(call.x, T, stride, K);
      fold(mean, covariance, filters, norm_gain, norm_offset, eps, shift, gain, offset);
      // A single frame is its own mean: what is left of it is rounding, which the gain would blow up.
      if (T == 1) gain.zero_();
    }
    convolve(call, 1, 0);
  }
  return out;
}

TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) { m.impl("waveform_conv", &waveform_conv); }

}  // namespace
}  // namespace wavlm_fast
