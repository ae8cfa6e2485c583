// Independent multiply-adds, enough of them that none waits for an earlier one, on operands that stay in registers.
#include "peak.h"

#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {
namespace {

// With the two operands they fit in the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kAccumulators = 24;
#else
constexpr int kAccumulators = 12;
#endif

struct Single {
  static constexpr double kOperations = 2.0 * kLanes;

  // The accumulator is a factor: were it the summand, the product would be one and the same in every round, and without
  // fused multiply-adds the compiler would compute it once.
  static WAVLM_FAST_INLINE Floats step(Floats sum, Floats a, Floats b) { return sum * a + b; }
};

template <class Element>
float loop(std::int64_t rounds) {
  const Floats a = splat(0.5f), b = splat(0.25f);
  Floats sums[kAccumulators];
#pragma GCC unroll 24
  for (int i = 0; i < kAccumulators; ++i) sums[i] = splat(static_cast<float>(i));
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kAccumulators; ++i) sums[i] = Element::step(sums[i], a, b);
  }
  Floats total = sums[0];
#pragma GCC unroll 24
  for (int i = 1; i < kAccumulators; ++i) total += sums[i];
  return sum(total);
}

#if WAVLM_FAST_HAS_PAIRS
struct Pair {
  static constexpr double kOperations = 4.0 * kLanes;

  static WAVLM_FAST_INLINE Floats step(Floats sum, Floats a, Floats b) { return add_pairs(sum, a, b); }
};
#endif

}  // namespace

const PeakKernels& peak_kernels() {
#if WAVLM_FAST_HAS_PAIRS
  static constexpr PeakKernels kernels = {loop<Single>, kAccumulators * Single::kOperations, loop<Pair>,
                                          kAccumulators * Pair::kOperations};
#else
  static constexpr PeakKernels kernels = {loop<Single>, kAccumulators * Single::kOperations, nullptr, 0.0};
#endif
  return kernels;
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
