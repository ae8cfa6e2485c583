// Products with packed weights: rows of x enter as scalars, weights as vectors of output channels.
//
// The sum over channels and taps is cut into runs of kWords. A run's weights stay in the first cache while all rows
// of the task pass by, and each run is summed from zero: the rounding error grows with the number of runs only.
#include "packed_conv.h"

#include "activation.h"
#include "tile.h"
#include "tiles.h"
#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {
namespace {

// 24 KB of weights with 16 lanes, and less than that with fewer.
constexpr std::int64_t kWords = kLanes == 16 ? 128 : 192;
// A task reads its weights once for this many rows.
constexpr std::int64_t kFrames = 128;
// Three frames each. A task's combinations of rows and its five sets of sums stay in the second cache.
constexpr std::int64_t kTriples = 16;

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

// [row][N * kLanes], rows `step` apart.
struct Sums {
  float* at;
  std::int64_t step;
  bool add;  // to what is there
};

// What multiplies: vectors in registers, or a unit of csrc/tiles.h.
struct Registers {};

// sums[t] (+)= rows[t] * panel for all rows, and done(t, count) when the `count` rows from t have their sums.
// Writes a whole number of tiles: sums of rows past the end are left with something that nobody reads.
template <int N, class AnyRows, class Done>
WAVLM_FAST_INLINE void pass(Registers, const AnyRows& rows, const float* panel, Sums sums, const Done& done) {
  using Element = typename ElementOf<typename AnyRows::Number>::Type;
  const std::int64_t words = rows.C / Element::kDepth;
  for (std::int64_t k = 0; k < words; k += kWords, sums.add = true) {
    const std::int64_t run = least(kWords, words - k);
    for (std::int64_t t = 0; t < rows.count; t += kRows) {
      const Word* row[kRows];
      for (int r = 0; r < kRows; ++r) {
        row[r] = reinterpret_cast<const Word*>(rows.at(least(t + r, rows.count - 1))) + k;
      }
      Floats acc[kRows][N] = {};
      multiply<Element>(row, 1, panel, run, acc);
      store_tile(acc, sums.add, sums.at + t * sums.step, sums.step);
      if (k + run == words) done(t, least(kRows, rows.count - t));
    }
    panel += run * N * kLanes;
  }
}

constexpr auto kNothing = [](std::int64_t, std::int64_t) {};

#if defined(WAVLM_FAST_TILES)
// Calls body(Vectors<n>{}) for n from 0 to N - 1.
template <int N, class Body>
WAVLM_FAST_INLINE void each_tile(const Body& body) {
  body(Vectors<0>{});
  if constexpr (N > 1) body(Vectors<1>{});
  if constexpr (N > 2) body(Vectors<2>{});
}

// Where the words of rows t .. t + count - 1 from k on lie so many bytes apart as `stride` then says.
inline const void* tile_of(const Rows<bf16>& rows, std::int64_t t, std::int64_t, std::int64_t k, std::int64_t, float*,
                           std::int64_t& stride) {
  stride = rows.row_step * sizeof(bf16);
  return rows.at(t) + 2 * k;
}

inline const void* tile_of(const ScatteredRows<bf16>& rows, std::int64_t t, std::int64_t count, std::int64_t k,
                           std::int64_t words, float* copy, std::int64_t& stride) {
  for (std::int64_t r = 0; r < count; ++r) std::memcpy(copy + r * words, rows.at(t + r) + 2 * k, words * sizeof(Word));
  stride = words * sizeof(Word);
  return copy;
}

// The same on tiles, whose columns are the panel as it lies. With one row of tiles at a time there are enough of them for
// each to be loaded while another one is multiplied. What is left of a run behind whole tiles is a run of its own, of
// narrower ones: nothing is read that does not belong to a row, and a row knows of no other.
template <int N, class Tiles, class AnyRows, class Done>
void pass(Tiles& tiles, const AnyRows& rows, const float* panel, Sums sums, const Done& done) {
  constexpr std::int64_t kColumnStride = N * kLanes * sizeof(float);
  static_assert(kLanes == kTileWords && kWords % (2 * kTileWords) == 0);
  const std::int64_t words = rows.C / 2, sum_stride = sums.step * sizeof(float);
  alignas(64) float copy[kTileRows * kWords];
  for (std::int64_t k = 0, run; k < words; k += run, sums.add = true) {
    run = least(kWords, words - k);
    run = run < kTileWords ? run : run / kTileWords * kTileWords;
    const std::int64_t step = least(run, kTileWords);
    for (std::int64_t t = 0, count; t < rows.count; t += count) {
      count = least(kTileRows, rows.count - t);
      tiles.shape(static_cast<int>(count), static_cast<int>(step));
      float* to = sums.at + t * sums.step;
      each_tile<N>([&](auto n) {
        if (sums.add) {
          tiles.template load<kSumTile + n.count>(to + n.count * kLanes, sum_stride);
        } else {
          tiles.template zero<kSumTile + n.count>();
        }
      });
      std::int64_t stride;
      const char* from = static_cast<const char*>(tile_of(rows, t, count, k, run, copy, stride));
      const float* columns = panel;
      const auto multiply = [&](auto row) {
        tiles.template load<row.count>(from, stride);
        each_tile<N>([&](auto n) {
          tiles.template load<kColumnTile + n.count>(columns + n.count * kLanes, kColumnStride);
          tiles.template multiply_add<kSumTile + n.count, row.count, kColumnTile + n.count>();
        });
        from += step * sizeof(Word), columns += step * N * kLanes;
      };
      for (std::int64_t at = 0; at < run; at += 2 * step) {
        multiply(Vectors<kRowTile>{});
        if (at + step < run) multiply(Vectors<kRowTile + 1>{});
      }
      each_tile<N>([&](auto n) { tiles.template store<kSumTile + n.count>(to + n.count * kLanes, sum_stride); });
      if (k + run == words) done(t, count);
    }
    panel += run * N * kLanes;
  }
}
#endif

// Where the sums of a group of columns go.
template <class Out>
struct Columns {
  const float* bias;
  const float* gain;
  const float* offset;
  const Out* residual;  // of the first row, as out
  Out* out;
  std::int64_t channels, columns;
  int activation;
};

template <class In, class Out>
Columns<Out> columns_of(const PackedConv<In, Out>& call, std::int64_t first, std::int64_t column) {
  return {call.bias ? call.bias + column : nullptr,
          call.gain ? call.gain + column : nullptr,
          call.gain ? call.offset + column : nullptr,
          call.residual ? call.residual + first * call.channels + column : nullptr,
          call.out + first * call.channels + column,
          call.channels,
          least(kColumns, call.channels - column),
          call.activation};
}

template <Activation activation, class Out, class SumOf>
void write_activated(const Columns<Out>& to, std::int64_t first, std::int64_t count, const SumOf& sum_of) {
  std::int64_t at = first * to.channels;
  for (std::int64_t t = first; t < first + count; ++t, at += to.channels) {
    each_vector(to.columns, [&](std::int64_t i, auto lanes) {
      Floats sum = sum_of(t, i);
      if (to.bias) sum += lanes.load(to.bias + i);
      if (to.gain) sum = sum * lanes.load(to.gain + i) + lanes.load(to.offset + i);
      sum = activate<activation>(sum);
      if (to.residual) sum += lanes.load(to.residual + at + i);
      lanes.store(to.out + at + i, sum);
    });
  }
}

// Rows first .. first + count - 1; sum_of(row, i) gives the sums of the columns from i.
template <class Out, class SumOf>
void write(const Columns<Out>& to, std::int64_t first, std::int64_t count, const SumOf& sum_of) {
  with_activation(to.activation, [&](auto of) { write_activated<of.activation>(to, first, count, sum_of); });
}

// One group of N vectors of columns.
template <int N, class Engine, class In, class Out, class AnyRows>
void direct_group(Engine& engine, const PackedConv<In, Out>& call, AnyRows rows, const float* panel,
                  const Columns<Out>& to, float* sums) {
  constexpr std::int64_t width = N * kLanes;
  const std::int64_t panel_size = call.C / ElementOf<In>::Type::kDepth * width;
  const auto finish = [&](std::int64_t t, std::int64_t count) {
    write(to, t, count, [&](std::int64_t row, std::int64_t i) { return load(sums + row * width + i); });
  };
  for (std::int64_t tap = 0; tap + 1 < call.taps; ++tap, rows.x += call.tap_step, panel += panel_size) {
    pass<N>(engine, rows, panel, {sums, width, tap > 0}, kNothing);
  }
  pass<N>(engine, rows, panel, {sums, width, call.taps > 1}, finish);
}

// The packed weights of the group that begins with `column`.
template <class In, class Out>
const float* panel_of(const PackedConv<In, Out>& call, std::int64_t taps, std::int64_t column) {
  return static_cast<const float*>(call.packed) + column * taps * (call.C / ElementOf<In>::Type::kDepth);
}

template <class Engine, class In, class Out>
void direct(const PackedConv<In, Out>& call, std::int64_t first, std::int64_t count, std::int64_t group_begin,
            std::int64_t group_end, float* scratch) {
  Engine engine;
  each_group(call.channels, group_begin, group_end, [&](std::int64_t column, auto vectors) {
    const auto group = [&](auto rows) {
      const float* panel = panel_of(call, call.taps, column);
      direct_group<vectors.count>(engine, call, rows, panel, columns_of(call, first, column), scratch);
    };
    if (call.rows) {
      group(ScatteredRows<In>{call.x, call.rows + first, count, call.C});
    } else {
      group(Rows<In>{call.x + first * call.row_step, call.row_step, count, call.C});
    }
  });
}

// Minimal filtering of three taps at a stride of two. Of the input, odd rows o meet the middle tap only, and even rows e
// the two outer ones: over three outputs that is a filter of two taps, which needs four products instead of six:
//   y0 = o0 w1 + (e0 - e2) w0 + p + m        p = (e1 + e2) (w0 + w2) / 2
//   y1 = o1 w1                + p - m        m = (e2 - e1) (w0 - w2) / 2
//   y2 = o2 w1 + (e3 - e1) w2 + p + m
// Seven products instead of nine. Only neighbouring frames are combined: they are of like magnitude, so that a quiet
// frame does not inherit the rounding errors of a loud one, and errors grow by a tenth. What is not finite in e2, or
// becomes so in a sum, would reach y0, which does not depend on it: such a block is computed again in the direct form,
// whose taps are among the packed ones.
enum Tap { kMiddle, kFirst, kLast, kHalfSum, kHalfDifference, kTaps };

// [triples][C] each.
template <class In>
struct Combinations {
  In* of[kTaps];  // kMiddle has none: odd rows are read where they are
};

// The rows of x are 0 .. last; what the last triple would read beyond belongs to outputs that nobody reads.
template <class In>
void combine(const In* x, std::int64_t last, std::int64_t triples, std::int64_t C, const Combinations<In>& to) {
  for (std::int64_t i = 0; i < triples; ++i) {
    const In* e[4];
    for (int k = 0; k < 4; ++k) e[k] = x + least(6 * i + 2 * k, last) * C;
    sweep(C, [&](std::int64_t c, auto lanes, int) {
      const Floats e0 = lanes.load(e[0] + c), e1 = lanes.load(e[1] + c);
      const Floats e2 = lanes.load(e[2] + c), e3 = lanes.load(e[3] + c);
      const std::int64_t at = i * C + c;
      lanes.store(to.of[kFirst] + at, e0 - e2);
      lanes.store(to.of[kLast] + at, e3 - e1);
      lanes.store(to.of[kHalfSum] + at, e1 + e2);
      lanes.store(to.of[kHalfDifference] + at, e2 - e1);
    });
  }
}

constexpr std::int64_t kSumRows = 3 * kTriples;
static_assert(kTriples % kRows == 0, "sums are written by whole tiles");

template <int N, class Engine, class In, class Out>
void filtered_group(Engine& engine, const PackedConv<In, Out>& call, std::int64_t first, std::int64_t count,
                    const Combinations<In>& rows, const float* panel, const Columns<Out>& to, float* sums) {
  constexpr std::int64_t width = N * kLanes;
  const std::int64_t C = call.C, panel_size = C / ElementOf<In>::Type::kDepth * width, triples = (count + 2) / 3;
  const auto weights_of = [&](Tap tap) { return panel + tap * panel_size; };
  const auto rows_of = [&](Tap tap) { return Rows<In>{rows.of[tap], C, triples, C}; };
  float* half_sums = sums + kSumRows * width;
  float* half_differences = half_sums + kTriples * width;
  const In* odd = call.x + first * call.row_step + C;
  pass<N>(engine, Rows<In>{odd, call.row_step, count, C}, weights_of(kMiddle), {sums, width, false}, kNothing);
  pass<N>(engine, rows_of(kFirst), weights_of(kFirst), {sums, 3 * width, true}, kNothing);
  pass<N>(engine, rows_of(kLast), weights_of(kLast), {sums + 2 * width, 3 * width, true}, kNothing);
  pass<N>(engine, rows_of(kHalfSum), weights_of(kHalfSum), {half_sums, width, false}, kNothing);
  pass<N>(engine, rows_of(kHalfDifference), weights_of(kHalfDifference), {half_differences, width, false}, kNothing);
  Floats zeros = {};
  write(to, 0, count, [&](std::int64_t row, std::int64_t i) {
    const std::int64_t at = row / 3 * width + i;
    const Floats difference = load(half_differences + at);
    const Floats sum =
        load(sums + row * width + i) + (load(half_sums + at) + (row % 3 == 1 ? -difference : difference));
    watch(zeros, sum);
    return sum;
  });
  if (all_finite(zeros)) return;
  constexpr Tap taps[] = {kFirst, kMiddle, kLast};
  for (int k = 0; k < 3; ++k) {
    pass<N>(engine, Rows<In>{odd + (k - 1) * C, call.row_step, count, C}, weights_of(taps[k]), {sums, width, k > 0},
            kNothing);
  }
  write(to, 0, count, [&](std::int64_t row, std::int64_t i) { return load(sums + row * width + i); });
}

template <class Engine, class In, class Out>
void filtered(const PackedConv<In, Out>& call, std::int64_t first, std::int64_t count, std::int64_t group_begin,
              std::int64_t group_end, float* scratch) {
  const std::int64_t triples = (count + 2) / 3;
  Combinations<In> rows{};
  float* at = scratch;
  for (int tap = kFirst; tap < kTaps; ++tap, at += kTriples * rounded_up(call.C, kLanes)) {
    rows.of[tap] = reinterpret_cast<In*>(at);
  }
  Engine engine;
  combine(call.x + first * call.row_step, 2 * count, triples, call.C, rows);
  each_group(call.channels, group_begin, group_end, [&](std::int64_t column, auto vectors) {
    const float* panel = panel_of(call, kTaps, column);
    filtered_group<vectors.count>(engine, call, first, count, rows, panel, columns_of(call, first, column), at);
  });
}

std::size_t scratch_size(std::int64_t C, bool is_filtered) {
  if (!is_filtered) return (kFrames + kTileRows) * kColumns;
  return 4 * kTriples * rounded_up(C, kLanes) + (kSumRows + 2 * kTriples) * kColumns;
}

template <class In, class Out>
constexpr PackedConvVariants<In, Out> variants() {
  if constexpr (ElementOf<In>::Type::kDepth * sizeof(In) != sizeof(Word)) {
    return {};
  } else {
    return {direct<Registers, In, Out>, filtered<Registers, In, Out>};
  }
}

}  // namespace

const PackedConvKernels& packed_conv_kernels() {
  static constexpr PackedConvKernels kernels = {
    kColumns,
    kLanes,
    kRows,
    kFrames,
    3 * kTriples,
    scratch_size,
    variants<float, float>(),
    variants<float, bf16>(),
    variants<bf16, bf16>(),
#if defined(WAVLM_FAST_TILES)
    {direct<Unit, bf16, bf16>, filtered<Unit, bf16, bf16>},
    {direct<EmulatedUnit, bf16, bf16>, filtered<EmulatedUnit, bf16, bf16>}
#else
    {},
    {}
#endif
  };
  return kernels;
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
