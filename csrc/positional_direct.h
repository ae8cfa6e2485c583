// The sums of positional_conv_kernel.cpp by their definition, for what transforms cannot give.
#pragma once

#include "positional_conv.h"
#include "tile.h"
#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {

// Frames that the sum over taps gives: of an even number of taps one more, which is cut off and has a gradient of zero.
constexpr std::int64_t frames_met(std::int64_t frames, std::int64_t K) { return frames + (K + 1) % 2; }

// The frames of a row, [count][kLanes], for the vector of channels of the group that begins with `out`. `memory` has
// room for a vector of channels in 2P frames.
template <class T>
__attribute__((noinline, cold)) void sum_directly(const PositionalConv<T>& call, std::int64_t group, const Row& row,
                                                  std::int64_t out, float* frames, float* memory) {
  float *panel = memory, *window = memory + call.K * kLanes;  // [K][kLanes] taps, and frames that they meet
  const std::int64_t count = row.count, met = frames_met(row.before + row.after, call.K);
  const T* x = call.x + row.first * call.C + group * call.channels;
  for (std::int64_t in = 0; in < call.channels; ++in) {
    const T* filters = call.filters.at + group * call.filters.group_step + in * call.filters.in_step;
    for (std::int64_t k = 0; k < call.K; ++k) {
      const std::int64_t tap = call.filters.backwards ? call.K - 1 - k : k;
      for (int lane = 0; lane < kLanes; ++lane) {
        const bool absent = out + lane >= call.channels;
        panel[k * kLanes + lane] = absent ? 0.0f : widened(filters[(out + lane) * call.filters.out_step + tap]);
      }
    }
    for (std::int64_t n = 0; n < count + call.K - 1; ++n) {
      const std::int64_t t = n - call.padding;
      window[n] = t >= -row.before && t < row.after ? widened(x[t * call.C + in]) : 0.0f;
    }
    for (std::int64_t t = 0; t < count; t += kRows) {
      const Word* rows[kRows];
      for (int r = 0; r < kRows; ++r) rows[r] = window + least(t + r, count - 1);
      Floats sums[kRows][1] = {};
      const std::int64_t first = row.before - call.padding + t, last = first + kRows - 1 + call.K - 1;
      if (!call.filters.backwards || (first >= 0 && last < met)) {
        multiply<Single>(rows, 1, panel, call.K, sums);
      } else {
        // Taps that are not finite do not meet the zeros outside of a gradient, as they do outside of an utterance.
        for (int r = 0; r < kRows; ++r) {
          for (std::int64_t k = first + r < 0 ? -first - r : 0; k < least(call.K, met - first - r); ++k) {
            sums[r][0] += load(panel + k * kLanes) * rows[r][k];
          }
        }
      }
      store_tile(sums, in > 0, frames + t * kLanes, kLanes, count - t);
    }
  }
}

// The gradient of the taps between channel `in` of a group and the vector of channels that begins with `out`,
// [K][kLanes].
template <class T>
__attribute__((noinline, cold)) void sum_gradient_directly(const PositionalConv<T>& call, std::int64_t group,
                                                           std::int64_t in, std::int64_t out, float* taps) {
  const int lanes = static_cast<int>(least(kLanes, call.channels - out));
  for (std::int64_t k = 0; k < call.K; ++k) {
    Floats total = {};
    for (std::int64_t b = 0; b < call.B; ++b) {
      const std::int64_t first = call.bounds ? call.bounds[b] : b * call.T_;
      const std::int64_t frames = call.bounds ? call.bounds[b + 1] - first : call.T_;
      const std::int64_t at = first * call.C + group * call.channels, ahead = k - call.padding;
      Floats sum = {};
      // Zeros on both sides, as torch multiplies them, too: times what is not finite they are NaN.
      for (std::int64_t t = 0; t < frames_met(frames, call.K); ++t) {
        const bool inside = t + ahead >= 0 && t + ahead < frames;
        const float value = inside ? widened(call.x[at + (t + ahead) * call.C + in]) : 0.0f;
        sum += (t < frames ? load(call.grad + at + t * call.C + out, lanes) : Floats{}) * value;
      }
      total += sum;
    }
    store(taps + k * kLanes, total);
  }
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
