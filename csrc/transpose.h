// Squares of kLanes x kLanes numbers, turned in registers.
#pragma once

#include <utility>

#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {

// Of two rows, the lanes of `b` without bit kBit change places with the lanes of `a` that have it.
#if defined(__clang__)
template <int kBit, int... L>
WAVLM_FAST_INLINE void exchange(Floats& a, Floats& b, std::integer_sequence<int, L...>) {
  const Floats first = __builtin_shufflevector(a, b, (L & kBit ? kLanes + (L & ~kBit) : L)...);
  b = __builtin_shufflevector(a, b, (L & kBit ? kLanes + L : L | kBit)...);
  a = first;
}
#else
template <int kBit, int... L>
WAVLM_FAST_INLINE void exchange(Floats& a, Floats& b, std::integer_sequence<int, L...>) {
  const Floats first = __builtin_shuffle(a, b, Words{(L & kBit ? kLanes + (L & ~kBit) : L)...});
  b = __builtin_shuffle(a, b, Words{(L & kBit ? kLanes + L : L | kBit)...});
  a = first;
}
#endif

template <int kBit = kLanes / 2>
WAVLM_FAST_INLINE void transpose(Floats (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & kBit)) exchange<kBit>(rows[i], rows[i | kBit], std::make_integer_sequence<int, kLanes>{});
  }
  if constexpr (kBit > 1) transpose<kBit / 2>(rows);
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
