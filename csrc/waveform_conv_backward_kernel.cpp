// Lanes are channels. A vector's taps and the sums of their gradients stay in registers while frames pass by, whose
// norm and activation are computed again.
#include "waveform_conv_backward.h"

#include "activation.h"
#include "tile.h"
#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {
namespace {

constexpr int kMostTaps = 16;
// Frames summed from zero: the rounding error of a sum of runs grows with their number.
constexpr std::int64_t kRun = 256;

// A number of taps that the compiler knows, or at most kMostTaps.
template <int K>
struct Taps {
  static constexpr int most = K;
  int count() const { return K; }
};
template <>
struct Taps<0> {
  static constexpr int most = kMostTaps;
  int K;
  int count() const { return K; }
};

// One vector of channels.
template <class Count>
struct Filter {
  Floats taps[Count::most];
  Floats shift, rstd, norm_weight, norm_bias;

  template <class T>
  WAVLM_FAST_INLINE Filter(const WaveformGradient<T>& call, std::int64_t c, Count K)
      : shift(load(call.shift + c)),
        rstd(load(call.rstd + c)),
        norm_weight(load(call.norm_weight + c)),
        norm_bias(load(call.norm_bias + c)) {
    for (int k = 0; k < K.count(); ++k) taps[k] = load(call.weight + k * call.C + c);
  }

  WAVLM_FAST_INLINE Floats normed(const float* window, Count K) const {
    Floats sum = shift;
#pragma GCC unroll 16
    for (int k = 0; k < Count::most; ++k) {
      if (k < K.count()) sum += taps[k] * splat(window[k]);
    }
    return sum * rstd;
  }
};

template <class T>
WAVLM_FAST_INLINE Floats load_channels(const WaveformGradient<T>& call, std::int64_t t, std::int64_t c) {
  return load_some(call.grad + t * call.channels + c, call.channels - c);
}

template <Activation activation, class Count, class T>
void collect_vector(const WaveformGradient<T>& call, std::int64_t first, std::int64_t count, std::int64_t c, Count K,
                    float* sums) {
  const Filter<Count> filter(call, c, K);
  const auto add = [&](std::int64_t row, Floats run) {
    float* at = sums + row * call.C + c;
    store(at, load(at) + run);
  };
  for (std::int64_t begin = first; begin < first + count; begin += kRun) {
    Floats run[Count::most] = {}, total = {}, total_normed = {};
    for (std::int64_t t = begin; t < least(begin + kRun, first + count); ++t) {
      const float* window = call.x + t * call.stride;
      const Floats normed = filter.normed(window, K);
      const Floats z = normed * filter.norm_weight + filter.norm_bias;
      const Floats g = through<activation>(load_channels(call, t, c), z);
      total += g;
      total_normed += g * normed;
#pragma GCC unroll 16
      for (int k = 0; k < Count::most; ++k) {
        if (k < K.count()) run[k] += g * splat(window[k]);
      }
    }
    for (int k = 0; k < K.count(); ++k) add(k, run[k]);
    add(K.count(), total);
    add(K.count() + 1, total_normed);
  }
}

template <Activation activation, class Count, class T>
void spread_frame(const WaveformGradient<T>& call, std::int64_t t, Count K, float* to) {
  const float* window = call.x + t * call.stride;
  Floats sums[Count::most] = {};
  for (std::int64_t c = 0; c < call.C; c += kLanes) {
    const Filter<Count> filter(call, c, K);
    const Floats normed = filter.normed(window, K);
    const Floats z = normed * filter.norm_weight + filter.norm_bias;
    const Floats g = through<activation>(load_channels(call, t, c), z);
    const Floats centred = g - load(call.mean + c) - normed * load(call.mean_normed + c);
    const Floats grad = centred * filter.norm_weight * filter.rstd;
#pragma GCC unroll 16
    for (int k = 0; k < Count::most; ++k) {
      if (k < K.count()) sums[k] += grad * filter.taps[k];
    }
  }
  for (int k = 0; k < K.count(); ++k) to[k] = sum(sums[k]);
}

// Calls body with the activation and the number of taps as types.
template <class Body>
WAVLM_FAST_INLINE void with_types(int activation, std::int64_t K, const Body& body) {
  with_activation(activation, [&](auto of) {
    if (K == 10) return body(of, Taps<10>{});
    body(of, Taps<0>{static_cast<int>(K)});
  });
}

template <class T>
void collect(const WaveformGradient<T>& call, std::int64_t first, std::int64_t count, std::int64_t begin,
             std::int64_t end, float* sums) {
  with_types(call.activation, call.K, [&](auto of, auto K) {
    for (std::int64_t c = begin; c < end; c += kLanes) {
      collect_vector<of.activation>(call, first, count, c, K, sums);
    }
  });
}

template <class T>
void spread(const WaveformGradient<T>& call, std::int64_t first, std::int64_t count, float* windows) {
  with_types(call.activation, call.K, [&](auto of, auto K) {
    for (std::int64_t t = first; t < first + count; ++t, windows += call.K) {
      spread_frame<of.activation>(call, t, K, windows);
    }
  });
}

}  // namespace

const WaveformBackwardKernels& waveform_backward_kernels() {
  static constexpr WaveformBackwardKernels kernels = {kLanes,        kMostTaps,     collect<float>,
                                                      collect<bf16>, spread<float>, spread<bf16>};
  return kernels;
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
