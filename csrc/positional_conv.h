// What positional_conv.cpp asks of positional_conv_kernel.cpp, per level.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bf16.h"

namespace wavlm_fast {

// The filters of all groups seen from one side: those that make channel `out` of a group from its channel `in` begin at
// at + group * group_step + out * out_step + in * in_step and hold K taps.
template <class T>
struct Filters {
  const T* at;
  std::int64_t group_step, out_step, in_step;
  bool backwards;  // the last tap first
};

// Some frames of one utterance, computed together: its `first` frame among all frames, how many frames of the utterance
// are before it and from it on, and how many of these are the row's. A block of P frames; an utterance that leaves room
// for zeros in the 2P frames of a transform is a single row.
struct Row {
  std::int64_t first, before, after, count;
};

// out[t] = residual[t] + activation(bias + sum over taps k of x[t + k - padding] filtered), frames outside of an
// utterance zero. All frames of all utterances, M of them, lie one behind the other; rows go through all of them.
template <class T>
struct PositionalConv {
  const T* x;  // [M, C]
  Filters<T> filters;
  const float* bias;   // [C], or null
  const T* residual;   // [M, C], or null
  const T* grad;       // [M, C], of the output, for the gradient of the filters only
  T* pre;              // [M, C], what enters the activation, or null
  T* out;              // [M, C]; for the gradient of the filters theirs, [C, C / groups, K]
  const float* roots;  // of all passes, in their order
  const Row* rows;
  const std::int64_t* bounds;  // of utterance b bounds[b] to bounds[b + 1]; null where each of the B has T_ frames
  std::int64_t B, T_, C, channels, K, padding, P;  // `channels` of a group
  int activation;                                  // as Activation in activation.h
};

// Some of the channels that enter a group.
struct Entering {
  std::int64_t begin, end;
};

template <class T>
using PositionalConvGradient = void(const PositionalConv<T>& call, std::int64_t group, Entering of, std::int64_t first,
                                    std::int64_t count, float* spectra, float* scratch);

template <class T>
struct PositionalConvOf {
  // The spectra of a group's filters, a row being a channel that enters.
  void (*transform_filters)(const PositionalConv<T>& call, std::int64_t group, Entering of, float* spectra,
                            float* scratch);
  // Frames of rows first .. first + count - 1, channels of one group.
  void (*convolve)(const PositionalConv<T>& call, std::int64_t group, std::int64_t first, std::int64_t count,
                   const float* spectra, float* scratch);
  // What these rows contribute to the spectra of the gradient of a group's filters, in their place or added to them.
  PositionalConvGradient<T>* begin_gradient;
  PositionalConvGradient<T>* add_gradient;
  // The gradient of a group's filters from its spectra.
  void (*finish_gradient)(const PositionalConv<T>& call, std::int64_t group, Entering of, const float* spectra,
                          float* scratch);
};

struct PositionalConvKernels {
  std::int64_t rows;  // of a register tile: calls are best for a multiple of it
  // Floats of the spectra of a group's filters, and of one row.
  std::size_t (*filters_size)(std::int64_t P, std::int64_t channels);
  std::size_t (*row_size)(std::int64_t P, std::int64_t channels);
  // Floats of 64-byte aligned scratch of a call for this many rows.
  std::size_t (*scratch_size)(std::int64_t P, std::int64_t rows, std::int64_t channels);
  PositionalConvOf<float> of_float;
  PositionalConvOf<bf16> of_bf16;
};

}  // namespace wavlm_fast
