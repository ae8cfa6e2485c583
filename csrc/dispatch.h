// One instruction set level per process, chosen from what the CPU has, what of it was measured to pay, what the compiler
// knew and WAVLM_FAST_CPU_ISA. Only entries include this file; kernels are compiled once per level and do not know of it.
#pragma once

#include <string>
#include <vector>

namespace wavlm_fast {

// Slowest first, as LEVELS in setup.py.
enum class Isa { default_, avx2, avx512, avx512_bf16 };

// The level in use.
Isa isa();

std::string isa_name(Isa level);

// The levels in this binary that the CPU has, slowest first.
std::vector<Isa> isa_levels();

// What is wrong with WAVLM_FAST_CPU_ISA, and what is used instead; empty when nothing is.
std::string isa_problem();

}  // namespace wavlm_fast

#if defined(WAVLM_FAST_HAVE_AVX2)
#define WAVLM_FAST_IF_AVX2(...) __VA_ARGS__
#else
#define WAVLM_FAST_IF_AVX2(...)
#endif
#if defined(WAVLM_FAST_HAVE_AVX512)
#define WAVLM_FAST_IF_AVX512(...) __VA_ARGS__
#else
#define WAVLM_FAST_IF_AVX512(...)
#endif
#if defined(WAVLM_FAST_HAVE_AVX512_BF16)
#define WAVLM_FAST_IF_AVX512_BF16(...) __VA_ARGS__
#else
#define WAVLM_FAST_IF_AVX512_BF16(...)
#endif

// Defines `const Kernels& name()`, the kernels of the level in use. Each level's kernel file defines
// `const Kernels& name()` in its namespace WAVLM_FAST_ISA. Use in namespace wavlm_fast itself.
// clang-format off
#define WAVLM_FAST_DISPATCH(Kernels, name)                                                           \
  namespace isa_default { const Kernels& name(); }                                                   \
  WAVLM_FAST_IF_AVX2(namespace isa_avx2 { const Kernels& name(); })                                  \
  WAVLM_FAST_IF_AVX512(namespace isa_avx512 { const Kernels& name(); })                              \
  WAVLM_FAST_IF_AVX512_BF16(namespace isa_avx512_bf16 { const Kernels& name(); })                    \
  static const Kernels& name() {                                                                     \
    switch (isa()) {                                                                                 \
      WAVLM_FAST_IF_AVX2(case Isa::avx2: return isa_avx2::name();)                                   \
      WAVLM_FAST_IF_AVX512(case Isa::avx512: return isa_avx512::name();)                             \
      WAVLM_FAST_IF_AVX512_BF16(case Isa::avx512_bf16: return isa_avx512_bf16::name();)              \
      default: return isa_default::name();                                                           \
    }                                                                                                \
  }
// clang-format on
