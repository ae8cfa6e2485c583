// Tiles of bfloat16, as AMX has them: up to 16 rows of 64 bytes, multiplied in pairs and summed in float32. Two classes
// with one interface: the unit itself, and the same arithmetic written out, so that the kernels on tiles are tested on
// CPUs without one. Assembler instead of intrinsics: those take a tile's number as a literal only, not from a template.
#pragma once

#include "tile.h"

// setup.py asks whether the assembler knows the instructions; who runs them is asked in csrc/tile_unit.cpp.
#if defined(WAVLM_FAST_HAVE_TILES) && defined(__AVX512BF16__) && defined(__linux__)
#define WAVLM_FAST_TILES
#endif

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {

// What multiplies: vectors in registers, or a unit of this file.
struct Registers {};

constexpr int kTileRows = 16;
constexpr int kTileWords = 16;  // of a row: 32 bfloat16, or 16 float32
constexpr int kSumTile = 0;     // three for sums, of as many vectors of columns
constexpr int kColumnTile = 3;  // three
constexpr int kRowTile = 6;     // two

#if defined(WAVLM_FAST_TILES)

// The unit of the processor. Tiles have a shape from `shape` on, and cost whoever switches threads until the end.
class Unit {
 public:
  Unit() = default;
  Unit(const Unit&) = delete;
  ~Unit() {
    if (rows_) asm volatile("tilerelease" ::: "memory");
  }

  // Sums become `rows` rows, and what they are made of `words` words along the summed axis. No tile keeps its numbers.
  WAVLM_FAST_INLINE void shape(int rows, int words) {
    if (rows == rows_ && words == words_) return;
    rows_ = rows, words_ = words;
    struct alignas(64) {
      std::uint8_t palette = 1, start = 0, none[14] = {};
      std::uint16_t row_bytes[16] = {};
      std::uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = i < kRowTile ? 4 * kLanes : 4 * words;
      config.rows[i] = i < kColumnTile || i >= kRowTile ? rows : words;
    }
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }

  template <int I>
  WAVLM_FAST_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(I));
  }

  // Rows are `stride` bytes apart.
  template <int I>
  WAVLM_FAST_INLINE void load(const void* from, std::int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(I), "r"(from), "r"(stride) : "memory");
  }

  template <int I>
  WAVLM_FAST_INLINE void store(float* to, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(I), "r"(to), "r"(stride) : "memory");
  }

  // Sum += rows * columns.
  template <int Sum, int Row, int Column>
  WAVLM_FAST_INLINE void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Row), "i"(Column));
  }

 private:
  int rows_ = 0, words_ = 0;
};

// The unit's arithmetic: first and second numbers of pairs are summed apart, from zero in each product of two tiles.
// It takes denormal numbers for zero and makes none, which is said here for what enters and for sums; fused or not,
// a product of two bfloat16 rounds nothing.
class EmulatedUnit {
 public:
  void shape(int rows, int words) { rows_ = rows, words_ = words; }

  template <int I>
  void zero() {
    for (int r = 0; r < rows_of(I); ++r) std::memset(tiles_[I][r], 0, sizeof(tiles_[I][r]));
  }

  template <int I>
  void load(const void* from, std::int64_t stride) {
    for (int r = 0; r < rows_of(I); ++r) {
      std::memcpy(tiles_[I][r], static_cast<const char*>(from) + r * stride, bytes_of(I));
    }
  }

  template <int I>
  void store(float* to, std::int64_t stride) {
    for (int r = 0; r < rows_of(I); ++r) {
      std::memcpy(reinterpret_cast<char*>(to) + r * stride, tiles_[I][r], bytes_of(I));
    }
  }

  template <int Sum, int Row, int Column>
  void multiply_add() {
    for (int r = 0; r < rows_; ++r) {
      Floats first = {}, second = {};
      for (int k = 0; k < words_; ++k) {
        const Words column = bits_of(WAVLM_FAST_ISA::load(tiles_[Column][k])),
                    row = bits_of(splat_bits(tiles_[Row][r][k]));
        first = flushed(first + flushed(floats_of(row << 16)) * flushed(floats_of(column << 16)));
        second = flushed(second + flushed(floats_of(row & 0xffff0000u)) * flushed(floats_of(column & 0xffff0000u)));
      }
      float* to = tiles_[Sum][r];
      WAVLM_FAST_ISA::store(to, flushed(flushed(WAVLM_FAST_ISA::load(to)) + flushed(first + second)));
    }
  }

 private:
  // Bits of anything: arithmetic on them could change a NaN.
  static Floats splat_bits(float word) {
    Words bits;
    for (int i = 0; i < kLanes; ++i) std::memcpy(reinterpret_cast<char*>(&bits) + 4 * i, &word, 4);
    return floats_of(bits);
  }

  static Floats flushed(Floats value) { return (bits_of(value) & 0x7f800000u) == 0u ? value * 0.0f : value; }

  int rows_of(int tile) const { return tile < kColumnTile || tile >= kRowTile ? rows_ : words_; }
  int bytes_of(int tile) const { return tile < kRowTile ? 4 * kLanes : 4 * words_; }

  int rows_ = 0, words_ = 0;
  alignas(64) float tiles_[8][kTileRows][kTileWords];
};

// Calls body(Vectors<n>{}) for n from 0 to N - 1.
template <int N, class Body>
WAVLM_FAST_INLINE void each_tile(const Body& body) {
  body(Vectors<0>{});
  if constexpr (N > 1) body(Vectors<1>{});
  if constexpr (N > 2) body(Vectors<2>{});
}

// N tiles of sums beside each other, of floats that are a row `stride` bytes apart.
template <int N, class Unit>
WAVLM_FAST_INLINE void zero_sums(Unit& unit) {
  each_tile<N>([&](auto n) { unit.template zero<kSumTile + n.count>(); });
}

template <int N, class Unit>
WAVLM_FAST_INLINE void load_sums(Unit& unit, const float* from, std::int64_t stride) {
  each_tile<N>([&](auto n) { unit.template load<kSumTile + n.count>(from + n.count * kLanes, stride); });
}

template <int N, class Unit>
WAVLM_FAST_INLINE void store_sums(Unit& unit, float* to, std::int64_t stride) {
  each_tile<N>([&](auto n) { unit.template store<kSumTile + n.count>(to + n.count * kLanes, stride); });
}

// Sums += rows * columns, [words][N * kLanes], for words in steps of as many as a tile has; before each `ahead` is
// called. With one row of tiles at a time there are enough of them for each to be loaded while another is multiplied.
template <int N, class Unit, class Ahead>
WAVLM_FAST_INLINE void multiply_tiles(Unit& unit, const Word* rows, std::int64_t stride, const float* columns,
                                      std::int64_t words, std::int64_t step, const Ahead& ahead) {
  constexpr std::int64_t kColumnStride = N * kLanes * sizeof(float);
  static_assert(kLanes == kTileWords);
  const auto multiply = [&](auto row) {
    ahead();
    unit.template load<row.count>(rows, stride);
    each_tile<N>([&](auto n) {
      unit.template load<kColumnTile + n.count>(columns + n.count * kLanes, kColumnStride);
      unit.template multiply_add<kSumTile + n.count, row.count, kColumnTile + n.count>();
    });
    rows += step, columns += step * N * kLanes;
  };
  for (std::int64_t at = 0; at < words; at += 2 * step) {
    multiply(Vectors<kRowTile>{});
    if (at + step < words) multiply(Vectors<kRowTile + 1>{});
  }
}

#endif

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
