// The gradient of gated_attention_kernel.cpp, in float32.
//
// With P the weights and dP = grad v^T, the gradient of the scores is P * (dP - sum over keys of P dP). That sum must
// be known before the first key can go on: a block of queries keeps P and dP of all keys, [T][width] each, which the
// second cache holds. The weights are recomputed from the saved log-sum-exp and divided by their sum once more, as the
// reference does.
//
// A task walks over blocks of queries of one utterance and head. Their shares in dk and dv are added up in order: those of
// a part's blocks first, and then those of the parts.
#include "attention_block.h"
#include "attention_diagonals.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {
namespace {

// Parts of an utterance and head: of a block each as long as that gives no more parts than any machine has use for, and
// their sums have to be kept apart where not one thread computes them all.
constexpr int kMostSingle = 12, kMostParts = 8;

std::int64_t parts_of(std::int64_t blocks) { return blocks <= kMostSingle ? blocks : kMostParts; }

constexpr int kKeys = 64;  // of a tile: what is computed of it is used again while the first cache has it

// Sizes in floats, each in whole vectors.
struct Sizes {
  std::int64_t T, channels, keys, slots;

  Sizes(std::int64_t T, std::int64_t D)
      : T(T),
        channels(rounded_up(D, kLanes)),
        keys(rounded_up(T, rounded_up(kRows, kLanes))),  // as many as whole groups of rows read
        slots(keys / kLanes + kVectors) {}

  std::int64_t square() const { return rounded_up(channels, kRows) * kQueries; }
  std::int64_t sums() const { return 2 * T * channels; }
  std::int64_t scratch() const {
    return keys * (2 * channels + 2 * kQueries) + 5 * square() + slots * kLanes * (kLanes + 1) + 4 * kQueries +
           (single() ? 0 : sums());
  }
  std::int64_t blocks() const { return divided_up(T, kQueries); }
  std::int64_t parts() const { return parts_of(blocks()); }
  bool single() const { return parts() == blocks(); }
};

// What a task works in.
struct Work {
  float* k;  // [keys][channels], as v
  float* v;
  float* weights;   // [keys][width], not yet divided by their sums
  float* dweights;  // [keys][width]; gradients of scores take their place, to be divided by the sums as well
  float* q;         // [channels][width], as grad and dq
  float* grad;
  float* dq;
  float* q_panels;  // each row times its factor
  float* grad_panels;
  float* diagonals;  // see Diagonals
  float* gate;       // in units of scores, [width] as all below
  float* share;      // 1 / sum of weights
  float* dgate;
  float* bias_gate;  // gate * share
  float* part;       // sums of a part's keys, where it has several blocks

  Work(const Sizes& sizes, float* at) {
    const auto take = [&](std::int64_t size) { return (at += size) - size; };
    k = take(sizes.keys * sizes.channels), v = take(sizes.keys * sizes.channels);
    weights = take(sizes.keys * kQueries), dweights = take(sizes.keys * kQueries);
    q = take(sizes.square()), grad = take(sizes.square()), dq = take(sizes.square());
    q_panels = take(sizes.square()), grad_panels = take(sizes.square());
    diagonals = take(sizes.slots * kLanes * (kLanes + 1));
    gate = take(kQueries), share = take(kQueries), dgate = take(kQueries), bias_gate = take(kQueries);
    part = at;
  }
};

struct Block {
  std::int64_t first, count;  // queries
  std::int64_t row;           // of the first query, see row_of
};

// Where a head of a frame is in contiguous [B, frames, H, D].
template <class T>
constexpr std::int64_t contiguous(const GatedAttentionBackward<T>& call, const Utterance& of, std::int64_t h,
                                  std::int64_t frame) {
  return ((of.b * call.frames + of.first + frame) * call.H + h) * call.D;
}

template <class T>
void start(const GatedAttentionBackward<T>& call, const Utterance& of, std::int64_t h, const Block& block,
           std::int64_t width, const Work& work) {
  const T* q = head_of(call.q, call.q_strides, of, h) + block.first * call.q_strides.t;
  const T* grad = call.grad + contiguous(call, of, h, block.first);
  copy_transposed<Single>(q, call.q_strides.t, block.count, call.D, width, work.q);
  multiply_words<Single>(work.q, call.D * width, call.power);
  copy_transposed<Single>(grad, call.H * call.D, block.count, call.D, width, work.grad);
  for (std::int64_t i = 0; i < width; i += kLanes) {
    store(work.gate + i, load_some(call.gate + block.row + i, block.count - i) / call.unit);
    store(work.dgate + i, Floats{});
  }
}

// Zeroes what belongs to dropped weights.
template <int N>
void drop(const Dropout& dropout, std::int64_t row, std::int64_t first, std::int64_t count, float* x) {
  for (int n = 0; n < N; ++n) {
    const Words keys = dropout_keys(dropout, row + n * kLanes);
    for (std::int64_t j = 0; j < count; ++j) {
      float* at = x + (j * N + n) * kLanes;
      store(at, masked(load(at), kept(dropout, keys, first + j)));
    }
  }
}

// Sums over the keys of a block, by queries: of the weights, and of the weights times their gradients.
template <int N>
struct Rows {
  Floats total[N], mean[N];

  WAVLM_FAST_INLINE void clear() {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) total[n] = mean[n] = Floats{};
  }

  WAVLM_FAST_INLINE void add(const Rows& other) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) total[n] += other.total[n], mean[n] += other.mean[n];
  }
};

// dweights[j][i] = sum over channels of v[j] * grad[i], for a tile of keys from `first_key` on. A row's gradients of
// scores sum to zero only as far as the sums of rows are exact: few numbers are added up at a time.
template <int N>
void gradients_of_weights(const Keys& v, std::int64_t first_key, std::int64_t row, const Dropout& dropout,
                          const float* grad, const float* weights, float* dweights, Rows<N>& rows) {
  Rows<N> tile;
  tile.clear();
  Words dropped[N];
  for (int n = 0; n < N; ++n) dropped[n] = dropout_keys(dropout, row + n * kLanes);
  for (std::int64_t first = 0; first < v.count; first += kRows) {
    const Word* values[kRows];
    for (int r = 0; r < kRows; ++r) values[r] = v.rows + (first + r) * v.stride;
    Floats acc[kRows][N] = {};
    multiply<Single>(values, 1, grad, v.words, acc);
    Rows<N> few;
    few.clear();
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= v.count) break;
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        if (dropout.threshold) {
          acc[r][n] *= masked(splat(dropout.kept_scale), kept(dropout, dropped[n], first_key + first + r));
        }
        const std::int64_t at = ((first + r) * N + n) * kLanes;
        const Floats weight = load(weights + at);
        few.total[n] += weight;
        few.mean[n] += weight * acc[r][n];
        store(dweights + at, acc[r][n]);
      }
    }
    tile.add(few);
  }
  rows.add(tile);
}

// The weights of a block, their gradients, and the sums of their rows.
template <int N, class T>
void weigh_block(const GatedAttentionBackward<T>& call, const float* bias, const Block& block, std::int64_t keys,
                 const Sizes& sizes, const Work& work, Rows<N>& rows) {
  Softmax softmax[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const Floats lse = load_some(call.lse + block.row + n * kLanes, block.count - n * kLanes);
    softmax[n] = Softmax(lse / call.unit, call.unit);
  }
  rows.clear();
  for (std::int64_t j = 0; j < keys; j += kKeys) {
    const std::int64_t count = least(kKeys, keys - j);
    float* weights = work.weights + j * N * kLanes;
    Floats ignored[N] = {};
    score<Single>(Registers{}, {work.k + j * sizes.channels, sizes.channels, count, call.D}, work.q, work.gate,
                  bias - j, weights, ignored);
    weigh(Single{}, weights, count, softmax, ignored);
    gradients_of_weights<N>({work.v + j * sizes.channels, sizes.channels, count, call.D}, j, block.row, call.dropout,
                            work.grad, weights, work.dweights + j * N * kLanes, rows);
  }
}

// Gradients of the weights of a tile -> of its scores, in place, and what they add to dgate and the diagonals.
template <int N>
void differentiate(std::int64_t first, std::int64_t count, std::int64_t queries, const float* bias,
                   const Floats (&mean)[N], const Diagonals& diagonals, const Work& work) {
  Floats dgate[N] = {}, gate[N];
  Words lanes[N];  // those of queries: at others the score of an infinite bias is NaN
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    gate[n] = load(work.bias_gate + n * kLanes);
    lanes[n] = first_lanes(queries - n * kLanes);
  }
  for (std::int64_t j = first; j < first + count; ++j) {
    const float* weights = work.weights + j * N * kLanes;
    float* dscores = work.dweights + j * N * kLanes;
    float* diagonal = diagonals.of(j);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const int at = n * kLanes;
      const Floats dscore = load(weights + at) * (load(dscores + at) - mean[n]);
      store(dscores + at, dscore);
      dgate[n] += dscore * load(bias - j + at);
      store(diagonal + at, load(diagonal + at) + masked(dscore * gate[n], lanes[n]));
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) store(work.dgate + n * kLanes, load(work.dgate + n * kLanes) + dgate[n]);
}

// dq (+)= k^T dscores.
template <int N>
void add_to_queries(const Keys& k, const float* dscores, bool add, float* dq) {
  for (std::int64_t d = 0; d < k.words; d += kRows, dq += kRows * N * kLanes) {
    const Word* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = k.rows + d + r;
    Floats acc[kRows][N] = {};
    multiply<Single>(rows, k.stride, dscores, k.count, acc);
    store_tile(acc, add, dq, N * kLanes);
  }
}

// sums[j] (+)= sum over queries i of x[j][i] * panel[i], for the channels of one panel.
template <int M>
void add_to_keys(const float* x, std::int64_t count, std::int64_t width, const float* panel, std::int64_t queries,
                 bool add, float* sums, std::int64_t channels) {
  for (std::int64_t first = 0; first < count; first += kRows) {
    const Word* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = x + (first + r) * width;
    Floats acc[kRows][M] = {};
    multiply<Single>(rows, 1, panel, queries, acc);
    store_tile(acc, add, sums + first * channels, channels, count - first);
  }
}

// Rows of a block -> panels, each row times its query's share and `scale`.
template <class T>
void scaled_panels(const T* from, std::int64_t stride, std::int64_t rows, std::int64_t D, const float* share,
                   float scale, float* to) {
  copy_panels<Single>(from, stride, rows, D, rows, to);
  for_groups(divided_up(D, kLanes), [&](std::int64_t first, auto group) {
    float* row = to + first * kLanes * rows;
    for (std::int64_t i = 0; i < rows; ++i) {
      const float factor = share[i] * scale;
      for (int n = 0; n < group.count; ++n, row += kLanes) store(row, load(row) * factor);
    }
  });
}

// [channels][width] times the queries' shares and `scale` -> rows.
template <class T>
void store_queries(const float* dq, const float* share, float scale, std::int64_t width, const Block& block,
                   std::int64_t D, T* to, std::int64_t stride) {
  for (std::int64_t i = 0; i < block.count; i += kLanes) {
    const Floats factor = load(share + i) * scale;
    for (std::int64_t d = 0; d < D; d += kLanes) {
      Floats square[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) square[r] = load(dq + (d + r) * width + i) * factor;
      transpose(square);
      for (int r = 0; r < least(kLanes, block.count - i); ++r) {
        T* at = to + (i + r) * stride + d;
        D - d >= kLanes ? store(at, square[r]) : store(at, square[r], static_cast<int>(D - d));
      }
    }
  }
}

// The factor that makes the weights of a row add up to one, on what takes it early.
template <int N, class T>
void divide(const GatedAttentionBackward<T>& call, const Block& block, Rows<N>& rows, const Work& work) {
  for (int n = 0; n < N; ++n) {
    const std::int64_t left = block.count - n * kLanes;
    // A row without keys, or with none that is not at -inf, has weights of zero.
    const Floats lse = load_some(call.lse + block.row + n * kLanes, left);
    const Floats share = lse == -__builtin_inff() ? Floats{} : 1.0f / rows.total[n];
    rows.mean[n] *= share;
    store(work.share + n * kLanes, share);
    store(work.bias_gate + n * kLanes, load_some(call.gate + block.row + n * kLanes, left) * share);
  }
}

// The second half of a block, which needs the sums over all keys that the first half found.
template <int N, class T>
void block_gradients(const GatedAttentionBackward<T>& call, const Utterance& of, std::int64_t h, const Block& block,
                     std::int64_t keys, const Sizes& sizes, const Work& work, bool add, float* dk, float* dv,
                     float* dbias) {
  constexpr int kWidth = N * kLanes;
  const float* bias = bias_of(call, h) + block.first;
  Rows<N> rows;
  weigh_block<N>(call, bias, block, keys, sizes, work, rows);
  divide<N>(call, block, rows, work);
  const T* q = head_of(call.q, call.q_strides, of, h) + block.first * call.q_strides.t;
  const std::int64_t out = contiguous(call, of, h, block.first), stride = call.H * call.D;
  scaled_panels(q, call.q_strides.t, block.count, call.D, work.share, call.scale, work.q_panels);
  scaled_panels(call.grad + out, stride, block.count, call.D, work.share, call.dropout.kept_scale, work.grad_panels);
  const Diagonals diagonals(work.diagonals, keys, N);
  if (keys == 0) std::memset(work.dq, 0, sizes.square() * sizeof(float));
  for (std::int64_t j = 0; j < keys; j += kKeys) {
    const std::int64_t count = least(kKeys, keys - j);
    float* weights = work.weights + j * kWidth;
    const float* dscores = work.dweights + j * kWidth;
    differentiate<N>(j, count, block.count, bias, rows.mean, diagonals, work);
    if (call.dropout.threshold) drop<N>(call.dropout, block.row, j, count, weights);
    add_to_queries<N>({work.k + j * sizes.channels, sizes.channels, count, call.D}, dscores, j > 0, work.dq);
    for_groups(sizes.channels / kLanes, [&](std::int64_t first, auto group) {
      const std::int64_t column = first * kLanes, at = j * sizes.channels + column;
      const std::int64_t panel = column * block.count;
      add_to_keys<group.count>(dscores, count, kWidth, work.q_panels + panel, block.count, add, dk + at,
                               sizes.channels);
      add_to_keys<group.count>(weights, count, kWidth, work.grad_panels + panel, block.count, add, dv + at,
                               sizes.channels);
    });
  }
  diagonals.fold(work.diagonals + sizes.slots * kLanes * kLanes,
                 dbias + block.first + of.T - 1 - diagonals.last * kLanes);
  store_queries(work.dq, work.share, call.scale, kWidth, block, call.D, call.dq + out, stride);
  for (std::int64_t i = 0; i < block.count; ++i) call.dgate[block.row + i] = work.dgate[i] * work.share[i];
}

// One block of queries; its sums of keys take the place of those there, or are added to them.
template <class T>
void add_block(const GatedAttentionBackward<T>& call, const Utterance& of, std::int64_t h, std::int64_t i,
               std::int64_t keys, const Sizes& sizes, const Work& work, bool add, float* sums, float* dbias) {
  const std::int64_t first = first_query(i, of.T), end = first_query(i + 1, of.T), width = end - first;
  const Block block = {first, least(end, of.T) - first, row_of(call, of, h, first)};
  start(call, of, h, block, width, work);
  with_vectors(width / kLanes, [&](auto group) {
    block_gradients<group.count>(call, of, h, block, keys, sizes, work, add, sums, sums + of.T * sizes.channels, dbias);
  });
}

template <class T>
void parts(const GatedAttentionBackward<T>& call, const Utterance& of, std::int64_t h, std::int64_t first,
           std::int64_t end, float* sums, float* dbias, float* scratch) {
  const Sizes sizes(of.T, call.D);
  const Work work(sizes, scratch);
  const std::int64_t keys = keys_of(call, of), bias_size = 2 * of.T - 1 + 2 * kQueries;
  std::memset(dbias - kQueries, 0, (end - first) * bias_size * sizeof(float));
  std::memset(work.diagonals, 0, sizes.slots * kLanes * kLanes * sizeof(float));
  copy_rows<Single>(head_of(call.k, call.k_strides, of, h), call.k_strides.t, keys, call.D, sizes.channels, work.k);
  copy_rows<Single>(head_of(call.v, call.v_strides, of, h), call.v_strides.t, keys, call.D, sizes.channels, work.v);
  for (std::int64_t p = first; p < end; ++p, dbias += bias_size) {
    const std::int64_t begin = p * sizes.blocks() / sizes.parts();
    const std::int64_t behind = (p + 1) * sizes.blocks() / sizes.parts();
    float* const own = p == first || sizes.single() ? sums : work.part;
    for (std::int64_t i = begin; i < behind; ++i) {
      add_block(call, of, h, i, keys, sizes, work, i > begin || (p > first && own == sums), own, dbias);
    }
    if (own == sums) continue;
    for (std::int64_t at = 0; at < sizes.sums(); at += of.T * sizes.channels) {  // of dk, of dv
      for (std::int64_t n = at; n < at + keys * sizes.channels; n += kLanes) {
        store(sums + n, load(sums + n) + load(own + n));
      }
    }
  }
}

template <class T>
void keys(const GatedAttentionBackward<T>& call, const Utterance& of, std::int64_t h, std::int64_t first,
          std::int64_t end, const float* sums, std::int64_t count) {
  const Sizes sizes(of.T, call.D);
  const std::int64_t size = of.T * sizes.channels, keys = keys_of(call, of);
  T* const outs[] = {call.dk, call.dv};
  for (T* out : outs) {
    T* to = out + contiguous(call, of, h, first);
    for (std::int64_t j = first; j < end; ++j, to += call.H * call.D) {
      sweep(call.D, [&](std::int64_t d, auto lanes, int) {
        Floats sum = {};
        for (std::int64_t p = 0; p < count && j < keys; ++p) sum += load(sums + 2 * p * size + j * sizes.channels + d);
        lanes.store(to + d, sum);
      });
    }
    sums += size;
  }
}

std::size_t scratch_size(std::int64_t T, std::int64_t D) { return Sizes(T, D).scratch(); }

std::size_t sums_size(std::int64_t T, std::int64_t D) { return Sizes(T, D).sums(); }

}  // namespace

const GatedAttentionBackwardKernels& gated_attention_backward_kernels() {
  static constexpr GatedAttentionBackwardKernels kernels = {kQueries,     parts_of,    scratch_size, sums_size,
                                                            parts<float>, parts<bf16>, keys<float>,  keys<bf16>};
  return kernels;
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
