// Convolutions with packed weights, an engine: linear_act, strided_conv and tdnn are one call of it, and encoder_layer,
// feature_encoder and waveform_conv use it through packed_conv_entry.h.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "integers.h"
#include "library.h"
#include "packed_conv_entry.h"
#include "parallel.h"
#include "resized_frames.h"
#include "tile_unit.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(PackedConvKernels, packed_conv_kernels)

namespace {

// Of what is left, a thread takes that part: first much at a time, at the end little, so that threads end together.
constexpr int64_t kShares = 3;

// Bytes: long rows that lie so many bytes apart share few places of the caches.
constexpr int64_t kCrowded = 2048, kLong = 4096;

// Seconds for a task of rows 16 KB apart, on copies or on themselves; the best of three.
double time_of_task(bool copies) {
  using Clock = std::chrono::steady_clock;
  const auto& kernels = packed_conv();
  constexpr int64_t C = 4096, kGroups = 4;
  const int64_t channels = kGroups * kernels.columns, rows = kernels.most_frames;
  std::vector<float> x(rows * C), packed(channels * C), out(rows * channels);
  PackedConv<float, float> call{};
  call.x = x.data(), call.packed = packed.data(), call.out = out.data();
  call.C = call.row_step = C, call.taps = 1, call.channels = channels, call.copies = copies;
  const Memory memory(Scratch::task, kernels.scratch_size(C, false) * sizeof(float));
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < 3; ++i) {
    const auto start = Clock::now();
    kernels.of_float.direct(call, 0, rows, 0, kGroups, memory.as<float>());
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return best;
}

// Whether crowded rows are better copied; not where further caches are quick to give what the first one has lost. For
// a few milliseconds, once per process.
std::atomic<bool>& copies_pay() {
  static std::atomic<bool> pay(time_of_task(true) < 0.97 * time_of_task(false));
  return pay;
}

// The answer of this process, or for tests another one from now on.
bool copies_pay_op(std::optional<bool> pay) {
  if (pay) copies_pay() = *pay;
  return copies_pay();
}

template <class In>
bool is_better_copied(int64_t row_step, int64_t C) {
  const int64_t step = row_step * sizeof(In), size = C * sizeof(In);
  return step % kCrowded == 0 && size >= kLong && copies_pay();
}

// Frames of one piece, all of whose rows share a pass through the weights.
struct Block {
  int64_t piece, first, count;
};

void add_blocks(int64_t piece, int64_t frames, bool packed, bool filtered, std::vector<Block>& blocks) {
  if (frames == 0) return;
  const auto& kernels = packed_conv();
  const int64_t most = filtered ? kernels.most_filtered : packed ? kernels.most_frames : kernels.most_unpacked;
  const int64_t tile = filtered ? 3 * kernels.rows : kernels.rows;
  const int64_t step = std::min(most, divided_up(divided_up(frames, divided_up(frames, most)), tile) * tile);
  for (int64_t first = 0; first < frames; first += step) {
    blocks.push_back({piece, first, std::min(step, frames - first)});
  }
}

// [channels, 3, C] -> [channels, 5, C] in the order of Tap in packed_conv_kernel.cpp.
Tensor filter_taps(const Tensor& weight) {
  const Tensor wide = contiguous_of(weight, kFloat);
  const int64_t channels = weight.size(0), C = weight.size(2);
  const Tensor taps = fresh(wide, {channels, 5, C});
  const float* from = data<float>(wide);
  float* to = mutable_data<float>(taps);
  parallel_for(0, channels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t channel = begin; channel < end; ++channel) {
      const float *first = from + channel * 3 * C, *middle = first + C, *last = middle + C;
      float* out = to + channel * 5 * C;
      for (int64_t c = 0; c < C; ++c) {
        out[c] = middle[c], out[C + c] = first[c], out[2 * C + c] = last[c];
        out[3 * C + c] = (first[c] + last[c]) * 0.5f, out[4 * C + c] = (first[c] - last[c]) * 0.5f;
      }
    }
  });
  return contiguous_of(taps, dtype_of(weight));
}

}  // namespace

const PackedConvKernels& packed_conv() { return packed_conv_kernels(); }

template <>
const PackedConvVariants<float, float>& variants() {
  return packed_conv().of_float;
}
template <>
const PackedConvVariants<float, bf16>& variants() {
  return packed_conv().to_bf16;
}
template <>
const PackedConvVariants<bf16, bf16>& variants() {
  switch (tiles(TileWork::products)) {
    case Tiles::unit:
      return packed_conv().on_tiles;
    case Tiles::emulated:
      return packed_conv().on_emulated_tiles;
    default:
      return packed_conv().of_bf16;
  }
}

int activation_number(const std::string& name) {
  const char* names[] = {"none", "relu", "gelu", "gelu_tanh"};
  for (int i = 0; i < 4; ++i) {
    if (name == names[i]) return i;
  }
  refuse("unknown activation ", name);
}

bool multiplies_pairs(int64_t C) { return packed_conv().pairs && C % 2 == 0; }

int64_t packed_size(int64_t channels, int64_t taps, int64_t C, bool filtered) {
  return divided_up(channels, packed_conv().lanes) * packed_conv().lanes * (filtered ? 5 : taps) * C;
}

namespace {

// [channels, taps, C], contiguous, channels after channels: the rows of a matrix of taps * C columns.
template <class T>
struct Rows {
  std::vector<const T*> first;  // number of each row
  int64_t taps, C;

  explicit Rows(const std::vector<Tensor>& weights) : taps(weights[0].size(1)), C(weights[0].size(2)) {
    for (const Tensor& weight : weights) {
      const T* at = data<T>(weight);
      const int64_t channels = weight.size(0), row_step = weight.stride(0);
      for (int64_t row = 0; row < channels; ++row) first.push_back(at + row * row_step);
    }
  }
};

// Groups of columns one after the other, of each the taps.
template <class T>
void pack_rows(const Rows<T>& rows, int64_t padded, T* packed) {
  const int64_t terms = rows.taps * rows.C, columns = packed_conv().columns, channels = rows.first.size();
  parallel_for(0, divided_up(padded, columns), 1, [&](int64_t begin, int64_t end) {
    std::vector<const T*> from(columns);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * columns, width = std::min(columns, padded - first);
      const int64_t count = std::min(width, channels - first);
      for (int64_t tap = 0; tap < rows.taps; ++tap) {
        for (int64_t i = 0; i < count; ++i) from[i] = rows.first[first + i] + tap * rows.C;
        T* to = packed + first * terms + tap * rows.C * width;
        variants<T, T>().pack(from.data(), count, rows.C, width, reinterpret_cast<float*>(to));
      }
    }
  });
}

}  // namespace

Tensor pack_conv(std::vector<Tensor> weights, bool filtered) {
  ENTRY_CHECK(!weights.empty(), "pack_conv: expected one weight or more, got none");
  const Tensor& like = weights[0];
  for (const Tensor& weight : weights) {
    ENTRY_CHECK(weight.dim() == 3 && (dtype_of(weight) == kFloat || dtype_of(weight) == kBFloat16),
                "pack_conv: expected a float32 or bfloat16 weight of [channels, taps, C], got ", dtype_of(weight), " ",
                weight.sizes());
    ENTRY_CHECK(dtype_of(weight) == dtype_of(like) && weight.sizes().slice(1).equals(like.sizes().slice(1)),
                "pack_conv: expected weights alike, got ", weight.sizes(), " beside ", like.sizes());
    ENTRY_CHECK(!filtered || weight.size(1) == 3, "pack_conv: expected three taps to filter, got ", weight.size(1));
  }
  const auto& kernels = packed_conv();
  const bool pairs = dtype_of(like) == kBFloat16 && multiplies_pairs(like.size(2));
  int64_t channels = 0;
  for (const Tensor& weight : weights) channels += weight.size(0);
  // Before all that is given back: what is kept shall leave no hole in the heap.
  const Tensor packed =
      fresh(like, {packed_size(channels, like.size(1), like.size(2), filtered)}, pairs ? kBFloat16 : kFloat);
  for (Tensor& weight : weights) {
    if (filtered) weight = filter_taps(weight);
    weight = contiguous_of(weight, dtype_of(packed));
  }
  const int64_t padded = divided_up(channels, kernels.lanes) * kernels.lanes;
  if (pairs) {
    pack_rows(Rows<bf16>(weights), padded, mutable_data<bf16>(packed));
  } else {
    pack_rows(Rows<float>(weights), padded, mutable_data<float>(packed));
  }
  return packed;
}

template <class In, class Out>
void convolve(const std::vector<ConvPiece<In, Out>>& pieces, bool filtered) {
  std::vector<Block> blocks;
  for (size_t i = 0; i < pieces.size(); ++i) {
    add_blocks(i, pieces[i].frames, pieces[i].call.packed != nullptr, filtered, blocks);
  }
  if (blocks.empty() || pieces[0].call.channels == 0) return;
  // Tasks are a block of frames x a range of column groups. To filter, each task combines its frames anew.
  const int64_t row_tasks = blocks.size(), groups = divided_up(pieces[0].call.channels, packed_conv().columns);
  std::vector<int64_t> bounds = {0};
  while (bounds.back() < groups) {
    const int64_t left = groups - bounds.back(), share = left * row_tasks / (kShares * num_threads());
    bounds.push_back(bounds.back() + std::clamp<int64_t>(share, 1, divided_up(left, filtered ? 1 : 2)));
  }
  const bool copies =
      !filtered && pieces[0].call.packed && is_better_copied<In>(pieces[0].call.row_step, pieces[0].call.C);
  const auto forward = filtered ? variants<In, Out>().filtered : variants<In, Out>().direct;
  const size_t scratch_size = packed_conv().scratch_size(pieces[0].call.C, filtered);
  for_each_task(row_tasks * (bounds.size() - 1), scratch_size, [&](int64_t task, float* memory) {
    // Blocks of frames change fastest: threads then share a range of weights in the last cache.
    const Block& block = blocks[task % row_tasks];
    const int64_t range = task / row_tasks;
    auto call = pieces[block.piece].call;
    call.copies = copies && bounds[range + 1] - bounds[range] > 1;
    forward(call, block.first, block.count, bounds[range], bounds[range + 1], memory);
  });
}

template void convolve(const std::vector<ConvPiece<float, float>>&, bool);
template void convolve(const std::vector<ConvPiece<float, bf16>>&, bool);
template void convolve(const std::vector<ConvPiece<bf16, bf16>>&, bool);

namespace {

template <class In, class Out>
void run(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t taps, int64_t stride,
         int64_t dilation, bool filtered, int activation, const ResizedFrames& utterances, const Tensor& out) {
  const int64_t C = x.size(2), channels = out.size(2);
  PackedConv<In, Out> call{};
  call.x = data<In>(x);
  (packed.dim() == 1 ? call.packed : call.weight) = data<void>(packed);
  call.bias = data<float>(bias);
  call.out = mutable_data<Out>(out);
  call.C = C, call.taps = taps, call.channels = channels;
  call.row_step = stride * C, call.tap_step = dilation * C;
  call.activation = activation;
  if (filtered || utterances.equal()) {  // what is filtered together are neighbours
    std::vector<ConvPiece<In, Out>> pieces;
    for (int64_t b = 0; b < utterances.count(); ++b) {
      auto own = call;
      own.x += utterances.in(b)*C;
      own.out += utterances.out(b) * channels;
      pieces.push_back({own, utterances.out_frames(b)});
    }
    return convolve(pieces, filtered);
  }
  const int64_t total = utterances.out(utterances.count());
  // Rows of all utterances one behind the other: a short one fills no tile of rows, and no block.
  std::vector<int64_t> rows;
  rows.reserve(total);
  for (int64_t b = 0; b < utterances.count(); ++b) {
    for (int64_t t = 0; t < utterances.out_frames(b); ++t) rows.push_back((utterances.in(b) + t * stride) * C);
  }
  call.rows = rows.data();
  convolve(call, false, total);
}

// [B, T, C] -> [B, T', channels] with a weight from pack_conv, or where that would leave it in the dtype of x as it is,
// [channels, taps, C]; or packed frames beside their offsets.
Tensor packed_conv_op(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t channels,
                      int64_t taps, int64_t stride, int64_t dilation, bool filtered, const Text& activation,
                      const std::optional<Tensor>& offsets, const std::optional<Tensor>& out_offsets,
                      std::optional<int64_t> out_frames) {
  ENTRY_CHECK(x.dim() == 3 && (dtype_of(x) == kFloat || dtype_of(x) == kBFloat16),
              "packed_conv: expected float32 or bfloat16 x of [B, T, C], got ", dtype_of(x), " ", x.sizes());
  const bool pairs = dtype_of(packed) == kBFloat16;
  const int64_t C = x.size(2), frames = x.size(1);
  ENTRY_CHECK(pairs ? dtype_of(x) == kBFloat16 && multiplies_pairs(C) : dtype_of(packed) == kFloat,
              "packed_conv: expected a weight packed from the dtype of x, got ", dtype_of(packed), " for ",
              dtype_of(x));
  check_positive("packed_conv", {{"C", C},
                                 {"channels", channels},
                                 {"taps", taps},
                                 {"stride", stride},
                                 {"dilation", dilation},
                                 {"frames", frames}});
  ENTRY_CHECK(taps - 1 <= (frames - 1) / dilation && channels <= packed.numel(), "packed_conv: expected frames for ",
              taps, " taps at a dilation of ", dilation, " and a weight of ", channels, " channels, got ", frames,
              " frames and ", packed.numel(), " numbers");
  const int64_t span = (taps - 1) * dilation + 1;
  stride = std::min(stride, frames);  // no more than one output frame either way, and nothing overflows
  ENTRY_CHECK(!filtered || (taps == 3 && stride == 2 && dilation == 1),
              "packed_conv: expected three taps at a stride of two to filter, got ", taps, " at ", stride);
  const bool as_it_is = packed.dim() == 3 && !filtered && pairs == (dtype_of(x) == kBFloat16);
  const int64_t size = as_it_is ? channels * taps * C : packed_size(channels, taps, C, filtered);
  ENTRY_CHECK(packed.is_contiguous() && packed.numel() == size && (as_it_is || packed.dim() == 1),
              "packed_conv: expected a weight packed for ", taps, " taps of ", C, " channels, got ", packed.sizes());
  check_vector("packed_conv", "bias", bias, channels);
  const auto bias_ = contiguous_of(bias, kFloat);
  const int number = activation_number(activation);
  const auto utterances = resized_frames("packed_conv", x.size(0), frames, offsets, out_offsets, out_frames,
                                         [&](int64_t own) { return own < span ? 0 : (own - span) / stride + 1; });
  const Tensor out = fresh(x, {x.size(0), utterances.row_frames(), channels});
  if (pairs) {
    run<bf16, bf16>(contiguous_of(x), packed, bias_, taps, stride, dilation, filtered, number, utterances, out);
  } else if (dtype_of(x) == kFloat) {
    run<float, float>(contiguous_of(x), packed, bias_, taps, stride, dilation, filtered, number, utterances, out);
  } else if (!packed_conv().pairs && !filtered) {
    run<bf16, bf16>(contiguous_of(x), packed, bias_, taps, stride, dilation, filtered, number, utterances, out);
  } else {
    run<float, bf16>(contiguous_of(x, kFloat), packed, bias_, taps, stride, dilation, filtered, number, utterances,
                     out);
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) {
  m.impl("pack_conv", TORCH_BOX(&pack_conv));
  m.impl("packed_conv", TORCH_BOX(&packed_conv_op));
}

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("copies_pay", TORCH_BOX(&copies_pay_op));
}

}  // namespace
}  // namespace wavlm_fast
