// Products of complex matrices in registers. Rows of the left operand enter as scalars, columns are lanes.
#pragma once

#include "tile.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {

// A tile of kComplexRows rows x 3 vectors has two accumulators each; beside them there are registers for the vectors of
// the right operand, re and im, and one broadcast.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kComplexRows = 4;
#else
constexpr int kComplexRows = 2;
#endif

// Numbers at at[row * row_step + k * k_step], their imaginary parts `im` later.
struct LeftOperand {
  const float* at;
  std::int64_t row_step, k_step, im;
};

struct Result {
  float* at;
  std::int64_t row_step, vector_step, im;
};

// Columns of a matrix lie in panels of at most three vectors, as wide as each other where possible; width is a multiple
// of kLanes. A panel is [k][re, im][columns], so that a product reads it from one end to the other. The panel that
// begins with column `begin` begins 2 * depth * begin numbers from the start. Calls body(begin, columns).
template <class Body>
WAVLM_FAST_INLINE void each_panel(std::int64_t width, const Body& body) {
  const std::int64_t vectors = width / kLanes, panels = divided_up(vectors, kVectors);
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    const std::int64_t begin = vectors * panel / panels, end = vectors * (panel + 1) / panels;
    body(begin * kLanes, (end - begin) * kLanes);
  }
}

template <int R, int N, bool kAdd>
WAVLM_FAST_INLINE void complex_tile(const LeftOperand& left, const float* panel, std::int64_t depth, const Result& to) {
  Floats re[R][N] = {}, im[R][N] = {};
  const float* at = left.at;
  for (std::int64_t k = 0; k < depth; ++k, at += left.k_step, panel += 2 * N * kLanes) {
    Floats panel_re[N], panel_im[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      panel_re[n] = load(panel + n * kLanes);
      panel_im[n] = load(panel + (N + n) * kLanes);
    }
    // The order matters to GCC: it keeps what it has broadcast, and here that is used up at once.
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Floats left_re = splat(at[r * left.row_step]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) re[r][n] += left_re * panel_re[n], im[r][n] -= left_re * panel_im[n];
      const Floats left_im = splat(at[r * left.row_step + left.im]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) re[r][n] += left_im * panel_im[n], im[r][n] += left_im * panel_re[n];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      float* at_re = to.at + r * to.row_step + n * to.vector_step;
      float* at_im = at_re + to.im;
      store(at_re, kAdd ? load(at_re) + re[r][n] : re[r][n]);
      store(at_im, kAdd ? load(at_im) + im[r][n] : im[r][n]);
    }
  }
}

// R rows at a time, then half as many for the rest.
template <int N, bool kAdd, int R = (kComplexRows * kVectors) / N>
WAVLM_FAST_INLINE void complex_panel(LeftOperand left, const float* panel, std::int64_t depth, Result to,
                                     std::int64_t rows) {
  for (; rows >= R; rows -= R, left.at += R * left.row_step, to.at += R * to.row_step) {
    complex_tile<R, N, kAdd>(left, panel, depth, to);
  }
  if constexpr (R > 1) {
    if (rows > 0) complex_panel<N, kAdd, R / 2>(left, panel, depth, to, rows);
  }
}

// to[r] (+)= sum over k < depth of left[r][k] * conj(right[k]), right being in panels. result(begin, columns) says
// where a panel of the product goes.
template <bool kAdd, class ResultOf>
WAVLM_FAST_INLINE void complex_product(const LeftOperand& left, const float* right, std::int64_t depth,
                                       std::int64_t width, std::int64_t rows, const ResultOf& result) {
  each_panel(width, [&](std::int64_t begin, std::int64_t columns) {
    const float* panel = right + 2 * depth * begin;
    const Result to = result(begin, columns);
    with_vectors(columns / kLanes, [&](auto group) { complex_panel<group.count, kAdd>(left, panel, depth, to, rows); });
  });
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
