// The arithmetic peak of this machine, measured: what benchmarks compare with.
#include "peak.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <string>

#include "check.h"
#include "dispatch.h"
#include "library.h"
#include "parallel.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(PeakKernels, peak_kernels)

namespace {

constexpr int kRuns = 8;
constexpr double kSeconds = 0.05;  // of one run

// Seconds that all threads together take for `rounds` rounds each.
double run(PeakLoop* loop, int64_t rounds) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  parallel_for(0, num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) loop(rounds);
  });
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Operations per second on all of torch's threads, the best of several runs; NaN where the level in use has no such
// instruction.
double peak(const Text& dtype) {
  ENTRY_CHECK(dtype == "float32" || dtype == "bfloat16", "peak: expected float32 or bfloat16, got ", dtype);
  const PeakKernels& kernels = peak_kernels();
  PeakLoop* const loop = dtype == "float32" ? kernels.of_float : kernels.of_bf16;
  if (!loop) return std::numeric_limits<double>::quiet_NaN();
  // Doubling until a run is long enough also wakes the cores up.
  int64_t rounds = 1 << 12;
  double seconds = run(loop, rounds);
  for (; seconds < kSeconds / 2; seconds = run(loop, rounds)) rounds *= 2;
  rounds = std::max<int64_t>(1, rounds * (kSeconds / seconds));
  for (int i = 0; i < kRuns; ++i) {
    const double found = run(loop, rounds);
    seconds = i ? std::min(seconds, found) : found;
  }
  const double operations = dtype == "float32" ? kernels.float_operations : kernels.bf16_operations;
  return operations * rounds * num_threads() / seconds;
}

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CompositeExplicitAutograd, m) { m.impl("peak", TORCH_BOX(&peak)); }

}  // namespace
}  // namespace wavlm_fast
