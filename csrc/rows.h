// Rows of numbers as words for the products of csrc/tile.h: loaded, prefetched, turned into columns.
#pragma once

#include "tile.h"
#include "transpose.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {

// kLanes words of a row.
template <class Element, class T>
WAVLM_FAST_INLINE Floats load_words(const T* from) {
  if constexpr (Element::kDepth == 1) return load(from);
  Floats pairs;
  std::memcpy(&pairs, from, sizeof(pairs));
  return pairs;
}

// The same of a row that has `left` numbers left, zeros past its end.
template <class Element, class T>
WAVLM_FAST_INLINE Floats load_words(const T* from, std::int64_t left) {
  constexpr int kNumbers = Element::kDepth * kLanes;
  T buffer[kNumbers] = {};
  std::memcpy(buffer, from, least(left, kNumbers) * sizeof(T));
  return load_words<Element>(buffer);
}

// Rows that are needed soon. They lie pages apart, where no prefetcher of the hardware finds them.
template <class T>
WAVLM_FAST_INLINE void prefetch_rows(const T* from, std::int64_t stride, std::int64_t rows, std::int64_t D) {
  constexpr std::int64_t kLine = 64 / sizeof(T);
  for (std::int64_t i = 0; i < rows; ++i, from += stride) {
    for (std::int64_t d = 0; d < D; d += kLine) __builtin_prefetch(from + d, 0, 2);
  }
}

// Rows 0 .. kLanes - 1, kLanes words of each, row(r) being where they begin.
template <class Element, class Row>
WAVLM_FAST_INLINE void copy_square(const Row& row, std::int64_t columns, float* to) {
  Floats square[kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) square[r] = load_words<Element>(row(r));
  transpose(square);
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) store(to + r * columns, square[r]);
}

// Rows of D numbers, row(i) being one, -> [words][columns], words and `columns` being whole vectors, absent ones zero.
template <class Element, class Row>
WAVLM_FAST_INLINE void copy_transposed(const Row& row, std::int64_t rows, std::int64_t D, std::int64_t columns,
                                       float* to) {
  constexpr int kNumbers = Element::kDepth * kLanes;
  for (std::int64_t i = 0; i < columns; i += kLanes, to += kLanes) {
    for (std::int64_t d = 0; d < D; d += kNumbers) {
      float* at = to + d / Element::kDepth * columns;
      if (i + kLanes <= rows && d + kNumbers <= D) {
        copy_square<Element>([&](int r) { return row(i + r) + d; }, columns, at);
      } else {
        float part[kLanes * kLanes] = {};
        for (int r = 0; i + r < rows && r < kLanes; ++r) {
          store(part + r * kLanes, load_words<Element>(row(i + r) + d, D - d));
        }
        copy_square<Single>([&](int r) { return part + r * kLanes; }, columns, at);
      }
    }
  }
}

// The same of rows that lie `stride` numbers apart.
template <class Element, class T>
WAVLM_FAST_INLINE void copy_transposed(const T* from, std::int64_t stride, std::int64_t rows, std::int64_t D,
                                       std::int64_t columns, float* to) {
  copy_transposed<Element>([&](std::int64_t i) { return from + i * stride; }, rows, D, columns, to);
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
