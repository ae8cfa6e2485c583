// What stats_pool.cpp asks of stats_pool_kernel.cpp, per level.
#pragma once

#include <cstdint>

#include "bf16.h"

namespace wavlm_fast {

// A block of neighbouring channels of one utterance, over its valid frames.
template <class T>
struct PoolColumns {
  const T* x;  // [frames, channels], row_step numbers from frame to frame
  std::int64_t row_step;
  std::int64_t frames;
  std::int64_t channels;  // at most kPoolChannels
};

constexpr std::int64_t kPoolChannels = 256;

// What a kernel works in, per channel.
struct PoolWork {
  double mean[kPoolChannels];
  double squares[kPoolChannels];  // of the differences from the mean, summed
  float pivot[kPoolChannels];
  float rest[kPoolChannels];
  float rest_squares[kPoolChannels];
};

// mean and deviation [channels]: NaN of no frames, and the deviation of one.
template <class T>
using StatsPoolForward = void(const PoolColumns<T>& columns, PoolWork& work, T* mean, T* deviation);

// dx of all_frames rows, row_step numbers apart; zero past the valid ones.
template <class T>
using StatsPoolBackward = void(const PoolColumns<T>& columns, PoolWork& work, const T* grad_mean,
                               const T* grad_deviation, std::int64_t all_frames, T* dx);

struct StatsPoolKernels {
  StatsPoolForward<float>* forward_float;
  StatsPoolForward<bf16>* forward_bf16;
  StatsPoolBackward<float>* backward_float;
  StatsPoolBackward<bf16>* backward_bf16;
};

}  // namespace wavlm_fast
