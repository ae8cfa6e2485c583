#include "dispatch.h"

#include <cstdlib>

#include "library.h"

#if defined(WAVLM_FAST_HAVE_NEON_BF16)
#include <sys/auxv.h>
#endif

namespace wavlm_fast {
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
  std::string problem;
};

Selection select() {
  const Isa best = isa_levels().back();
  const char* variable = std::getenv(kVariable);
  const std::string wanted = variable ? variable : "";
  if (wanted.empty()) return {best, ""};
  std::string names;
  for (const Isa level : kAll) {
    if (isa_name(level) == wanted) {
      if (cpu_has(level)) return {level, ""};
      return {best, std::string(kVariable) + "=" + wanted + " is not available: the CPU lacks it or the compiler of " +
                        "this build did; using " + isa_name(best)};
    }
    names += (names.empty() ? "" : ", ") + isa_name(level);
  }
  return {best, std::string(kVariable) + "=" + wanted + " is none of " + names + "; using " + isa_name(best)};
}

const Selection& selection() {
  static const Selection selected = select();
  return selected;
}

std::string isa_op() { return isa_name(isa()); }

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
}

}  // namespace wavlm_fast
