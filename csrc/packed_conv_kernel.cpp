// Products with packed weights: rows of x enter as scalars, weights as vectors of output channels.
//
// The sum over channels and taps is cut into runs of kWords. A run's weights stay in the first cache while all rows
// of the task pass by, and each run is summed from zero: the rounding error grows with the number of runs only.
#include "packed_conv.h"

#include "activation.h"
#include "rows.h"
#include "tile.h"
#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {
namespace {

// 24 KB of weights with 16 lanes, and less than that with fewer.
constexpr std::int64_t kWords = kLanes == 16 ? 128 : 192;
// A task reads its weights once for this many rows.
constexpr std::int64_t kFrames = 128;
// Where it packs them itself, for so many.
constexpr std::int64_t kFramesOfUnpacked = 4 * kFrames;
constexpr std::int64_t kSumsOfTask = (kFramesOfUnpacked + kRows) * kColumns;
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

// Weights of a group of columns and one tap: runs of words, each [run][N * kLanes].
template <int N>
struct Packed {
  const float* at;

  WAVLM_FAST_INLINE const float* run(std::int64_t k, std::int64_t) const { return at + k * N * kLanes; }
  WAVLM_FAST_INLINE void prefetch(std::int64_t, std::int64_t, std::int64_t, std::int64_t) const {}
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

// sums[t] (+)= rows[t] * weights for all rows, and done(t) when the kRows rows from t have their sums.
// Writes a whole number of tiles: sums of rows past the end are left with something that nobody reads.
template <int N, class AnyRows, class Weights, class Done>
WAVLM_FAST_INLINE void pass(const AnyRows& rows, const Weights& weights, Sums sums, const Done& done) {
  using Element = typename ElementOf<typename AnyRows::Number>::Type;
  const std::int64_t words = rows.C / Element::kDepth;
  for (std::int64_t k = 0; k < words; k += kWords, sums.add = true) {
    const std::int64_t run = least(kWords, words - k);
    const float* panel = weights.run(k, run);
    const std::int64_t tiles = divided_up(rows.count, kRows), next = least(kWords, words - k - run);
    for (std::int64_t t = 0; t < rows.count; t += kRows) {
      weights.prefetch(k + run, next, t / kRows, tiles);
      const Word* row[kRows];
      for (int r = 0; r < kRows; ++r) {
        row[r] = reinterpret_cast<const Word*>(rows.at(least(t + r, rows.count - 1))) + k;
      }
      Floats acc[kRows][N] = {};
      multiply<Element>(row, 1, panel, run, acc);
      store_tile(acc, sums.add, sums.at + t * sums.step, sums.step);
      if (k + run == words) done(t);
    }
  }
}

constexpr auto kNothing = [](std::int64_t) {};

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

// One group of N vectors of columns; weights_of(tap) gives the weights of a tap.
template <int N, class In, class Out, class AnyRows, class WeightsOf>
void direct_group(const PackedConv<In, Out>& call, std::int64_t count, AnyRows rows, const WeightsOf& weights_of,
                  const Columns<Out>& to, float* sums) {
  constexpr std::int64_t width = N * kLanes;
  const auto finish = [&](std::int64_t t) {
    write(to, t, least(kRows, count - t),
          [&](std::int64_t row, std::int64_t i) { return load(sums + row * width + i); });
  };
  for (std::int64_t tap = 0; tap + 1 < call.taps; ++tap, rows.x += call.tap_step) {
    pass<N>(rows, weights_of(tap), {sums, width, tap > 0}, kNothing);
  }
  pass<N>(rows, weights_of(call.taps - 1), {sums, width, call.taps > 1}, finish);
}

// The packed weights of the group that begins with `column`.
template <class In, class Out>
const float* panel_of(const PackedConv<In, Out>& call, std::int64_t taps, std::int64_t column) {
  return static_cast<const float*>(call.packed) + column * taps * (call.C / ElementOf<In>::Type::kDepth);
}

template <class In, class Out>
void direct(const PackedConv<In, Out>& call, std::int64_t first, std::int64_t count, std::int64_t group_begin,
            std::int64_t group_end, float* scratch) {
  constexpr std::int64_t depth = ElementOf<In>::Type::kDepth;
  each_group(call.channels, group_begin, group_end, [&](std::int64_t column, auto vectors) {
    constexpr int N = vectors.count;
    const auto group = [&](auto rows) {
      const auto to = columns_of(call, first, column);
      if (call.packed) {
        const float* panel = panel_of(call, call.taps, column);
        const auto weights_of = [&](std::int64_t tap) { return Packed<N>{panel + tap * call.C / depth * N * kLanes}; };
        return direct_group<N>(call, count, rows, weights_of, to, scratch);
      }
      const auto* weights = static_cast<const In*>(call.weight) + column * call.taps * call.C;
      const auto weights_of = [&](std::int64_t tap) {
        return Unpacked<N, In>{weights + tap * call.C, call.taps * call.C, to.columns, scratch + kSumsOfTask};
      };
      direct_group<N>(call, count, rows, weights_of, to, scratch);
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

template <int N, class In, class Out>
void filtered_group(const PackedConv<In, Out>& call, std::int64_t first, std::int64_t count,
                    const Combinations<In>& rows, const float* panel, const Columns<Out>& to, float* sums) {
  constexpr std::int64_t width = N * kLanes;
  const std::int64_t C = call.C, panel_size = C / ElementOf<In>::Type::kDepth * width, triples = (count + 2) / 3;
  const auto weights_of = [&](Tap tap) { return Packed<N>{panel + tap * panel_size}; };
  const auto rows_of = [&](Tap tap) { return Rows<In>{rows.of[tap], C, triples, C}; };
  float* half_sums = sums + kSumRows * width;
  float* half_differences = half_sums + kTriples * width;
  const In* odd = call.x + first * call.row_step + C;
  pass<N>(Rows<In>{odd, call.row_step, count, C}, weights_of(kMiddle), {sums, width, false}, kNothing);
  pass<N>(rows_of(kFirst), weights_of(kFirst), {sums, 3 * width, true}, kNothing);
  pass<N>(rows_of(kLast), weights_of(kLast), {sums + 2 * width, 3 * width, true}, kNothing);
  pass<N>(rows_of(kHalfSum), weights_of(kHalfSum), {half_sums, width, false}, kNothing);
  pass<N>(rows_of(kHalfDifference), weights_of(kHalfDifference), {half_differences, width, false}, kNothing);
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
    pass<N>(Rows<In>{odd + (k - 1) * C, call.row_step, count, C}, weights_of(taps[k]), {sums, width, k > 0}, kNothing);
  }
  write(to, 0, count, [&](std::int64_t row, std::int64_t i) { return load(sums + row * width + i); });
}

template <class In, class Out>
void filtered(const PackedConv<In, Out>& call, std::int64_t first, std::int64_t count, std::int64_t group_begin,
              std::int64_t group_end, float* scratch) {
  const std::int64_t triples = (count + 2) / 3;
  Combinations<In> rows{};
  float* at = scratch;
  for (int tap = kFirst; tap < kTaps; ++tap, at += kTriples * rounded_up(call.C, kLanes)) {
    rows.of[tap] = reinterpret_cast<In*>(at);
  }
  combine(call.x + first * call.row_step, 2 * count, triples, call.C, rows);
  each_group(call.channels, group_begin, group_end, [&](std::int64_t column, auto vectors) {
    const float* panel = panel_of(call, kTaps, column);
    filtered_group<vectors.count>(call, first, count, rows, panel, columns_of(call, first, column), at);
  });
}

std::size_t scratch_size(std::int64_t C, bool is_filtered) {
  if (!is_filtered) return kSumsOfTask + kWords * kColumns;
  return 4 * kTriples * rounded_up(C, kLanes) + (kSumRows + 2 * kTriples) * kColumns;
}

template <class In>
void pack(const In* const* rows, std::int64_t columns, std::int64_t C, std::int64_t width, float* to) {
  using Element = typename ElementOf<In>::Type;
  constexpr int kNumbers = Element::kDepth * kLanes;
  const std::int64_t whole = C / kNumbers * kNumbers;
  copy_transposed<Element>([&](std::int64_t i) { return rows[i]; }, columns, whole, width, to);
  if (whole == C) return;
  float rest[kLanes * kColumns];
  copy_transposed<Element>([&](std::int64_t i) { return rows[i] + whole; }, columns, C - whole, width, rest);
  std::memcpy(to + whole / Element::kDepth * width, rest, (C - whole) / Element::kDepth * width * sizeof(float));
}

template <class In, class Out>
constexpr PackedConvVariants<In, Out> variants() {
  if constexpr (ElementOf<In>::Type::kDepth * sizeof(In) != sizeof(Word)) {
    return {};
  } else {
    return {direct<In, Out>, filtered<In, Out>, pack<In>};
  }
}

}  // namespace

const PackedConvKernels& packed_conv_kernels() {
  static constexpr PackedConvKernels kernels = {kColumns,
                                                kLanes,
                                                kRows,
                                                kFrames,
                                                kFramesOfUnpacked,
                                                3 * kTriples,
                                                scratch_size,
                                                variants<float, float>(),
                                                variants<float, bf16>(),
                                                variants<bf16, bf16>()};
  return kernels;
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
