#include "dispatch.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <optional>

#include "library.h"
#include "peak.h"
#include "tile_unit.h"

#if defined(WAVLM_FAST_HAVE_NEON_BF16)
#include <sys/auxv.h>
#endif

namespace wavlm_fast {

WAVLM_FAST_IF_AVX512_BF16(namespace isa_avx512_bf16 { const PeakKernels& peak_kernels(); })

namespace {

#if defined(__aarch64__)
constexpr Isa kAll[] = {Isa::default_, Isa::neon_bf16};
#else
constexpr Isa kAll[] = {Isa::default_, Isa::avx2, Isa::avx512, Isa::avx512_bf16};
#endif
constexpr const char* kVariable = "WAVLM_FAST_CPU_ISA";

// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
// clang-format off
bool cpu_has(Isa level) {
  switch (level) {
    case Isa::default_:
      return true;
    WAVLM_FAST_IF_AVX2(case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");)
    WAVLM_FAST_IF_AVX512(case Isa::avx512:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq");)
    WAVLM_FAST_IF_AVX512_BF16(case Isa::avx512_bf16:
      return cpu_has(Isa::avx512) && __builtin_cpu_supports("avx512bf16");)
    WAVLM_FAST_IF_NEON_BF16(case Isa::neon_bf16:
      return getauxval(AT_HWCAP2) & 1 << 14;)  // HWCAP2_BF16, which the C library of wheels does not name
    default:
      return false;
  }
}
// clang-format on

struct Selection {
  Isa level;
  std::string problem, reason;
};

// From where on dot products pay: what enters them is rounded and ordered in pairs, which takes time too.
constexpr double kPays = 1.2;
// For a hundred microseconds each: what is measured differs by a factor of four from one kind of processor to another.
constexpr int64_t kRounds = 1 << 13;
constexpr int kTries = 5;

// How many times the operations of float32 the dot products of bfloat16 do in a second: Intel's cores without matrix
// units do half, AMD's twice as many.
#if defined(WAVLM_FAST_HAVE_AVX512_BF16)
double measured_gain() {
  using Clock = std::chrono::steady_clock;
  const PeakKernels& kernels = isa_avx512_bf16::peak_kernels();
  constexpr double kNever = std::numeric_limits<double>::infinity();
  double of_float = kNever, of_bf16 = kNever;
  const auto time = [](PeakLoop* loop, double& best) {
    const auto start = Clock::now();
    loop(kRounds);
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  };
  for (int i = 0; i < kTries; ++i) time(kernels.of_float, of_float), time(kernels.of_bf16, of_bf16);
  return kernels.bf16_operations / of_bf16 / (kernels.float_operations / of_float);
}
#else
double measured_gain() { return 0.0; }
#endif

// The level for this CPU with such a gain, measured now unless given.
Selection best_level(std::optional<double> gain = std::nullopt) {
  const Isa best = isa_levels().back();
  // A unit of tiles does bfloat16's products whatever vectors gain, and is of that level.
  if (best != Isa::avx512_bf16 || (!gain && has_tile_unit())) return {best, "", ""};
  if (!gain) gain = measured_gain();
  if (*gain >= kPays) return {best, "", ""};
  const std::string share = std::to_string(static_cast<int>(*gain * 100.0 + 0.5));
  return {Isa::avx512, "",
          "bfloat16 is multiplied as float32: this CPU's dot products of bfloat16 reach " + share +
              " % of the rate of float32's products"};
}

Selection select() {
  const char* variable = std::getenv(kVariable);
  const std::string wanted = variable ? variable : "";
  if (wanted.empty()) return best_level();
  const auto instead = [&](const std::string& problem) {
    Selection found = best_level();
    found.problem = std::string(kVariable) + "=" + wanted + problem + "; using " + isa_name(found.level);
    return found;
  };
  std::string names;
  for (const Isa level : kAll) {
    if (isa_name(level) == wanted) {
      if (cpu_has(level)) return {level, "", ""};
      return instead(" is not available: the CPU lacks it or the compiler of this build did");
    }
    names += (names.empty() ? "" : ", ") + isa_name(level);
  }
  return instead(" is none of " + names);
}

const Selection& selection() {
  static const Selection selected = select();
  return selected;
}

std::string isa_op() { return isa_name(isa()); }

std::string isa_reason_op() { return selection().reason; }

// Name and reason of the level that would be chosen here if this had been measured.
std::vector<std::string> isa_for_op(double gain) {
  const Selection found = best_level(gain);
  return {isa_name(found.level), found.reason};
}

std::vector<std::string> isa_levels_op() {
  std::vector<std::string> names;
  for (const Isa level : isa_levels()) names.push_back(isa_name(level));
  return names;
}

}  // namespace

Isa isa() { return selection().level; }

std::string isa_name(Isa level) {
  switch (level) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::neon_bf16:
      return "neon_bf16";
    default:
      return "default";
  }
}

std::vector<Isa> isa_levels() {
  std::vector<Isa> levels;
  for (const Isa level : kAll) {
    if (cpu_has(level)) levels.push_back(level);
  }
  return levels;
}

std::string isa_problem() { return selection().problem; }

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa_op));
  m.impl("isa_levels", TORCH_BOX(&isa_levels_op));
  m.impl("isa_problem", TORCH_BOX(&isa_problem));
  m.impl("isa_reason", TORCH_BOX(&isa_reason_op));
  m.impl("isa_for", TORCH_BOX(&isa_for_op));
}

}  // namespace wavlm_fast
