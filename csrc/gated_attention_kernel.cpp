// softmax(scale * q k^T + gate * bias) v without a [T, T] matrix.
//
// Lanes are queries: a vector holds one number of kLanes neighbouring queries. So the maximum and the sum of the
// softmax are lane-wise, the gate is a vector, the Toeplitz bias of one key is a run of consecutive numbers, and keys
// and values enter both products as scalars.
//
// A task walks over the keys in tiles. A tile is packed once and used by all query blocks of the task, so nothing of
// size T is ever held.
#include "gated_attention.h"

#include "exp.h"
#include "vec.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

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
constexpr int kQueries = kVectors * kLanes;  // of a block
constexpr int kKeys = 64;                    // of a tile: scores, queries and sums of a block stay in the first cache
constexpr int kBlocks = 8;                   // of a task: their queries and sums stay in the second cache

// Not std's: a function template of a shared header, compiled here for this level, may become everybody's copy.
constexpr std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

constexpr std::int64_t rounded_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

WAVLM_FAST_INLINE float widened(float value) { return value; }
WAVLM_FAST_INLINE float widened(bf16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

WAVLM_FAST_INLINE void narrow(float value, float* to) { *to = value; }
WAVLM_FAST_INLINE void narrow(float value, bf16* to) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  to->bits = value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// What a 32-bit element of a packed operand is, and its product. kDepth numbers along the summed axis make an element.
struct Single {
  static constexpr int kDepth = 1;

  static WAVLM_FAST_INLINE Floats multiply_add(Floats sum, Floats b, const float* a) { return sum + b * splat(*a); }

  template <class T>
  static WAVLM_FAST_INLINE float element(const T* first, const T*) { return widened(*first); }
};

#if defined(__AVX512BF16__)
struct Pair {
  static constexpr int kDepth = 2;

  static WAVLM_FAST_INLINE Floats multiply_add(Floats sum, Floats b, const float* a) {
    return _mm512_dpbf16_ps(sum, (__m512bh)b, (__m512bh)_mm512_set1_ps(*a));
  }

  // Two numbers along the summed axis; the second may be absent.
  static WAVLM_FAST_INLINE float element(const bf16* first, const bf16* second) {
    const std::uint32_t bits = first->bits | (second ? static_cast<std::uint32_t>(second->bits) << 16 : 0);
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
  }
};
#endif

// acc[r][n] += sum over k of a[k][r] * b[k][n].
template <class Element, int N>
WAVLM_FAST_INLINE void products(const float* a, const float* b, std::int64_t depth, Floats (&acc)[kRows][N]) {
  for (std::int64_t k = 0; k < depth; ++k) {
    Floats column[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) column[n] = load(b + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = Element::multiply_add(acc[r][n], column[n], a + r);
    }
    a += kRows;
    b += N * kLanes;
  }
}

// A block of queries with its running softmax. Arrays are [.][N * kLanes] for a block of N vectors.
struct Block {
  float* q;     // [elements of D]
  float* sums;  // [D rounded up to kRows]: sum over keys of weight * value
  float* gate;
  float* top;    // greatest score
  float* total;  // sum of weights
  std::int64_t row;  // of the first query among all [B, H, T]: what dropout is keyed by
};

struct Tile {
  float* keys;    // [groups of kRows keys][elements of D][kRows]
  float* values;  // [groups of kRows channels][elements of the tile's keys][kRows]
  float* scores;  // [kKeys][N * kLanes]; weights take their place
  std::int64_t first_key;
  float* bias;    // of query i and key j at i - j + kKeys - 1, both counted within the block and the tile
};

// Rows of a tensor with D contiguous -> [groups of kRows rows][elements of D][kRows], absent rows zero.
template <class Element, class T>
WAVLM_FAST_INLINE void pack_rows(const T* from, std::int64_t stride, std::int64_t rows, std::int64_t D, float* to) {
  constexpr int depth = Element::kDepth;
  for (std::int64_t first = 0; first < rows; first += kRows) {
    for (int r = 0; r < kRows; ++r) {
      const T* row = from + (first + r) * stride;
      float* column = to + r;
      for (std::int64_t d = 0; d < D; d += depth, column += kRows) {
        *column = first + r < rows ? Element::element(row + d, d + 1 < D ? row + d + 1 : nullptr) : 0.0f;
      }
    }
    to += kRows * ((D + depth - 1) / depth);
  }
}

// Rows with D contiguous -> [groups of kRows channels][elements of the rows][kRows], absent channels zero.
template <class Element, class T>
WAVLM_FAST_INLINE void pack_columns(const T* from, std::int64_t stride, std::int64_t rows, std::int64_t D, float* to) {
  constexpr int depth = Element::kDepth;
  const std::int64_t elements = (rows + depth - 1) / depth;
  for (std::int64_t j = 0; j < rows; j += depth, to += kRows) {
    const T* row = from + j * stride;
    const T* next = j + 1 < rows ? row + stride : nullptr;
    float* group = to;
    for (std::int64_t d = 0; d < D; d += kRows, group += elements * kRows) {
      for (int r = 0; r < kRows; ++r) {
        group[r] = d + r < D ? Element::element(row + d + r, next ? next + d + r : nullptr) : 0.0f;
      }
    }
  }
}

template <class Element, class T>
WAVLM_FAST_INLINE void start(const GatedAttention<T>& call, std::int64_t b, std::int64_t h, std::int64_t first,
                             std::int64_t count, std::int64_t width, const Block& block) {
  constexpr int depth = Element::kDepth;
  const T* q = call.q + b * call.q_strides.b + first * call.q_strides.t + h * call.q_strides.h;
  const float* gate = call.gate + (b * call.H + h) * call.T_ + first;
  for (std::int64_t i = 0; i < width; ++i, q += call.q_strides.t) {
    for (std::int64_t d = 0; d < call.D; d += depth) {
      block.q[d / depth * width + i] =
          i < count ? Element::element(q + d, d + 1 < call.D ? q + d + 1 : nullptr) : 0.0f;
    }
    block.gate[i] = i < count ? gate[i] : 0.0f;
    block.top[i] = -__builtin_inff();
    block.total[i] = 0.0f;
  }
  std::memset(block.sums, 0, rounded_up(call.D, kRows) * width * sizeof(float));
}

// Scores of a tile, and into `top` the greatest so far.
template <class Element, int N>
WAVLM_FAST_INLINE void score(const Tile& tile, std::int64_t keys, std::int64_t elements, float scale,
                             const Block& block, Floats (&top)[N]) {
  Floats gate[N];
  for (int n = 0; n < N; ++n) {
    gate[n] = load(block.gate + n * kLanes);
    top[n] = load(block.top + n * kLanes);
  }
  for (std::int64_t first = 0; first < keys; first += kRows) {
    Floats acc[kRows][N] = {};
    products<Element>(tile.keys + first * elements, block.q, elements, acc);
    const float* bias = tile.bias + kKeys - 1 - first;
    float* scores = tile.scores + first * N * kLanes;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= keys) break;
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        acc[r][n] = acc[r][n] * scale + gate[n] * load(bias - r + n * kLanes);
        top[n] = acc[r][n] > top[n] ? acc[r][n] : top[n];
        store(scores + (r * N + n) * kLanes, acc[r][n]);
      }
    }
  }
}

// Scores -> weights, in place.
template <int N>
WAVLM_FAST_INLINE void weigh(Single, float* scores, std::int64_t keys, const Floats (&top)[N], Floats (&total)[N]) {
  for (std::int64_t j = 0; j < keys; ++j, scores += N * kLanes) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const Floats weight = exp_of_negative(load(scores + n * kLanes) - top[n]);
      total[n] += weight;
      store(scores + n * kLanes, weight);
    }
  }
}

#if defined(__AVX512BF16__)
template <int N>
WAVLM_FAST_INLINE void weigh(Pair, float* scores, std::int64_t keys, const Floats (&top)[N], Floats (&total)[N]) {
  // Lane i of a pair of rows: weight of the first key in the low half, of the second in the high half.
  alignas(64) static constexpr auto kInterleave = [] {
    struct { std::uint16_t index[32]; } table{};
    for (int i = 0; i < 32; ++i) table.index[i] = i / 2 + i % 2 * 16;
    return table;
  }();
  const __m512i interleave = _mm512_load_si512(&kInterleave);
  float* weights = scores;
  for (std::int64_t j = 0; j < keys; j += 2, scores += 2 * N * kLanes, weights += N * kLanes) {
    const bool both = j + 1 < keys;
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const Floats even = exp_of_negative(load(scores + n * kLanes) - top[n]);
      const Floats odd = both ? exp_of_negative(load(scores + (N + n) * kLanes) - top[n]) : Floats{};
      total[n] += even + odd;
      const __m512bh halves = _mm512_cvtne2ps_pbh(odd, even);
      store(weights + n * kLanes, (Floats)_mm512_permutexvar_epi16(interleave, (__m512i)halves));
    }
  }
}
#endif

WAVLM_FAST_INLINE Words mix(Words x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// All bits where the weights of key j are kept, none where they are dropped: as wavlm_fast/ops/_dropout.py has it.
WAVLM_FAST_INLINE Words kept(Words row_keys, std::uint32_t j, std::uint32_t threshold) {
  const Words kept = (mix(row_keys + j * 0x9e3779b9u) >> 8) >= threshold;
  return kept;
}

// Zeroes the weights that dropout takes. The sum of weights is not touched: dropout follows the softmax.
template <class Element, int N>
void drop(const Dropout& dropout, std::int64_t first_row, std::int64_t first_key, std::int64_t keys, float* weights) {
  Words lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int n = 0; n < N; ++n) {
    const Words row = lane + static_cast<std::uint32_t>(first_row + n * kLanes);
    const Words row_keys = mix(mix(row) + dropout.seed);
    for (std::int64_t j = 0; j < keys; j += Element::kDepth) {
      const std::uint32_t key = static_cast<std::uint32_t>(first_key + j);
      Words mask = kept(row_keys, key, dropout.threshold);
      if (Element::kDepth == 2) mask = (mask & 0xffffu) | (kept(row_keys, key + 1, dropout.threshold) << 16);
      float* at = weights + (j / Element::kDepth * N + n) * kLanes;
      Words bits;
      std::memcpy(&bits, at, sizeof(bits));
      bits &= mask;
      std::memcpy(at, &bits, sizeof(bits));
    }
  }
}

// sums = sums * fade + values^T weights.
template <class Element, int N>
WAVLM_FAST_INLINE void accumulate(const Tile& tile, std::int64_t elements, std::int64_t D, const Floats (&fade)[N],
                                  float* sums) {
  const float* values = tile.values;
  for (std::int64_t d = 0; d < D; d += kRows, values += elements * kRows, sums += kRows * N * kLanes) {
    // From zero: the rounding error of a sum of tiles grows with the number of tiles, not of keys.
    Floats acc[kRows][N] = {};
    products<Element>(values, tile.scores, elements, acc);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        float* at = sums + (r * N + n) * kLanes;
        store(at, load(at) * fade[n] + acc[r][n]);
      }
    }
  }
}

// One tile of keys for one block of N vectors of queries.
template <class Element, int N, class T>
void attend(const GatedAttention<T>& call, const Tile& tile, std::int64_t keys, std::int64_t D, const Block& block) {
  constexpr int depth = Element::kDepth;
  Floats top[N], total[N] = {};
  score<Element, N>(tile, keys, (D + depth - 1) / depth, call.scale, block, top);
  weigh<N>(Element{}, tile.scores, keys, top, total);
  if (call.dropout.threshold) drop<Element, N>(call.dropout, block.row, tile.first_key, keys, tile.scores);
  Floats fade[N];
  for (int n = 0; n < N; ++n) fade[n] = exp_of_negative(load(block.top + n * kLanes) - top[n]);
  accumulate<Element, N>(tile, (keys + depth - 1) / depth, D, fade, block.sums);
  for (int n = 0; n < N; ++n) {
    store(block.top + n * kLanes, top[n]);
    store(block.total + n * kLanes, load(block.total + n * kLanes) * fade[n] + total[n]);
  }
}

template <class T>
WAVLM_FAST_INLINE void finish(const GatedAttention<T>& call, std::int64_t b, std::int64_t h, std::int64_t first,
                              std::int64_t count, std::int64_t width, const Block& block) {
  T* out = call.out + ((b * call.T_ + first) * call.H + h) * call.D;
  float* lse = call.lse + (b * call.H + h) * call.T_ + first;
  for (std::int64_t i = 0; i < count; ++i, out += call.H * call.D) {
    // No key at all leaves a total of zero and sums of zero.
    const float share = block.total[i] == 0.0f ? 0.0f : call.dropout.kept_scale / block.total[i];
    for (std::int64_t d = 0; d < call.D; ++d) narrow(block.sums[d * width + i] * share, out + d);
    lse[i] = block.top[i] + __builtin_logf(block.total[i]);
  }
}

// The bias between the keys from j0 and the queries from i0; zero beyond the utterance, where nobody looks.
WAVLM_FAST_INLINE void reverse_bias(const float* rel_bias, std::int64_t T, std::int64_t i0, std::int64_t j0,
                                    float* to) {
  const std::int64_t last = T - 1 + j0 - i0 + kKeys - 1;
  for (std::int64_t x = 0; x < kKeys + kQueries; ++x) {
    const std::int64_t entry = last - x;
    to[x] = entry >= 0 && entry < 2 * T - 1 ? rel_bias[entry] : 0.0f;
  }
}

std::size_t block_size(std::int64_t D) { return (2 * rounded_up(D, kRows) + 3) * kQueries; }

std::size_t scratch_size(std::int64_t D) {
  return kBlocks * block_size(D) + 2 * kKeys * rounded_up(D, kRows) + kKeys * kQueries + kKeys + kQueries;
}

template <class Element, class T, int kD>
void run(const GatedAttention<T>& call, std::int64_t b, std::int64_t h, std::int64_t first, std::int64_t count,
         float* scratch) {
  const std::int64_t D = kD ? kD : call.D, padded = rounded_up(D, kRows);
  const std::int64_t keys = call.key_lengths ? least(call.key_lengths[b], call.T_) : call.T_;
  Tile tile;
  tile.keys = scratch;
  tile.values = tile.keys + kKeys * padded;
  tile.scores = tile.values + kKeys * padded;
  tile.bias = tile.scores + kKeys * kQueries;
  float* at = tile.bias + kKeys + kQueries;
  Block blocks[kBlocks];
  const std::int64_t n_blocks = (count + kQueries - 1) / kQueries;
  const auto of_block = [&](std::int64_t i) { return least(kQueries, count - i * kQueries); };
  for (std::int64_t i = 0; i < n_blocks; ++i, at += block_size(D)) {
    float* state = at + 2 * padded * kQueries;
    blocks[i] = {at, at + padded * kQueries, state, state + kQueries, state + 2 * kQueries,
                 (b * call.H + h) * call.T_ + first + i * kQueries};
    start<Element>(call, b, h, first + i * kQueries, of_block(i), rounded_up(of_block(i), kLanes), blocks[i]);
  }
  const T* k = call.k + b * call.k_strides.b + h * call.k_strides.h;
  const T* v = call.v + b * call.v_strides.b + h * call.v_strides.h;
  const float* rel_bias = call.rel_bias + h * (2 * call.T_ - 1);
  for (std::int64_t j = 0; j < keys; j += kKeys) {
    const std::int64_t n_keys = least(kKeys, keys - j);
    tile.first_key = j;
    pack_rows<Element>(k + j * call.k_strides.t, call.k_strides.t, n_keys, D, tile.keys);
    pack_columns<Element>(v + j * call.v_strides.t, call.v_strides.t, n_keys, D, tile.values);
    for (std::int64_t i = 0; i < n_blocks; ++i) {
      reverse_bias(rel_bias, call.T_, first + i * kQueries, j, tile.bias);
      const std::int64_t vectors = rounded_up(of_block(i), kLanes) / kLanes;
      if (vectors == 3) attend<Element, 3>(call, tile, n_keys, D, blocks[i]);
      if (vectors == 2) attend<Element, 2>(call, tile, n_keys, D, blocks[i]);
      if (vectors == 1) attend<Element, 1>(call, tile, n_keys, D, blocks[i]);
    }
  }
  for (std::int64_t i = 0; i < n_blocks; ++i) {
    finish(call, b, h, first + i * kQueries, of_block(i), rounded_up(of_block(i), kLanes), blocks[i]);
  }
}

template <class Element, class T>
void forward(const GatedAttention<T>& call, std::int64_t b, std::int64_t h, std::int64_t first, std::int64_t count,
             float* scratch) {
  if (call.D == 64) return run<Element, T, 64>(call, b, h, first, count, scratch);
  run<Element, T, 0>(call, b, h, first, count, scratch);
}

#if defined(__AVX512BF16__)
using OfBf16 = Pair;
#else
using OfBf16 = Single;
#endif

}  // namespace

const GatedAttentionKernels& gated_attention_kernels() {
  static constexpr GatedAttentionKernels kernels = {kQueries, kBlocks, scratch_size, forward<Single, float>,
                                                    forward<OfBf16, bf16>};
  return kernels;
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
