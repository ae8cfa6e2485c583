// softmax(scale * q k^T + gate * bias) v without a [T, T] matrix.
//
// A task walks over the keys in tiles. A tile is copied once and used by all query blocks of the task, so nothing of
// size T is ever held.
#include "attention_tiles.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {
namespace {

constexpr int kKeys = 128;   // of a tile: scores and queries of a block stay close to the first cache
constexpr int kBlocks = 12;  // of a task: their queries and sums stay in the second cache

// A block of queries with its running softmax.
struct Block {
  float* q;                   // [words of D][width]
  float* sums;                // [width][channels]: sum over keys of weight * value; on tiles [channels][width]
  float* gate;                // in units of scores
  float* top;                 // greatest score
  float* total;               // sum of weights
  std::int64_t first, count;  // queries
  std::int64_t width;         // count in whole vectors
};

struct Tile {
  float* keys;    // [kKeys][words of D]
  float* values;  // panels; on tiles [channels][kKeys / 2] pairs of keys, which leave half of the room
  float* scores;  // [kKeys][width of a block]; weights take their place
  float* spare;   // that half, for the sums of a block
  std::int64_t first, count;
};

// Sizes in floats, each in whole vectors.
struct Sizes {
  std::int64_t words, channels;  // of a row of D numbers

  Sizes(std::int64_t D, int depth) : words(rounded_up(divided_up(D, depth), kLanes)), channels(rounded_up(D, kLanes)) {}

  std::int64_t sums() const { return rounded_up(kQueries, kRows) * channels; }
  std::int64_t block() const { return words * kQueries + sums() + 3 * kQueries; }
  std::int64_t tile() const { return kKeys * (words + channels + kQueries) + rounded_up(kRows, kLanes); }
};

template <class Element, class T>
void start(const GatedAttention<T>& call, const Utterance& of, std::int64_t h, const T* q, const Block& block) {
  copy_transposed<Element>(q, call.q_strides.t, block.count, call.D, block.width, block.q);
  multiply_words<Element>(block.q, divided_up(call.D, Element::kDepth) * block.width, call.power);
  const float* gate = call.gate + row_of(call, of, h, block.first);
  for (std::int64_t i = 0; i < block.width; i += kLanes) {
    store(block.gate + i, load_some(gate + i, block.count - i) / call.unit);
    store(block.top + i, splat(-__builtin_inff()));
    store(block.total + i, Floats{});
  }
}

// Lane i of a pair of rows, rounded: weight of the first key in the low half, of the second in the high half.
#if defined(__AVX512BF16__)
struct Pairing {
  alignas(64) static constexpr auto kInterleave = [] {
    struct {
      std::uint16_t index[32];
    } table{};
    for (int i = 0; i < 32; ++i) table.index[i] = i / 2 + i % 2 * 16;
    return table;
  }();
  __m512i interleave = _mm512_load_si512(&kInterleave);

  WAVLM_FAST_INLINE Floats operator()(Floats even, Floats odd) const {
    return (Floats)_mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
  }
};
#elif WAVLM_FAST_HAS_PAIRS
struct Pairing {
  WAVLM_FAST_INLINE Floats operator()(Floats even, Floats odd) const {
    const bfloat16x8_t first = vcvtq_low_bf16_f32((float32x4_t)even), second = vcvtq_low_bf16_f32((float32x4_t)odd);
    return (Floats)vzip1q_u16((uint16x8_t)first, (uint16x8_t)second);
  }
};
#endif

#if WAVLM_FAST_HAS_PAIRS
template <int N>
WAVLM_FAST_INLINE void weigh(Pair, float* scores, std::int64_t keys, const Softmax (&softmax)[N], Floats (&total)[N]) {
  const Pairing pairing;
  float* weights = scores;
  for (std::int64_t j = 0; j < keys; j += 2, scores += 2 * N * kLanes, weights += N * kLanes) {
    const bool both = j + 1 < keys;
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const Floats even = softmax[n].weight(load(scores + n * kLanes));
      const Floats odd = both ? softmax[n].weight(load(scores + (N + n) * kLanes)) : Floats{};
      total[n] += even + odd;
      store(weights + n * kLanes, pairing(even, odd));
    }
  }
}
#endif

// Zeroes the weights that dropout takes. The sum of weights is not touched: dropout follows the softmax.
template <class Element, int N>
void drop(const Dropout& dropout, std::int64_t first_row, const Tile& tile) {
  for (int n = 0; n < N; ++n) {
    const Words keys = dropout_keys(dropout, first_row + n * kLanes);
    for (std::int64_t j = 0; j < tile.count; j += Element::kDepth) {
      Words mask = kept(dropout, keys, tile.first + j);
      if (Element::kDepth == 2) mask = (mask & 0xffffu) | (kept(dropout, keys, tile.first + j + 1) << 16);
      float* weights = tile.scores + (j / Element::kDepth * N + n) * kLanes;
      store(weights, masked(load(weights), mask));
    }
  }
}

// sums = sums * fade + weights^T values, for the channels of one panel; the old sums count only if `add`.
template <class Element, int N, int M>
void accumulate(const float* weights, const float* panel, std::int64_t words, bool add, const float* fade, float* sums,
                std::int64_t channels) {
  for (int i = 0; i < N * kLanes; i += kRows) {
    const Word* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = weights + i + r;
    // From zero: the rounding error of a sum of tiles grows with the number of tiles, not of keys.
    Floats acc[kRows][M] = {};
    multiply<Element>(rows, N * kLanes, panel, words, acc);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Floats keep = splat(fade[i + r]);
      float* at = sums + (i + r) * channels;
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        store(at + m * kLanes, add ? load(at + m * kLanes) * keep + acc[r][m] : acc[r][m]);
      }
    }
  }
}

// What depends on who multiplies, registers or a unit of tiles. First how the values of a tile of keys are laid out, whose
// first row is at `from`.
template <class Element, class T>
void copy_values(Registers, const T* from, std::int64_t stride, std::int64_t D, const Sizes&, const Tile& tile) {
  copy_panels<Element>(from, stride, tile.count, D, kKeys, tile.values);
}

// The block's sums = sums * fade + weights^T values.
template <class Element, int N>
void add_values(Registers, const Sizes& sizes, const Tile& tile, const float* fade, const Block& block) {
  for_groups(sizes.channels / kLanes, [&](std::int64_t first, auto group) {
    accumulate<Element, N, group.count>(tile.scores, tile.values + first * kLanes * kKeys,
                                        divided_up(tile.count, Element::kDepth), tile.first > 0, fade,
                                        block.sums + first * kLanes, sizes.channels);
  });
}

// The block's sums as [width][channels].
const float* sums_of(Registers, const Sizes&, const Tile&, const Block& block) { return block.sums; }

#if defined(WAVLM_FAST_TILES)
template <class Element, class Unit, class T>
void copy_values(Unit&, const T* from, std::int64_t stride, std::int64_t D, const Sizes&, const Tile& tile) {
  copy_pairs_of_rows(from, stride, tile.count, D, kKeys / 2, tile.values);
}

template <class Element, int N, class Unit>
void add_values(Unit& unit, const Sizes& sizes, const Tile& tile, const float* fade, const Block& block) {
  accumulate_turned<N>(unit, tile.values, kKeys / 2, sizes.channels, tile.scores, divided_up(tile.count, 2),
                       tile.first > 0, fade, tile.spare, block.sums);
}

template <class Unit>
const float* sums_of(Unit&, const Sizes& sizes, const Tile& tile, const Block& block) {
  copy_transposed<Single>(block.sums, block.width, sizes.channels, block.width, sizes.channels, tile.spare);
  return tile.spare;
}
#endif

// One tile of keys for one block of N vectors of queries.
template <class Element, int N, class Engine, class T>
void attend(Engine& engine, const GatedAttention<T>& call, const Utterance& of, std::int64_t h, const Sizes& sizes,
            const Tile& tile, const Block& block) {
  const float* bias = bias_of(call, h) + block.first - tile.first;
  Floats top[N], total[N] = {};
  Softmax softmax[N];
  alignas(64) float fade[N * kLanes + kRows];
  if constexpr (N * kLanes % kRows != 0) store(fade + N * kLanes, Floats{});  // the last tile of rows is half a block's
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) top[n] = load(block.top + n * kLanes);
  const Keys keys = {tile.keys, sizes.words, tile.count, divided_up(call.D, Element::kDepth)};
  score<Element>(engine, keys, block.q, block.gate, bias, tile.scores, top);
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    softmax[n] = Softmax(top[n], call.unit);
    const Floats keep = softmax[n].weight(load(block.top + n * kLanes));
    store(fade + n * kLanes, keep);
    store(block.top + n * kLanes, top[n]);
  }
  weigh(Element{}, tile.scores, tile.count, softmax, total);
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    float* at = block.total + n * kLanes;
    store(at, load(at) * load(fade + n * kLanes) + total[n]);
  }
  if (call.dropout.threshold) drop<Element, N>(call.dropout, row_of(call, of, h, block.first), tile);
  add_values<Element, N>(engine, sizes, tile, fade, block);
}

template <class T>
void finish(const GatedAttention<T>& call, const Utterance& of, std::int64_t h, const Sizes& sizes, const Block& block,
            const float* sums) {
  T* out = head_of(call.out, call.out_strides, of, h) + block.first * call.out_strides.t;
  float* lse = call.lse + row_of(call, of, h, block.first);
  for (std::int64_t i = 0; i < block.count; ++i, out += call.out_strides.t, sums += sizes.channels) {
    const float top = block.top[i], total = block.total[i];
    const bool none = top == -__builtin_inff() && total == total;  // no key, or none that is not at -inf
    const float share = none ? 0.0f : call.dropout.kept_scale / total;
    sweep(call.D, [&](std::int64_t d, auto lanes, int) { lanes.store(out + d, load(sums + d) * share); });
    lse[i] = none ? top : top * call.unit + __builtin_logf(total);
  }
}

// The blocks' places in scratch.
void place(std::int64_t T, const Sizes& sizes, std::int64_t first_block, std::int64_t count, float* scratch,
           Block* blocks) {
  for (std::int64_t i = 0; i < count; ++i, scratch += sizes.block()) {
    const std::int64_t begin = first_query(first_block + i, T), end = first_query(first_block + i + 1, T);
    float* sums = scratch + sizes.words * kQueries;
    float* state = sums + sizes.sums();
    blocks[i] = {scratch,    sums, state, state + kQueries, state + 2 * kQueries, begin, least(end, T) - begin,
                 end - begin};
  }
}

template <class Engine, class Element, class T>
void forward(const GatedAttention<T>& call, const Utterance& of, std::int64_t h, std::int64_t first_block,
             std::int64_t end_block, float* scratch) {
  const Sizes sizes(call.D, Element::kDepth);
  Engine engine;
  Tile tile;
  tile.keys = scratch;
  tile.values = tile.keys + kKeys * sizes.words;
  tile.spare = tile.values + kKeys / 2 * sizes.channels;
  tile.scores = tile.values + kKeys * sizes.channels;
  Block blocks[kBlocks];
  const std::int64_t n_blocks = end_block - first_block;
  place(of.T, sizes, first_block, n_blocks, scratch + sizes.tile(), blocks);
  const T* q = head_of(call.q, call.q_strides, of, h);
  const T* k = head_of(call.k, call.k_strides, of, h);
  const T* v = head_of(call.v, call.v_strides, of, h);
  const std::int64_t keys = keys_of(call, of);
  tile.first = 0;
  do {  // once even without keys, so that there are zeros to finish with
    tile.count = least(kKeys, keys - tile.first);
    copy_rows<Element>(k + tile.first * call.k_strides.t, call.k_strides.t, tile.count, call.D, sizes.words, tile.keys);
    copy_values<Element>(engine, v + tile.first * call.v_strides.t, call.v_strides.t, call.D, sizes, tile);
    const std::int64_t next = tile.first + kKeys, n_next = next < keys ? least(kKeys, keys - next) : 0;
    for (std::int64_t i = 0; i < n_blocks; ++i) {
      const Block& block = blocks[i];
      if (tile.first == 0) {
        start<Element>(call, of, h, q + block.first * call.q_strides.t, block);
        if (i + 1 < n_blocks) {
          prefetch_rows(q + blocks[i + 1].first * call.q_strides.t, call.q_strides.t, blocks[i + 1].count, call.D);
        }
      }
      const std::int64_t row = n_next * i / n_blocks, rows = n_next * (i + 1) / n_blocks - row;
      prefetch_rows(k + (next + row) * call.k_strides.t, call.k_strides.t, rows, call.D);
      prefetch_rows(v + (next + row) * call.v_strides.t, call.v_strides.t, rows, call.D);
      with_vectors(block.width / kLanes,
                   [&](auto group) { attend<Element, group.count>(engine, call, of, h, sizes, tile, block); });
      if (n_next == 0) finish(call, of, h, sizes, block, sums_of(engine, sizes, tile, block));
    }
    tile.first = next;
  } while (tile.first < keys);
}

std::size_t scratch_size(std::int64_t D) {
  const Sizes sizes(D, 1);
  return kBlocks * sizes.block() + sizes.tile();
}

using Forward = GatedAttentionForward<bf16>*;
#if defined(WAVLM_FAST_TILES)
constexpr Forward kOnTiles = forward<Unit, Pair>, kEmulated = forward<EmulatedUnit, Pair>;
static_assert(kKeys % (2 * kTileWords) == 0 && kQueries <= kKeys / 2);
#else
constexpr Forward kOnTiles = nullptr, kEmulated = nullptr;
#endif

}  // namespace

const GatedAttentionKernels& gated_attention_kernels() {
  static constexpr GatedAttentionKernels kernels = {
      kQueries, kBlocks, scratch_size, forward<Registers, Single>, forward<Registers, OfBf16>, kOnTiles, kEmulated};
  return kernels;
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
