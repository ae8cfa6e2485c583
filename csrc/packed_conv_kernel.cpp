// Products with packed weights, tap after tap in passes of packed_pass.h: as convolutions are written, and in fewer
// multiplications.
#include "packed_conv.h"

#include "activation.h"
#include "packed_pass.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {
namespace {

// A task reads its weights once for this many rows.
constexpr std::int64_t kFrames = 128;
constexpr std::int64_t kSumsOfGroup = kFrames * kColumns;
// Where it packs them itself, for so many.
constexpr std::int64_t kFramesOfUnpacked = 4 * kFrames;
constexpr std::int64_t kSumsOfTask = (kFramesOfUnpacked + kRows) * kColumns;
// Three frames each. A task's combinations of rows and its five sets of sums stay in the second cache.
constexpr std::int64_t kTriples = 16;

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
