// What scores of a block of queries add to the Toeplitz bias.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {

// Sums over the diagonals of a block. A key's run of queries begins one place before that of the key before it, and a
// load that overlaps a store of a moment ago has to wait for it. So keys j, j + kLanes, ... have a copy of the sums to
// themselves, in which they move by whole vectors.
struct Diagonals {
  float* copies;  // [kLanes][slots] vectors
  std::int64_t slots, last;

  Diagonals(float* copies, std::int64_t keys, int vectors)
      : copies(copies), slots((keys - 1) / kLanes + vectors), last((keys - 1) / kLanes) {}

  // Where key j adds the first vector of queries.
  WAVLM_FAST_INLINE float* of(std::int64_t j) const {
    return copies + (j % kLanes * slots + last - j / kLanes) * kLanes;
  }

  // Adds the sums to `to`, which is where the key last * kLanes adds the first query, and leaves zeros. `sum` has room
  // for a vector more than a copy.
  void fold(float* sum, float* to) const {
    std::memset(sum, 0, (slots + 1) * kLanes * sizeof(float));
    float* from = copies;
    for (int j = 0; j < kLanes; ++j) {
      float* at = sum + kLanes - j;
      for (std::int64_t s = 0; s < slots; ++s, from += kLanes, at += kLanes) {
        store(at, load(at) + load(from));
        store(from, Floats{});
      }
    }
    to -= kLanes;
    for (std::int64_t s = 0; s <= slots; ++s, sum += kLanes, to += kLanes) store(to, load(to) + load(sum));
  }
};

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
