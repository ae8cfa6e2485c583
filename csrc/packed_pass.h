// One pass of rows by weights: rows enter as scalars, weights as vectors of output channels.
//
// The summed axis is cut into runs of kWords. A run's weights stay in the first cache while all rows pass by, and each run
// is summed from zero: the rounding error grows with the number of runs only. Weights of the next run are fetched
// meanwhile.
#pragma once

#include "rows.h"
#include "tile.h"
#include "tiles.h"
#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {

// 24 KB of weights with 16 lanes, and less than that with fewer.
constexpr std::int64_t kWords = kLanes == 16 ? 128 : 192;
// Words of a tile between which weights are fetched ahead.
constexpr std::int64_t kSlice = 16;

template <class In>
struct ElementOf {
  using Type = Single;
};
template <>
struct ElementOf<bf16> {
  using Type = OfBf16;
};

// Rows of C numbers, row_step apart.
template <class In>
struct Rows {
  using Number = In;
  const In* x;
  std::int64_t row_step, count, C;

  WAVLM_FAST_INLINE const In* at(std::int64_t t) const { return x + t * row_step; }
};

// Rows anywhere. A type of its own: where windows are short, to look up their places costs a tenth of the product.
template <class In>
struct ScatteredRows {
  using Number = In;
  const In* x;
  const std::int64_t* starts;
  std::int64_t count, C;

  WAVLM_FAST_INLINE const In* at(std::int64_t t) const { return x + starts[t]; }
};

// Whether bfloat16 is multiplied as float32, for want of products of its own.
template <class In>
constexpr bool kWidens = ElementOf<In>::Type::kDepth * sizeof(In) != sizeof(Word);

template <class In>
WAVLM_FAST_INLINE void copy_words(const In* from, std::int64_t words, Word* to) {
  if constexpr (kWidens<In>) {
    each_vector(words, [&](std::int64_t i, auto lanes) { lanes.store(to + i, lanes.load(from + i)); });
  } else {
    std::memcpy(to, from, words * sizeof(Word));
  }
}

// [row][N * kLanes], rows `step` apart.
struct Sums {
  float* at;
  std::int64_t step;
  bool add;  // to what is there
};

// A share, one of `shares`, of the numbers from `at`, into the second cache.
WAVLM_FAST_INLINE void fetch(const float* at, std::int64_t size, std::int64_t share, std::int64_t shares) {
  for (std::int64_t i = size * share / shares; i < size * (share + 1) / shares; i += 64 / sizeof(float)) {
    __builtin_prefetch(at + i, 0, 2);
  }
}

// Weights of a group of columns and one tap: runs of words, each [run][N * kLanes].
template <int N>
struct Packed {
  const float* at;

  WAVLM_FAST_INLINE const float* run(std::int64_t k, std::int64_t) const { return at + k * N * kLanes; }
  // As below; behind the last run lies another tap or group.
  WAVLM_FAST_INLINE void prefetch(std::int64_t k, std::int64_t, std::int64_t share, std::int64_t shares) const {
    fetch(at + k * N * kLanes, kWords * N * kLanes, share, shares);
  }
};

// The same as the layer has them, a channel a row: a weight that learns changes before a copy of it has paid.
template <int N, class In>
struct Unpacked {
  const In* at;
  std::int64_t step, columns;
  float* panel;

  static constexpr int kDepth = ElementOf<In>::Type::kDepth;
  static_assert(kWords % kLanes == 0, "panels are written by whole vectors of words");

  WAVLM_FAST_INLINE const float* run(std::int64_t k, std::int64_t count) const {
    copy_transposed<typename ElementOf<In>::Type>(at + k * kDepth, step, columns, count * kDepth, N * kLanes, panel);
    return panel;
  }

  // A share, one of `shares`, of the run that comes next.
  WAVLM_FAST_INLINE void prefetch(std::int64_t k, std::int64_t count, std::int64_t share, std::int64_t shares) const {
    const std::int64_t first = columns * share / shares, last = columns * (share + 1) / shares;
    prefetch_rows(at + first * step + k * kDepth, step, last - first, count * kDepth);
  }
};

// sums[t] (+)= words of row t * panel for a run of words, words_of(t) being where those are, and done(t, rows) when so
// many rows from t have their sums. Writes a whole number of tiles: sums of rows past the end are left with something
// that nobody reads. ahead(share, shares) fetches a share of what is needed next.
template <class Element, int N, class WordsOf, class Ahead, class Done>
WAVLM_FAST_INLINE void pass_run(Registers, const WordsOf& words_of, std::int64_t count, const float* panel,
                                std::int64_t run, const Ahead& ahead, Sums sums, const Done& done) {
  const std::int64_t shares = divided_up(count, kRows) * divided_up(run, kSlice);
  std::int64_t share = 0;
  for (std::int64_t t = 0; t < count; t += kRows) {
    with_rows(count - t, [&](auto rows) {
      constexpr int R = rows.count;
      const Word* row[R];
      for (int r = 0; r < R; ++r) row[r] = words_of(least(t + r, count - 1));
      Floats acc[R][N] = {};
      for (std::int64_t at = 0; at < run; at += kSlice) {
        ahead(share++, shares);
        multiply<Element>(row, 1, panel + at * N * kLanes, least(kSlice, run - at), acc);
        for (int r = 0; r < R; ++r) row[r] += kSlice;
      }
      store_tile(acc, sums.add, sums.at + t * sums.step, sums.step);
    });
    done(t, least(kRows, count - t));
  }
}

#if defined(WAVLM_FAST_TILES)
// Words of the rows from t on, which then lie `stride` bytes apart: where they are, if evenly, else in a copy.
template <class WordsOf>
const Word* even_rows(const WordsOf& words_of, std::int64_t t, std::int64_t count, std::int64_t words, float* copy,
                      std::int64_t& stride) {
  const auto at = [&](std::int64_t r) { return reinterpret_cast<const char*>(words_of(t + r)); };
  const std::int64_t step = count > 1 ? at(1) - at(0) : 0;
  bool even = true;
  for (std::int64_t r = 2; r < count; ++r) even = even && at(r) - at(r - 1) == step;
  stride = step;
  if (even) return words_of(t);
  for (std::int64_t r = 0; r < count; ++r) std::memcpy(copy + r * words, at(r), words * sizeof(Word));
  stride = words * sizeof(Word);
  return copy;
}

// The same on tiles, whose columns are the panel as it lies. What is left of a run behind whole tiles is a run of its
// own, of narrower ones: nothing is read that does not belong to a row, and a row knows of no other.
template <class Element, int N, class Unit, class WordsOf, class Ahead, class Done>
WAVLM_FAST_INLINE void pass_run(Unit& unit, const WordsOf& words_of, std::int64_t count, const float* panel,
                                std::int64_t run, const Ahead& ahead, Sums sums, const Done& done) {
  static_assert(kSlice == kTileWords && kWords % (2 * kTileWords) == 0);
  const std::int64_t sum_stride = sums.step * sizeof(float);
  const std::int64_t shares = divided_up(count, kTileRows) * divided_up(run, kSlice);
  std::int64_t share = 0;
  alignas(64) float copy[kTileRows * kWords];
  for (std::int64_t begin = 0, words; begin < run; begin += words, sums.add = true) {
    words = run - begin < kTileWords ? run - begin : (run - begin) / kTileWords * kTileWords;
    const std::int64_t step = least(words, kTileWords);
    const auto part_of = [&](std::int64_t t) { return words_of(t) + begin; };
    for (std::int64_t t = 0, rows; t < count; t += rows) {
      rows = least(kTileRows, count - t);
      unit.shape(static_cast<int>(rows), static_cast<int>(step));
      float* to = sums.at + t * sums.step;
      if (sums.add) {
        load_sums<N>(unit, to, sum_stride);
      } else {
        zero_sums<N>(unit);
      }
      std::int64_t stride;
      const Word* from = even_rows(part_of, t, rows, words, copy, stride);
      multiply_tiles<N>(unit, from, stride, panel + begin * N * kLanes, words, step, [&] { ahead(share++, shares); });
      store_sums<N>(unit, to, sum_stride);
      if (begin + words == run) done(t, rows);
    }
  }
}
#endif

// sums[t] (+)= rows[t] * weights for all rows, and done(t, rows) as there.
template <int N, class Engine, class AnyRows, class Weights, class Done>
WAVLM_FAST_INLINE void pass(Engine& engine, const AnyRows& rows, const Weights& weights, Sums sums, const Done& done) {
  using Element = typename ElementOf<typename AnyRows::Number>::Type;
  const std::int64_t words = rows.C / Element::kDepth;
  for (std::int64_t k = 0; k < words; k += kWords, sums.add = true) {
    const std::int64_t run = least(kWords, words - k);
    const std::int64_t next = least(kWords, words - k - run);
    const auto words_of = [&](std::int64_t t) { return reinterpret_cast<const Word*>(rows.at(t)) + k; };
    const auto ahead = [&](std::int64_t share, std::int64_t shares) { weights.prefetch(k + run, next, share, shares); };
    const auto done_with_run = [&](std::int64_t t, std::int64_t count) {
      if (k + run == words) done(t, count);
    };
    pass_run<Element, N>(engine, words_of, rows.count, weights.run(k, run), run, ahead, sums, done_with_run);
  }
}

constexpr auto kNothing = [](std::int64_t, std::int64_t) {};

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
