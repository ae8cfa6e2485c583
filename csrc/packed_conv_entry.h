// What packed_conv.cpp does for other entries.
#pragma once

#include <string>
#include <vector>

#include "packed_conv.h"
#include "tensor.h"

namespace wavlm_fast {

// The kernels of the level in use.
const PackedConvKernels& packed_conv();

// The number by which kernels know an activation; an error for an unknown name.
int activation_number(const std::string& name);

// Weights [channels, taps, C], as one with the channels of all -> the order that the kernel of this process reads,
// one-dimensional. bfloat16 stays so where it has products of its own, else it becomes float32. `filtered`: for minimal
// filtering, of three taps at a stride of two.
Tensor pack_conv(std::vector<Tensor> weights, bool filtered);

// Whether weights of so many channels that enter are packed as bfloat16, in pairs.
bool multiplies_pairs(int64_t C);

// Numbers that a packed weight has.
int64_t packed_size(int64_t channels, int64_t taps, int64_t C, bool filtered);

template <class In, class Out>
const PackedConvVariants<In, Out>& variants();

// Output frames 0 .. frames - 1 of a call: of an utterance, say.
template <class In, class Out>
struct ConvPiece {
  PackedConv<In, Out> call;
  int64_t frames;
};

// Pieces on all threads, which share one number of channels, of taps and of C.
template <class In, class Out>
void convolve(const std::vector<ConvPiece<In, Out>>& pieces, bool filtered);

template <class In, class Out>
void convolve(const PackedConv<In, Out>& call, bool filtered, int64_t frames) {
  convolve(std::vector<ConvPiece<In, Out>>{{call, frames}}, filtered);
}

}  // namespace wavlm_fast
