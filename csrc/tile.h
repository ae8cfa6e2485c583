// The register tile of every matrix product here: kRows rows of the left operand, which enter as scalars, times
// kVectors vectors of columns of the right one.
#pragma once

#include "bf16.h"
#include "vec.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {

// kRows x kVectors accumulators, one operand of kVectors vectors and a broadcast: as many as there are registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
constexpr int kVectors = 3;
constexpr int kColumns = kVectors * kLanes;

// How many vectors a group of columns has, as a type: the narrowest group has one.
template <int N>
struct Vectors {
  static constexpr int count = N;
};

// What one step along the summed axis multiplies, 32 bits: a float, or two neighbouring bfloat16.
typedef float __attribute__((may_alias, aligned(2))) Word;

// float32: a word is a number.
struct Single {
  static constexpr int kDepth = 1;

  static WAVLM_FAST_INLINE Floats multiply_add(Floats sum, Floats column, Word word) {
    return sum + column * splat(word);
  }
};

#if defined(__AVX512BF16__)
// bfloat16: a word is a pair, and so is each lane of a column.
struct Pair {
  static constexpr int kDepth = 2;

  static WAVLM_FAST_INLINE Floats multiply_add(Floats sum, Floats column, Word word) {
    return _mm512_dpbf16_ps(sum, (__m512bh)column, (__m512bh)_mm512_set1_ps(word));
  }
};
using OfBf16 = Pair;
#else
using OfBf16 = Single;
#endif

// acc[r][n] += sum over k < words of rows[r][k * step] * panel[k][n], a panel being [words][N * kLanes].
template <class Element, int N>
WAVLM_FAST_INLINE void multiply(const Word* const (&rows)[kRows], std::int64_t step, const float* panel,
                                std::int64_t words, Floats (&acc)[kRows][N]) {
  std::int64_t at = 0;
  for (std::int64_t k = 0; k < words; ++k, at += step, panel += N * kLanes) {
    Floats column[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) column[n] = load(panel + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Word word = rows[r][at];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = Element::multiply_add(acc[r][n], column[n], word);
    }
  }
}

// Not std's: a function template of a shared header, compiled here for this level, may become everybody's copy.
constexpr std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

constexpr std::int64_t rounded_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
