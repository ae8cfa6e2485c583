// How rows of q, k and v are laid out for the products of csrc/tile.h.
#pragma once

#include "rows.h"
#include "tile.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {

// Words of two rows' numbers, `first` and `second` being widened.
WAVLM_FAST_INLINE Floats paired(Floats first, Floats second) {
  return floats_of(bits_of(first) >> 16 | bits_of(second));
}

// Words times a power of two.
template <class Element>
WAVLM_FAST_INLINE void multiply_words(float* words, std::int64_t count, float power) {
  for (std::int64_t i = 0; i < count; i += kLanes) {
    Floats value = load(words + i);
    if constexpr (Element::kDepth == 1) {
      value *= power;
    } else {
      const Floats first = floats_of(bits_of(value) << 16) * power;
      const Floats second = floats_of(bits_of(value) & 0xffff0000u) * power;
      value = paired(first, floats_of(bits_of(second) & 0xffff0000u));  // once more, where it has become denormal
    }
    store(words + i, value);
  }
}

// Rows of D numbers -> [rows][width] words.
template <class Element, class T>
WAVLM_FAST_INLINE void copy_rows(const T* from, std::int64_t stride, std::int64_t rows, std::int64_t D,
                                 std::int64_t width, float* to) {
  constexpr int kNumbers = Element::kDepth * kLanes;
  for (std::int64_t i = 0; i < rows; ++i, from += stride, to += width) {
    std::int64_t d = 0;
    float* at = to;
    for (; d + kNumbers <= D; d += kNumbers, at += kLanes) store(at, load_words<Element>(from + d));
    if (d < D) store(at, load_words<Element>(from + d, D - d));
  }
}

// Calls body(first, Vectors<n>{}) for the groups of n <= kVectors vectors that a row of `vectors` is cut into.
template <class Body>
WAVLM_FAST_INLINE void for_groups(std::int64_t vectors, const Body& body) {
  for (std::int64_t first = 0, left = vectors; left > 0; left = vectors - first) {
    if (left == 1) {
      body(first, Vectors<1>{});
      first += 1;
    } else if (left == 2 || left == 4) {  // a group of one would be slow
      body(first, Vectors<2>{});
      first += 2;
    } else {
      body(first, Vectors<3>{});
      first += 3;
    }
  }
}

// Rows of D numbers -> one panel [words of rows][n * kLanes] for every group of columns; a panel takes
// `most_words` * n * kLanes floats.
template <class Element, class T>
WAVLM_FAST_INLINE void copy_panels(const T* from, std::int64_t stride, std::int64_t rows, std::int64_t D,
                                   std::int64_t most_words, float* to) {
  for (std::int64_t i = 0; i < rows; i += Element::kDepth, from += Element::kDepth * stride) {
    const auto columns = [&](std::int64_t d, auto lanes) {
      if constexpr (Element::kDepth == 1) return lanes.load(from + d);
      return paired(lanes.load(from + d), i + 1 < rows ? lanes.load(from + stride + d) : Floats{});
    };
    for_groups(divided_up(D, kLanes), [&](std::int64_t first, auto group) {
      float* at = to + (first * most_words + i / Element::kDepth * group.count) * kLanes;
#pragma GCC unroll 4
      for (int n = 0; n < group.count; ++n, at += kLanes) {
        const std::int64_t d = (first + n) * kLanes;
        store(at, d + kLanes <= D ? columns(d, All{}) : columns(d, First{static_cast<int>(D - d)}));
      }
    });
  }
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
