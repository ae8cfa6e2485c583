// Squares of kLanes x kLanes numbers, turned in registers.
#pragma once

#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {

template <int... values>
struct List {};

template <int n, int... values>
struct Counted : Counted<n - 1, n - 1, values...> {};

template <int... values>
struct Counted<0, values...> {
  using Lanes = List<values...>;
};

// Of two rows, the lanes of `b` without bit kBit change places with the lanes of `a` that have it.
template <int kBit, int... L>
WAVLM_FAST_INLINE void exchange(Floats& a, Floats& b, List<L...>) {
#if defined(__clang__)
  const Floats first = __builtin_shufflevector(a, b, (L & kBit ? kLanes + (L & ~kBit) : L)...);
  b = __builtin_shufflevector(a, b, (L & kBit ? kLanes + L : L | kBit)...);
#else
  const Floats first = __builtin_shuffle(a, b, Words{(L & kBit ? kLanes + (L & ~kBit) : L)...});
  b = __builtin_shuffle(a, b, Words{(L & kBit ? kLanes + L : L | kBit)...});
#endif
  a = first;
}

template <int kBit = kLanes / 2>
WAVLM_FAST_INLINE void transpose(Floats (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & kBit)) exchange<kBit>(rows[i], rows[i | kBit], Counted<kLanes>::Lanes{});
  }
  if constexpr (kBit > 1) transpose<kBit / 2>(rows);
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
