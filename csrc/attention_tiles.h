// The two products of attention on tiles (csrc/tiles.h): what is laid out or summed another way than in registers.
//
// Scores are rows of keys times columns of queries, as there. Sums over keys are turned: rows of channels times columns
// of weights, which lie as the softmax leaves them, a pair of keys in each lane of a query. So it is the values that are
// turned, once for all blocks of queries of a task, and the sums when a block is done.
//
// All tiles are whole ones. Numbers past the end of a row or of the keys are zeros in both operands.
#pragma once

#include "attention_block.h"
#include "tiles.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {

// Rows of D numbers -> [channels][step] words, each of a pair of rows; whole vectors of channels and of words, zeros where
// there is no number or no row.
template <class T>
void copy_pairs_of_rows(const T* from, std::int64_t stride, std::int64_t rows, std::int64_t D, std::int64_t step,
                        float* to) {
  for (std::int64_t first = 0; first < rows; first += 2 * kLanes) {
    for (std::int64_t d = 0; d < D; d += kLanes) {
      const auto numbers = [&](std::int64_t row) {
        return row < rows ? load_some(from + row * stride + d, D - d) : Floats{};
      };
      Floats square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) square[i] = paired(numbers(first + 2 * i), numbers(first + 2 * i + 1));
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + (d + i) * step + first / 2, square[i]);
    }
  }
}

#if defined(WAVLM_FAST_TILES)

// to = rows * columns, [rows][N * kLanes] for whole tiles of rows, which lie `stride` words apart; columns are
// [words][N * kLanes].
template <int N, class Unit>
void multiply_whole(Unit& unit, const float* rows, std::int64_t stride, std::int64_t count, const float* columns,
                    std::int64_t words, float* to) {
  unit.shape(kTileRows, kTileWords);
  for (std::int64_t first = 0; first < count; first += kTileRows) {
    zero_sums<N>(unit);
    multiply_tiles<N>(unit, rows + first * stride, stride * sizeof(Word), columns, words, kTileWords, [] {});
    store_sums<N>(unit, to + first * N * kLanes, N * kLanes * sizeof(float));
  }
}

// As in attention_block.h. Of keys and their scores, whole tiles are read and written. All products come first: what a
// tile has stored is not loaded at once.
template <class Element, int N, class Unit>
void score(Unit& unit, const Keys& keys, const float* q, const float* gates, const float* bias, float* to,
           Floats (&top)[N]) {
  multiply_whole<N>(unit, keys.rows, keys.stride, keys.count, q, keys.words, to);
  Floats gate[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) gate[n] = load(gates + n * kLanes);
  for (std::int64_t key = 0; key < keys.count; ++key, to += N * kLanes) {
    Floats sums[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[n] = load(to + n * kLanes);
    add_bias(sums, gate, bias - key, to, top);
  }
}

// sums = sums * fade + values^T weights, [channels][N * kLanes]; the old sums count only if `add`. Values are turned, of
// weights there are so many pairs of keys and room for whole tiles; `products` has room for as many numbers as sums.
template <int N, class Unit>
void accumulate_turned(Unit& unit, const float* values, std::int64_t stride, std::int64_t channels, float* weights,
                       std::int64_t words, bool add, const float* fade, float* products, float* sums) {
  const std::int64_t whole = rounded_up(words, kTileWords);
  std::memset(weights + words * N * kLanes, 0, (whole - words) * N * kLanes * sizeof(float));
  multiply_whole<N>(unit, values, stride, channels, weights, whole, products);
  Floats keep[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) keep[n] = load(fade + n * kLanes);
  for (std::int64_t channel = 0; channel < channels; ++channel, products += N * kLanes, sums += N * kLanes) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const Floats product = load(products + n * kLanes);
      store(sums + n * kLanes, add ? load(sums + n * kLanes) * keep[n] + product : product);
    }
  }
}

#endif

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
