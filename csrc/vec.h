// Vectors of as many floats as the level's registers hold, for kernels: portable GCC/clang vector types instead of one
// set of intrinsics per level. Everything lives in the level's namespace and is inlined, so that no code of one level
// can be linked into another.
#pragma once

#include <cstdint>
#include <cstring>

#include "bf16.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif

#define WAVLM_FAST_INLINE inline __attribute__((always_inline))

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t Halves __attribute__((vector_size(kLanes * 2)));

WAVLM_FAST_INLINE Floats splat(float value) { return value - Floats{}; }

WAVLM_FAST_INLINE Words bits_of(Floats value) { return (Words)value; }
WAVLM_FAST_INLINE Floats floats_of(Words bits) { return (Floats)bits; }

// Of these conversions GCC 12 makes five instructions each where AVX-512 has one.
#if defined(__AVX512F__)
WAVLM_FAST_INLINE Words widen(Halves halves) { return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)halves); }
WAVLM_FAST_INLINE Halves narrow(Words words) { return (Halves)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)words); }
#else
WAVLM_FAST_INLINE Words widen(Halves halves) { return __builtin_convertvector(halves, Words); }
WAVLM_FAST_INLINE Halves narrow(Words words) { return __builtin_convertvector(words, Halves); }
#endif

WAVLM_FAST_INLINE Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

WAVLM_FAST_INLINE Floats load(const bf16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return floats_of(widen(halves) << 16);
}

WAVLM_FAST_INLINE void store(float* to, Floats value) { std::memcpy(to, &value, sizeof(value)); }

// a < b ? a : b and a > b ? a : b, so b when either is NaN: one instruction each on x86, which GCC does not find.
WAVLM_FAST_INLINE Floats minimum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_maskz_min_ps(0xffff, a, b);  // the plain one warns of a value that it leaves open
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

WAVLM_FAST_INLINE Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// Two bfloat16 in each lane, where the level multiplies such pairs: sum + a's first times b's first + a's second times
// b's second. Both kinds of processor take denormals for zero, and ARM's rounds these sums to odd.
#if defined(__AVX512BF16__)
#define WAVLM_FAST_HAS_PAIRS 1
WAVLM_FAST_INLINE Floats add_pairs(Floats sum, Floats a, Floats b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define WAVLM_FAST_HAS_PAIRS 1
WAVLM_FAST_INLINE Floats add_pairs(Floats sum, Floats a, Floats b) {
  return (Floats)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
}
#else
#define WAVLM_FAST_HAS_PAIRS 0
#endif

WAVLM_FAST_INLINE Floats magnitude(Floats value) { return floats_of(bits_of(value) & 0x7fffffffu); }

// The upper half of each word is the nearest bfloat16, ties to even as torch has it; a NaN keeps being one.
WAVLM_FAST_INLINE Words rounded_to_bf16(Floats value) {
  const Words words = bits_of(value);
  return (value != value) ? Words{} + 0x7fc00000u : words + (0x7fffu + ((words >> 16) & 1u));
}

WAVLM_FAST_INLINE void store(bf16* to, Floats value) {
  const Halves halves = narrow(rounded_to_bf16(value) >> 16);
  std::memcpy(to, &halves, sizeof(halves));
}

// Adds zero to `zeros` for finite values, and NaN for others: what tells at the end whether all were finite.
WAVLM_FAST_INLINE void watch(Floats& zeros, Floats value) { zeros += value * 0.0f; }

// What a load would give after a store as T.
template <class T>
WAVLM_FAST_INLINE Floats rounded(Floats value) {
  if constexpr (sizeof(T) == sizeof(bf16)) return floats_of(rounded_to_bf16(value) & 0xffff0000u);
  return value;
}

// The first n < kLanes elements; the other lanes are zero and are not stored.
template <class T>
WAVLM_FAST_INLINE Floats load(const T* from, int n) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, from, n * sizeof(T));
  return load(buffer);
}

template <class T>
WAVLM_FAST_INLINE void store(T* to, Floats value, int n) {
  T buffer[kLanes];
  store(buffer, value);
  std::memcpy(to, buffer, n * sizeof(T));
}

// kLanes elements of which `left` are left, at least one.
template <class T>
WAVLM_FAST_INLINE Floats load_some(const T* from, std::int64_t left) {
  return left >= kLanes ? load(from) : load(from, static_cast<int>(left));
}

// Single numbers.
WAVLM_FAST_INLINE float widened(float value) { return value; }
WAVLM_FAST_INLINE float widened(bf16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

WAVLM_FAST_INLINE void put(float value, float* to) { *to = value; }
WAVLM_FAST_INLINE void put(float value, bf16* to) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  to->bits = value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

template <int N>
struct FloatsOf {
  typedef float type __attribute__((vector_size(N * 4)));
};

// Halves are added until one number is left.
template <int N = kLanes>
WAVLM_FAST_INLINE float sum(typename FloatsOf<N>::type value) {
  if constexpr (N == 4) {
    return (value[0] + value[2]) + (value[1] + value[3]);
  } else {
    typename FloatsOf<N / 2>::type low, high;
    std::memcpy(&low, &value, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&value) + sizeof(low), sizeof(high));
    return sum<N / 2>(low + high);
  }
}

// Whether all values were finite that were given to `watch`.
WAVLM_FAST_INLINE bool all_finite(Floats zeros) { return sum(zeros) == 0.0f; }

// All lanes, or the first n: what a sweep hands to its body, so that the body is written once.
struct All {
  template <class T>
  WAVLM_FAST_INLINE Floats load(const T* from) const {
    return WAVLM_FAST_ISA::load(from);
  }
  template <class T>
  WAVLM_FAST_INLINE void store(T* to, Floats value) const {
    WAVLM_FAST_ISA::store(to, value);
  }
  WAVLM_FAST_INLINE Floats keep(Floats value) const { return value; }
};

struct First {
  int n;
  template <class T>
  WAVLM_FAST_INLINE Floats load(const T* from) const {
    return WAVLM_FAST_ISA::load(from, n);
  }
  template <class T>
  WAVLM_FAST_INLINE void store(T* to, Floats value) const {
    WAVLM_FAST_ISA::store(to, value, n);
  }
  // Zero in the lanes that do not exist, before they enter a sum.
  WAVLM_FAST_INLINE Floats keep(Floats value) const {
    Floats kept = {};
    for (int i = 0; i < n; ++i) kept[i] = value[i];
    return kept;
  }
};

// Calls body(i, lanes) for the vectors starting at i, i + kLanes, ... below size.
template <class Body>
WAVLM_FAST_INLINE void each_vector(std::int64_t size, const Body& body, std::int64_t i = 0) {
  for (; i + kLanes <= size; i += kLanes) body(i, All{});
  if (i < size) body(i, First{static_cast<int>(size - i)});
}

// The same with body(i, lanes, u). u cycles through 0 .. kUnroll - 1 and names an accumulator: sums wait for
// an addition, and four of them wait together.
constexpr int kUnroll = 4;

template <class Body>
WAVLM_FAST_INLINE void sweep(std::int64_t size, const Body& body) {
  std::int64_t i = 0;
  for (; i + kUnroll * kLanes <= size; i += kUnroll * kLanes) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) body(i + u * kLanes, All{}, u);
  }
  const auto rest = [&](std::int64_t at, auto lanes) { body(at, lanes, 0); };
  each_vector(size, rest, i);
}

WAVLM_FAST_INLINE float sum(const Floats (&parts)[kUnroll]) {
  return sum((parts[0] + parts[1]) + (parts[2] + parts[3]));
}

// Whether the numbers from `at` are finite, `size` being whole vectors.
WAVLM_FAST_INLINE bool all_finite(const float* at, std::int64_t size) {
  Floats zeros[kUnroll] = {};
  sweep(size, [&](std::int64_t i, auto, int u) { watch(zeros[u], load(at + i)); });
  return sum(zeros) == 0.0f;
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
