// Products with packed weights: rows of x enter as scalars, weights as vectors of output channels.
//
// The sum over channels and taps is cut into runs of kTerms. A run's weights stay in the first cache while all rows
// of the task pass by, and each run is summed from zero: the rounding error grows with the number of runs only.
#include "packed_conv.h"

#include "activation.h"
#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {
namespace {

// kRows x kVectors accumulators, one operand of kVectors vectors and a broadcast: as many as there are registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
constexpr int kVectors = 3;
constexpr int kColumns = kVectors * kLanes;
// 24 KB of weights with 16 lanes, and less than that with fewer.
constexpr std::int64_t kTerms = kLanes == 16 ? 128 : 192;
// A task reads its weights once for this many rows.
constexpr std::int64_t kFrames = 128;

constexpr std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// to[r][n] (+)= sum over terms k of rows[r][k] * weights[k][n].
template <int N, bool kAdd>
WAVLM_FAST_INLINE void product(const float* const (&rows)[kRows], const float* weights, std::int64_t terms, float* to) {
  Floats acc[kRows][N] = {};
  for (std::int64_t k = 0; k < terms; ++k, weights += N * kLanes) {
    Floats column[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) column[n] = load(weights + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Floats x = splat(rows[r][k]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] += x * column[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      float* at = to + (r * N + n) * kLanes;
      store(at, kAdd ? load(at) + acc[r][n] : acc[r][n]);
    }
  }
}

template <Activation activation>
void finish(const PackedConv& call, const float* sums, std::int64_t first, std::int64_t count, std::int64_t column,
            std::int64_t columns, std::int64_t width) {
  const float* bias = call.bias ? call.bias + column : nullptr;
  const float* gain = call.gain ? call.gain + column : nullptr;
  const float* offset = call.gain ? call.offset + column : nullptr;
  float* out = call.out + first * call.channels + column;
  for (std::int64_t t = 0; t < count; ++t, sums += width, out += call.channels) {
    sweep(columns, [&](std::int64_t i, auto lanes, int) {
      Floats sum = load(sums + i);
      if (bias) sum += lanes.load(bias + i);
      if (gain) sum = sum * lanes.load(gain + i) + lanes.load(offset + i);
      lanes.store(out + i, activate<activation>(sum));
    });
  }
}

// One group of N vectors of columns.
template <int N>
void run(const PackedConv& call, std::int64_t first, std::int64_t count, const float* weights, float* sums) {
  const float* x = call.x + first * call.row_step;
  bool add = false;
  for (std::int64_t tap = 0; tap < call.taps; ++tap, x += call.tap_step) {
    for (std::int64_t c = 0; c < call.C; c += kTerms, add = true) {
      const std::int64_t terms = least(kTerms, call.C - c);
      for (std::int64_t t = 0; t < count; t += kRows) {
        const float* rows[kRows];
        // Rows past the end repeat the last one; nobody reads their sums.
        for (int r = 0; r < kRows; ++r) rows[r] = x + least(t + r, count - 1) * call.row_step + c;
        float* to = sums + t * N * kLanes;
        add ? product<N, true>(rows, weights, terms, to) : product<N, false>(rows, weights, terms, to);
      }
      weights += terms * N * kLanes;
    }
  }
}

void forward(const PackedConv& call, std::int64_t first, std::int64_t count, std::int64_t group_begin,
             std::int64_t group_end, float* scratch) {
  for (std::int64_t group = group_begin; group < group_end; ++group) {
    const std::int64_t column = group * kColumns, columns = least(kColumns, call.channels - column);
    const std::int64_t width = (columns + kLanes - 1) / kLanes * kLanes;
    const float* weights = call.packed + column * call.taps * call.C;
    if (width == 3 * kLanes) run<3>(call, first, count, weights, scratch);
    if (width == 2 * kLanes) run<2>(call, first, count, weights, scratch);
    if (width == 1 * kLanes) run<1>(call, first, count, weights, scratch);
    switch (static_cast<Activation>(call.activation)) {
      case Activation::none:
        finish<Activation::none>(call, scratch, first, count, column, columns, width);
        break;
      case Activation::relu:
        finish<Activation::relu>(call, scratch, first, count, column, columns, width);
        break;
      case Activation::gelu:
        finish<Activation::gelu>(call, scratch, first, count, column, columns, width);
        break;
      case Activation::gelu_tanh:
        finish<Activation::gelu_tanh>(call, scratch, first, count, column, columns, width);
        break;
    }
  }
}

}  // namespace

const PackedConvKernels& packed_conv_kernels() {
  static constexpr PackedConvKernels kernels = {kColumns, kLanes, kFrames, kRows, (kFrames + kRows) * kColumns,
                                                forward};
  return kernels;
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
