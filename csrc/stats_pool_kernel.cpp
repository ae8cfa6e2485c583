// Mean and deviation over frames in one pass. Frames come in chunks, each measured from the mean of all before it (the
// pivot) and never larger than they are together: the shift by what the mean then moves takes away at most half of the
// chunk's squares, so nothing cancels.
#include "stats_pool.h"

#include "tile.h"
#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {
namespace {

// Sums of so many frames stay accurate in float32; between chunks they are kept in float64.
constexpr std::int64_t kChunk = 32;

// F frames from x on. Their rows are read side by side, so that the sums are loaded and stored once for all.
template <int F, class T>
WAVLM_FAST_INLINE void add(const T* x, std::int64_t row_step, std::int64_t channels, PoolWork& work) {
  sweep(channels, [&](std::int64_t i, auto lanes, int) {
    const Floats pivot = load(work.pivot + i);
    Floats rest = load(work.rest + i), squares = load(work.rest_squares + i);
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f) {
      const Floats difference = lanes.load(x + f * row_step + i) - pivot;
      rest += difference;
      squares += difference * difference;
    }
    lanes.store(work.rest + i, rest);
    lanes.store(work.rest_squares + i, squares);
  });
}

// work.mean and work.squares of the columns.
template <class T>
WAVLM_FAST_INLINE void measure(const PoolColumns<T>& columns, PoolWork& work) {
  const std::int64_t channels = columns.channels, step = columns.row_step;
  sweep(channels, [&](std::int64_t i, auto lanes, int) { lanes.store(work.pivot + i, lanes.load(columns.x + i)); });
  for (std::int64_t c = 0; c < channels; ++c) work.mean[c] = work.pivot[c], work.squares[c] = 0.0;
  for (std::int64_t before = 1; before < columns.frames;) {
    const std::int64_t count = least(least(before, kChunk), columns.frames - before);
    for (std::int64_t c = 0; c < channels; ++c) {
      // An infinite mean stays one when what is added to it is measured from zero.
      const float mean = static_cast<float>(work.mean[c]);
      work.pivot[c] = mean - mean == 0.0f ? mean : 0.0f;
      work.rest[c] = work.rest_squares[c] = 0.0f;
    }
    const T* x = columns.x + before * step;
    std::int64_t t = 0;
    for (; t + 4 <= count; t += 4) add<4>(x + t * step, step, channels, work);
    for (; t < count; ++t) add<1>(x + t * step, step, channels, work);
    const double n = static_cast<double>(before), all = static_cast<double>(before + count), share = 1.0 / all;
    for (std::int64_t c = 0; c < channels; ++c) {
      const double rounding = work.mean[c] - work.pivot[c];
      const double moved = (n * rounding + work.rest[c]) * share;
      work.squares[c] += n * rounding * rounding + work.rest_squares[c] - all * moved * moved;
      work.mean[c] = work.pivot[c] + moved;
    }
    before += count;
  }
}

// Mean and squares of one column as they are defined, in float64: numbers so large that their differences or squares
// leave the range of float32.
template <class T>
__attribute__((noinline, cold)) void measure_wide(const PoolColumns<T>& columns, std::int64_t c, PoolWork& work) {
  double total = 0.0, squares = 0.0;
  const auto value = [&](std::int64_t t) { return static_cast<double>(widened(columns.x[t * columns.row_step + c])); };
  for (std::int64_t t = 0; t < columns.frames; ++t) total += value(t);
  const double mean = total / static_cast<double>(columns.frames);
  for (std::int64_t t = 0; t < columns.frames; ++t) squares += (value(t) - mean) * (value(t) - mean);
  work.mean[c] = mean, work.squares[c] = squares;
}

// work.pivot becomes the mean, work.rest what float32 leaves of it, work.rest_squares the deviation.
template <class T>
WAVLM_FAST_INLINE void settle(const PoolColumns<T>& columns, PoolWork& work) {
  const float nan = __builtin_nanf("");
  const double degrees = static_cast<double>(columns.frames - 1);
  for (std::int64_t c = 0; c < columns.channels; ++c) {
    const float mean = columns.frames > 0 ? static_cast<float>(work.mean[c]) : nan;
    work.pivot[c] = mean;
    work.rest[c] = static_cast<float>(work.mean[c] - mean);
    const double squares = work.squares[c] < 0.0 ? 0.0 : work.squares[c];
    work.rest_squares[c] = columns.frames > 1 ? static_cast<float>(__builtin_sqrt(squares / degrees)) : nan;
  }
}

template <class T>
WAVLM_FAST_INLINE void finish(const PoolColumns<T>& columns, PoolWork& work) {
  if (columns.frames > 0) measure(columns, work);
  settle(columns, work);
  if (columns.frames < 2) return;
  Floats zeros[kUnroll] = {};
  sweep(columns.channels, [&](std::int64_t i, auto lanes, int u) {
    watch(zeros[u], lanes.load(work.pivot + i) + lanes.load(work.rest_squares + i));
  });
  if (sum(zeros) == 0.0f) return;
  for (std::int64_t c = 0; c < columns.channels; ++c) {
    if (!((work.mean[c] + work.squares[c]) * 0.0 == 0.0)) measure_wide(columns, c, work);
  }
  settle(columns, work);
}

template <class T>
void forward(const PoolColumns<T>& columns, PoolWork& work, T* mean, T* deviation) {
  finish(columns, work);
  sweep(columns.channels, [&](std::int64_t i, auto lanes, int) {
    lanes.store(mean + i, load(work.pivot + i));
    lanes.store(deviation + i, load(work.rest_squares + i));
  });
}

// dx = dmean / n + ddeviation * (x - mean) / ((n - 1) * deviation), the latter 0 for frames at the mean.
template <class T>
void backward(const PoolColumns<T>& columns, PoolWork& work, const T* grad_mean, const T* grad_deviation,
              std::int64_t all_frames, T* dx) {
  finish(columns, work);
  const float n = static_cast<float>(columns.frames);
  for (std::int64_t t = 0; t < all_frames; ++t) {
    const T* x = columns.x + t * columns.row_step;
    T* to = dx + t * columns.row_step;
    if (t >= columns.frames) {
      sweep(columns.channels, [&](std::int64_t i, auto lanes, int) { lanes.store(to + i, Floats{}); });
      continue;
    }
    sweep(columns.channels, [&](std::int64_t i, auto lanes, int) {
      const Floats deviation = load(work.rest_squares + i);
      const Floats centred = (lanes.load(x + i) - load(work.pivot + i)) - load(work.rest + i);
      const Floats slope = lanes.load(grad_deviation + i) / ((n - 1.0f) * deviation);
      const Floats spread = ((centred == 0.0f) | (deviation == 0.0f)) ? Floats{} : slope * centred;
      lanes.store(to + i, lanes.load(grad_mean + i) / n + spread);
    });
  }
}

}  // namespace

const StatsPoolKernels& stats_pool_kernels() {
  static constexpr StatsPoolKernels kernels = {forward<float>, forward<bf16>, backward<float>, backward<bf16>};
  return kernels;
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
