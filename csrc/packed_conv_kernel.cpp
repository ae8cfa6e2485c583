// Products with packed weights: rows of x enter as scalars, weights as vectors of output channels.
//
// The sum over channels and taps is cut into runs of kWords. A run's weights stay in the first cache while all rows
// of the task pass by, and each run is summed from zero: the rounding error grows with the number of runs only. Weights
// of the next run are fetched meanwhile.
#include "packed_conv.h"

#include "activation.h"
#include "rows.h"
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
constexpr std::int64_t kSumsOfGroup = kFrames * kColumns;
// Where it packs them itself, for so many.
constexpr std::int64_t kFramesOfUnpacked = 4 * kFrames;
constexpr std::int64_t kSumsOfTask = (kFramesOfUnpacked + kRows) * kColumns;
// Words of a tile between which weights are fetched ahead.
constexpr std::int64_t kSlice = 16;
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

// What multiplies: vectors in registers, or a unit of csrc/tiles.h.
struct Registers {};

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
// Calls body(Vectors<n>{}) for n from 0 to N - 1.
template <int N, class Body>
WAVLM_FAST_INLINE void each_tile(const Body& body) {
  body(Vectors<0>{});
  if constexpr (N > 1) body(Vectors<1>{});
  if constexpr (N > 2) body(Vectors<2>{});
}

// Words of the rows from t on, which then lie `stride` words apart: where they are, if evenly, else in a copy.
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

// The same on tiles, whose columns are the panel as it lies. With one row of tiles at a time there are enough of them
// for each to be loaded while another one is multiplied. What is left of a run behind whole tiles is a run of its own,
// of narrower ones: nothing is read that does not belong to a row, and a row knows of no other.
template <class Element, int N, class Unit, class WordsOf, class Ahead, class Done>
WAVLM_FAST_INLINE void pass_run(Unit& unit, const WordsOf& words_of, std::int64_t count, const float* panel,
                                std::int64_t run, const Ahead& ahead, Sums sums, const Done& done) {
  constexpr std::int64_t kColumnStride = N * kLanes * sizeof(float);
  static_assert(kLanes == kTileWords && kSlice == kTileWords && kWords % (2 * kTileWords) == 0);
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
      each_tile<N>([&](auto n) {
        if (sums.add) {
          unit.template load<kSumTile + n.count>(to + n.count * kLanes, sum_stride);
        } else {
          unit.template zero<kSumTile + n.count>();
        }
      });
      std::int64_t stride;
      const Word* from = even_rows(part_of, t, rows, words, copy, stride);
      const float* columns = panel + begin * N * kLanes;
      const auto multiply = [&](auto row) {
        ahead(share++, shares);
        unit.template load<row.count>(from, stride);
        each_tile<N>([&](auto n) {
          unit.template load<kColumnTile + n.count>(columns + n.count * kLanes, kColumnStride);
          unit.template multiply_add<kSumTile + n.count, row.count, kColumnTile + n.count>();
        });
        from += step, columns += step * N * kLanes;
      };
      for (std::int64_t at = 0; at < words; at += 2 * step) {
        multiply(Vectors<kRowTile>{});
        if (at + step < words) multiply(Vectors<kRowTile + 1>{});
      }
      each_tile<N>([&](auto n) { unit.template store<kSumTile + n.count>(to + n.count * kLanes, sum_stride); });
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
template <int N, class Engine, class In, class Out, class AnyRows, class WeightsOf>
void direct_group(Engine& engine, const PackedConv<In, Out>& call, AnyRows rows, const WeightsOf& weights_of,
                  const Columns<Out>& to, float* sums) {
  constexpr std::int64_t width = N * kLanes;
  const auto finish = [&](std::int64_t t, std::int64_t count) {
    write(to, t, count, [&](std::int64_t row, std::int64_t i) { return load(sums + row * width + i); });
  };
  for (std::int64_t tap = 0; tap + 1 < call.taps; ++tap, rows.x += call.tap_step) {
    pass<N>(engine, rows, weights_of(tap), {sums, width, tap > 0}, kNothing);
  }
  pass<N>(engine, rows, weights_of(call.taps - 1), {sums, width, call.taps > 1}, finish);
}

// The packed weights of the group that begins with `column`.
template <class In, class Out>
const float* panel_of(const PackedConv<In, Out>& call, std::int64_t taps, std::int64_t column) {
  return static_cast<const float*>(call.packed) + column * taps * (call.C / ElementOf<In>::Type::kDepth);
}

// Groups that share a copy of the rows.
constexpr std::int64_t kGroups = 8;

// Of a few groups: runs of the rows are copied, and meet all these groups while they are in the second cache.
template <class Engine, class In, class Out, class AnyRows>
void direct_of_copies(Engine& engine, const PackedConv<In, Out>& call, std::int64_t first, AnyRows rows,
                      std::int64_t group_begin, std::int64_t group_end, float* scratch) {
  using Element = typename ElementOf<In>::Type;
  const std::int64_t words = call.C / Element::kDepth, size = call.taps * words;  // of a column
  float* sums = scratch + kFrames * kWords;
  bool add = false;
  for (std::int64_t tap = 0; tap < call.taps; ++tap, rows.x += call.tap_step) {
    for (std::int64_t k = 0; k < words; k += kWords, add = true) {
      const std::int64_t run = least(kWords, words - k), at = tap * words + k;
      for (std::int64_t t = 0; t < rows.count; ++t) {
        copy_words(rows.at(t) + k * Element::kDepth, run, scratch + t * kWords);
      }
      each_group(call.channels, group_begin, group_end, [&](std::int64_t column, auto vectors) {
        constexpr int N = vectors.count;
        const float* panel = panel_of(call, call.taps, column) + at * N * kLanes;
        const bool more = column + kColumns < least(group_end * kColumns, call.channels);
        const std::int64_t next = more ? column + kColumns : group_begin * kColumns;
        const std::int64_t width = least(kColumns, rounded_up(call.channels, kLanes) - next);
        const float* next_panel = panel_of(call, call.taps, next) + (more ? at : at + run) * width;
        const auto ahead = [&](std::int64_t share, std::int64_t shares) {
          fetch(next_panel, run * width, share, shares);
        };
        float* own = sums + (column / kColumns - group_begin) * kSumsOfGroup;
        const auto to = columns_of(call, first, column);
        const auto done = [&](std::int64_t t, std::int64_t count) {
          if (at + run < size) return;
          write(to, t, count, [&](std::int64_t row, std::int64_t i) { return load(own + row * N * kLanes + i); });
        };
        const auto words_of = [&](std::int64_t t) { return scratch + t * kWords; };
        pass_run<Element, N>(engine, words_of, rows.count, panel, run, ahead, {own, N * kLanes, add}, done);
      });
    }
  }
}

// Rows are read where they are.
template <class Engine, class In, class Out, class AnyRows>
void direct_of_rows(Engine& engine, const PackedConv<In, Out>& call, std::int64_t first, AnyRows rows,
                    std::int64_t group_begin, std::int64_t group_end, float* scratch) {
  constexpr std::int64_t depth = ElementOf<In>::Type::kDepth;
  each_group(call.channels, group_begin, group_end, [&](std::int64_t column, auto vectors) {
    constexpr int N = vectors.count;
    const auto to = columns_of(call, first, column);
    if (call.packed) {
      const float* panel = panel_of(call, call.taps, column);
      const auto weights_of = [&](std::int64_t tap) { return Packed<N>{panel + tap * call.C / depth * N * kLanes}; };
      return direct_group<N>(engine, call, rows, weights_of, to, scratch);
    }
    const auto* weights = static_cast<const In*>(call.weight) + column * call.taps * call.C;
    const auto weights_of = [&](std::int64_t tap) {
      return Unpacked<N, In>{weights + tap * call.C, call.taps * call.C, to.columns, scratch + kSumsOfTask};
    };
    direct_group<N>(engine, call, rows, weights_of, to, scratch);
  });
}

template <class Engine, class In, class Out>
void direct(const PackedConv<In, Out>& call, std::int64_t first, std::int64_t count, std::int64_t group_begin,
            std::int64_t group_end, float* scratch) {
  Engine engine;
  const auto groups_of = [&](const auto& rows) {
    if constexpr (!kWidens<In>) {
      if (!call.copies) return direct_of_rows(engine, call, first, rows, group_begin, group_end, scratch);
    }
    const std::int64_t groups = group_end - group_begin, step = divided_up(groups, divided_up(groups, kGroups));
    for (std::int64_t group = group_begin; group < group_end; group += step) {
      direct_of_copies(engine, call, first, rows, group, least(group + step, group_end), scratch);
    }
  };
  if (call.rows) {
    groups_of(ScatteredRows<In>{call.x, call.rows + first, count, call.C});
  } else {
    groups_of(Rows<In>{call.x + first * call.row_step, call.row_step, count, call.C});
  }
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
  const auto weights_of = [&](Tap tap) { return Packed<N>{panel + tap * panel_size}; };
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
  Engine engine;
  Combinations<In> rows{};
  float* at = scratch;
  for (int tap = kFirst; tap < kTaps; ++tap, at += kTriples * rounded_up(call.C, kLanes)) {
    rows.of[tap] = reinterpret_cast<In*>(at);
  }
  combine(call.x + first * call.row_step, 2 * count, triples, call.C, rows);
  each_group(call.channels, group_begin, group_end, [&](std::int64_t column, auto vectors) {
    const float* panel = panel_of(call, kTaps, column);
    filtered_group<vectors.count>(engine, call, first, count, rows, panel, columns_of(call, first, column), at);
  });
}

std::size_t scratch_size(std::int64_t C, bool is_filtered) {
  constexpr std::int64_t of_copies = kFrames * kWords + kGroups * kSumsOfGroup;
  constexpr std::int64_t of_rows = kSumsOfTask + kWords * kColumns;
  if (!is_filtered) return of_rows > of_copies ? of_rows : of_copies;
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

template <class In, class Out, class Engine = Registers>
constexpr PackedConvVariants<In, Out> variants() {
  if constexpr (kWidens<In>) {
    return {direct<Engine, In, Out>, nullptr, nullptr};
  } else {
    return {direct<Engine, In, Out>, filtered<Engine, In, Out>, pack<In>};
  }
}

using OnTiles = PackedConvVariants<bf16, bf16>;
#if defined(WAVLM_FAST_TILES)
constexpr OnTiles kOnTiles = variants<bf16, bf16, Unit>(), kOnEmulatedTiles = variants<bf16, bf16, EmulatedUnit>();
#else
constexpr OnTiles kOnTiles = {}, kOnEmulatedTiles = {};
#endif

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
                                                variants<bf16, bf16>(),
                                                !kWidens<bf16>,
                                                kOnTiles,
                                                kOnEmulatedTiles};
  return kernels;
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
