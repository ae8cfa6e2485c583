// Products of two matrices that change from call to call: the gradients of packed products.
//
// As in packed_conv_kernel.cpp, but the right operand is packed run by run, and the left one too where its rows are not
// contiguous: both copies are used so often that they cost a few hundredths.
#include "matmul.h"

#include "tile.h"
#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {
namespace {

// Terms of a run, whose panel stays in the first cache, and whose sum starts from zero.
constexpr std::int64_t kTerms = kLanes == 16 ? 128 : 192;
// Terms of which the left operand is packed at a time, to stay in the second cache.
constexpr std::int64_t kDepth = 4 * kTerms;
constexpr std::int64_t kMostRows = 256;
// Of the packed left operand: not a power of two, whose multiples share a place in the cache.
constexpr std::int64_t kLeftStep = kMostRows + 16;

// Terms of one run as [terms][N * kLanes], absent columns zero.
template <int N>
void pack_panel(const float* from, std::int64_t step, std::int64_t terms, std::int64_t columns, float* to) {
  for (std::int64_t k = 0; k < terms; ++k, from += step, to += N * kLanes) {
    each_vector(columns, [&](std::int64_t i, auto lanes) { store(to + i, lanes.load(from + i)); });
  }
}

// [terms][kLeftStep].
void pack_left(const float* from, std::int64_t step, std::int64_t terms, std::int64_t rows, float* to) {
  for (std::int64_t k = 0; k < terms; ++k, from += step, to += kLeftStep) {
    std::memcpy(to, from, rows * sizeof(float));
  }
}

struct Left {
  const float* at;
  std::int64_t row, term;
};

// What the next run will pack: its rows lie far apart, where no prefetcher of the CPU expects them.
struct Next {
  const float* from;
  std::int64_t step, terms;

  // A share of it, one of `shares`.
  template <int N>
  WAVLM_FAST_INLINE void prefetch(std::int64_t share, std::int64_t shares) const {
    for (std::int64_t k = terms * share / shares; k < terms * (share + 1) / shares; ++k) {
      for (int n = 0; n < N * kLanes; n += 16) __builtin_prefetch(from + k * step + n);
    }
  }
};

template <int N>
void add_run(const Left& left, std::int64_t rows, const float* panel, std::int64_t terms, bool add, float* sums,
             const Next& next) {
  const std::int64_t tiles = divided_up(rows, kRows);
  for (std::int64_t i = 0; i < rows; i += kRows) {
    next.prefetch<N>(i / kRows, tiles);
    const Word* row[kRows];
    // Rows past the end repeat the last one; nobody reads their sums.
    for (int r = 0; r < kRows; ++r) row[r] = left.at + least(i + r, rows - 1) * left.row;
    Floats acc[kRows][N] = {};
    multiply<Single>(row, left.term, panel, terms, acc);
    store_tile(acc, add, sums + i * N * kLanes, N * kLanes);
  }
}

template <int N>
void write(const float* sums, std::int64_t rows, std::int64_t columns, bool add, float* out, std::int64_t step) {
  for (std::int64_t i = 0; i < rows; ++i, sums += N * kLanes, out += step) {
    sweep(columns, [&](std::int64_t c, auto lanes, int) {
      const Floats sum = load(sums + c);
      lanes.store(out + c, add ? lanes.load(out + c) + sum : sum);
    });
  }
}

template <int N>
void group(const Matmul& call, const Left& left, std::int64_t first_term, std::int64_t terms, std::int64_t rows,
           std::int64_t column, float* out, float* panel, float* sums) {
  const std::int64_t columns = least(kColumns, call.columns - column);
  for (std::int64_t k = 0; k < terms; k += kTerms) {
    const std::int64_t run = least(kTerms, terms - k);
    pack_panel<N>(call.b + (first_term + k) * call.b_row + column, call.b_row, run, columns, panel);
    const std::int64_t after = k + run;
    const Next next = {call.b + (first_term + after) * call.b_row + column, call.b_row, least(kTerms, terms - after)};
    add_run<N>({left.at + k * left.term, left.row, left.term}, rows, panel, run, k > 0, sums, next);
  }
  write<N>(sums, rows, columns, call.add || first_term > 0, out + column, call.out_row);
}

void run(const Matmul& call, std::int64_t first, std::int64_t count, std::int64_t group_begin, std::int64_t group_end,
         float* scratch) {
  float* panel = scratch;
  float* sums = panel + kTerms * kColumns;
  float* packed = sums + (kMostRows + kRows) * kColumns;
  float* out = call.out + first * call.out_row;
  const bool contiguous = call.a_term == 1;
  const std::int64_t depth = contiguous ? call.depth : kDepth;
  for (std::int64_t term = 0; term < call.depth; term += depth) {
    const std::int64_t terms = least(depth, call.depth - term);
    Left left = {call.a + first * call.a_row + term * call.a_term, call.a_row, call.a_term};
    if (!contiguous) {
      pack_left(left.at, left.term, terms, count, packed);
      left = {packed, 1, kLeftStep};
    }
    each_group(call.columns, group_begin, group_end, [&](std::int64_t column, auto vectors) {
      group<vectors.count>(call, left, term, terms, count, column, out, panel, sums);
    });
  }
}

}  // namespace

const MatmulKernels& matmul_kernels() {
  static constexpr MatmulKernels kernels = {
      kColumns, kRows, kMostRows, kTerms * kColumns + (kMostRows + kRows) * kColumns + kDepth * kLeftStep, run};
  return kernels;
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
