// The register tile of every matrix product here: kRows rows of the left operand, which enter as scalars, times
// kVectors vectors of columns of the right one.
#pragma once

#include "vec.h"

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

// How many rows a tile has, as a type.
template <int R>
struct TileRows {
  static constexpr int count = R;
};

// Calls body(TileRows<r>{}) for a tile that has room for the rows that are left: the last one need not be a whole one.
template <class Body>
WAVLM_FAST_INLINE void with_rows(std::int64_t left, const Body& body) {
  if (left > kRows / 2) return body(TileRows<kRows>{});
  if (left > kRows / 4) return body(TileRows<kRows / 2>{});
  body(TileRows<kRows / 4>{});
}

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
template <class Element, int R, int N>
WAVLM_FAST_INLINE void multiply(const Word* const (&rows)[R], std::int64_t step, const float* panel, std::int64_t words,
                                Floats (&acc)[R][N]) {
  std::int64_t at = 0;
  for (std::int64_t k = 0; k < words; ++k, at += step, panel += N * kLanes) {
    Floats column[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) column[n] = load(panel + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Word word = rows[r][at];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = Element::multiply_add(acc[r][n], column[n], word);
    }
  }
}

// to[r][n] (+)= acc[r][n], for `count` of the rows, `step` apart.
template <int R, int N>
WAVLM_FAST_INLINE void store_tile(const Floats (&acc)[R][N], bool add, float* to, std::int64_t step,
                                  std::int64_t count = R) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    if (r >= count) break;
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      float* at = to + r * step + n * kLanes;
      store(at, add ? load(at) + acc[r][n] : acc[r][n]);
    }
  }
}

// Not std's: a function template of a shared header, compiled here for this level, may become everybody's copy.
constexpr std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

constexpr std::int64_t divided_up(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

constexpr std::int64_t rounded_up(std::int64_t n, std::int64_t to) { return divided_up(n, to) * to; }

// Calls body(Vectors<n>{}) for the n vectors of a group of columns, at most kVectors.
template <class Body>
WAVLM_FAST_INLINE void with_vectors(std::int64_t n, const Body& body) {
  if (n == 3) body(Vectors<3>{});
  if (n == 2) body(Vectors<2>{});
  if (n == 1) body(Vectors<1>{});
}

// Calls body(column, Vectors<n>{}) for the groups of kColumns columns from begin to end, the last one of fewer vectors.
template <class Body>
WAVLM_FAST_INLINE void each_group(std::int64_t columns, std::int64_t begin, std::int64_t end, const Body& body) {
  for (std::int64_t column = begin * kColumns; column < least(end * kColumns, columns); column += kColumns) {
    with_vectors(divided_up(least(kColumns, columns - column), kLanes), [&](auto group) { body(column, group); });
  }
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
