// A transformer layer, a group of frames at a time: what each step writes is still in the last cache when the next one
// reads it, and takes no memory that grows with the batch. Attention alone needs all frames of an utterance at once.
#include <algorithm>
#include <vector>

#include "check.h"
#include "gated_attention_entry.h"
#include "integers.h"
#include "library.h"
#include "norm_act_entry.h"
#include "packed_conv_entry.h"
#include "packed_frames.h"
#include "parallel.h"
#include "position_gate_entry.h"
#include "scratch.h"

namespace wavlm_fast {
namespace {

// Rows of a group. With its four times wider feed-forward frames it fits in the last cache.
constexpr int64_t kRows = 1024;
// A thread keeps no more than that from call to call.
constexpr int64_t kMostKept = 128 << 20;

// n in equal parts of at most kRows, or a little more so that tasks of whole tiles remain.
int64_t part_of(int64_t n) { return divided_up(divided_up(n, divided_up(n, kRows)), 16) * 16; }

// A layer norm or a linear layer on rows.
template <class T>
struct Norm {
  Tensor weight, bias;
  float eps;

  void operator()(const T* x, int64_t rows, T* out) const {
    const int64_t C = weight.size(0);
    const float *gain = data<float>(weight), *offset = data<float>(bias);
    const auto kernel = norm_act_kernel<T>();
    const int none = activation_number("none");
    parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      kernel(x + begin * C, gain, offset, eps, end - begin, C, none, out + begin * C);
    });
  }
};

template <class T>
struct Linear {
  Tensor packed, bias;
  int64_t C;
  int activation;

  int64_t channels() const { return bias.size(0); }

  // out = activation(linear(x)), plus the residual if there is one. Rows of x lie row_step numbers apart, C if 0.
  void operator()(const T* x, int64_t rows, T* out, const T* residual = nullptr, int64_t row_step = 0) const {
    PackedConv<T, T> call{};
    call.x = x, call.packed = data<void>(packed), call.bias = data<float>(bias);
    call.residual = residual, call.out = out;
    call.C = C, call.taps = 1, call.row_step = row_step ? row_step : C, call.channels = channels();
    call.activation = activation;
    convolve(call, false, rows);
  }
};

template <class T>
struct Layer {
  Linear<T> qkv, out, intermediate, output;
  Norm<T> first_norm, final_norm;
  bool norm_first;

  // Numbers of memory that `finish` takes.
  int64_t finish_size(int64_t rows) const { return part_of(rows) * (2 * out.channels() + intermediate.channels()); }

  // Attended frames, row_step numbers apart, and [rows, C] of the layer's input to the layer's output.
  void finish(const T* attended, int64_t row_step, const T* x, int64_t rows, T* to, T* memory) const {
    const int64_t C = out.channels(), part = part_of(rows);
    T *sum = memory, *normed = sum + part * C, *wide = normed + part * C;
    for (int64_t r = 0; r < rows; r += part, attended += part * row_step, x += part * C, to += part * C) {
      const int64_t count = std::min(part, rows - r);
      out(attended, count, sum, x, row_step);
      (norm_first ? final_norm : first_norm)(sum, count, normed);
      intermediate(normed, count, wide);
      output(wide, count, to, norm_first ? sum : normed);
      if (!norm_first) final_norm(to, count, to);
    }
  }
};

// Whole utterances that go through the layer together.
struct Group {
  int64_t first, rows;  // of all frames
  int64_t entries;      // of the batch; packed frames are one
  int64_t first_entry;
  std::vector<int64_t> bounds;  // of packed utterances, within the group
};

std::vector<Group> dense_groups(int64_t B, int64_t frames) {
  const int64_t most = std::max<int64_t>(1, kRows / frames);
  std::vector<Group> groups;
  for (int64_t b = 0; b < B; b += most) {
    const int64_t count = std::min(most, B - b);
    groups.push_back({b * frames, count * frames, count, b, {}});
  }
  return groups;
}

// A group takes all weights from memory: none has less than half of its rows, though some have more for that.
std::vector<Group> packed_groups(const std::vector<int64_t>& bounds) {
  std::vector<Group> groups;
  for (std::size_t b = 0; b + 1 < bounds.size(); ++b) {
    const int64_t T = bounds[b + 1] - bounds[b], left = bounds.back() - bounds[b];
    if (groups.empty() || (groups.back().rows + T > kRows && std::min(groups.back().rows, left) >= kRows / 2)) {
      groups.push_back({bounds[b], 0, 1, 0, {0}});
    }
    groups.back().rows += T;
    groups.back().bounds.push_back(groups.back().rows);
  }
  return groups;
}

template <class T>
void run(const Layer<T>& layer, const Tensor& x, const Tensor& rel_bias, const std::optional<Tensor>& key_lengths,
         const std::vector<Tensor>& gate, double scale, const std::vector<int64_t>& bounds, const Tensor& out) {
  const int64_t C = x.size(2), H = gate[2].numel();
  const auto groups = bounds.empty() ? dense_groups(x.size(0), x.size(1)) : packed_groups(bounds);
  // The normed input makes room for what `finish` works in. A group with more rows may need less of that: it is cut.
  int64_t most = 0, work = 0;
  for (const Group& group : groups) {
    most = std::max(most, group.rows);
    work = std::max({work, layer.finish_size(group.rows), layer.norm_first ? group.rows * C : 0});
  }
  const int64_t size = 3 * most * C + work;
  const Memory<Scratch::call> all(size * sizeof(T), kMostKept);
  T *projected = static_cast<T*>(all.get()), *memory = projected + 3 * most * C, *to = mutable_data<T>(out);
  const T* from = data<T>(x);
  const ScalarType dtype = dtype_of(x);
  const auto all_lengths = contiguous_of(key_lengths, ScalarType::Long);
  const int64_t* length = data<int64_t>(all_lengths);
  for (const Group& group : groups) {
    const int64_t rows = group.rows, frames = rows / group.entries;
    const T* in = from + group.first * C;
    if (layer.norm_first) layer.first_norm(in, rows, memory);
    const T* normed = layer.norm_first ? memory : in;
    layer.qkv(normed, rows, projected);
    const Tensor gates = position_gate(view_of(normed, {group.entries, frames, C}, dtype), gate[0], gate[1], gate[2]);
    std::optional<Tensor> lengths;
    if (length) lengths = view_of(length + group.first_entry, {group.entries}, ScalarType::Long);
    const auto heads = [&](int64_t which) {
      return view_of(projected + which * C, {group.entries, frames, H, C / H}, {frames * 3 * C, 3 * C, C / H, 1},
                     dtype);
    };
    const Tensor q = heads(0);
    gated_attention_into(q, q, heads(1), heads(2), gates, rel_bias, lengths, 0.0, std::nullopt, scale, group.bounds);
    layer.finish(projected, 3 * C, in, rows, to + group.first * C, memory);
  }
}

template <class T>
Layer<T> layer_of(const std::vector<Tensor>& packed, const std::vector<Tensor>& biases,
                  const std::vector<Tensor>& norms, const std::vector<double>& eps, const std::string& activation,
                  bool norm_first, int64_t C) {
  const auto wide = [](const Tensor& vector) { return contiguous_of(vector, kFloat); };
  const int64_t inner = biases[2].numel();
  const auto linear = [&](int i, int64_t in, const char* name) {
    const bool pairs = sizeof(T) == sizeof(bf16) && packed_conv().pairs;
    ENTRY_CHECK(dtype_of(packed[i]) == (pairs ? kBFloat16 : kFloat) && (!pairs || multiplies_pairs(in)) &&
                    packed[i].is_contiguous() && packed[i].numel() == packed_size(biases[i].numel(), 1, in, false),
                "encoder_layer: expected weights packed by pack_conv from the dtype of x");
    return Linear<T>{packed[i], wide(biases[i]), in, activation_number(name)};
  };
  const auto norm = [&](int i) {
    return Norm<T>{wide(norms[2 * i]), wide(norms[2 * i + 1]), static_cast<float>(eps[i])};
  };
  return {linear(0, C, "none"),
          linear(1, C, "none"),
          linear(2, C, activation.c_str()),
          linear(3, inner, "none"),
          norm(0),
          norm(1),
          norm_first};
}

// [B, T, C] float32 or bfloat16; packed frames beside offsets. Packed weights and
// biases are of queries, keys and values as one layer, of the attention's output, and of the feed-forward's two layers.
Tensor encoder_layer(const Tensor& x, const Tensor& rel_bias, const std::optional<Tensor>& key_lengths,
                     const std::vector<Tensor>& packed, const std::vector<Tensor>& biases,
                     const std::vector<Tensor>& gate, const std::vector<Tensor>& norms, const std::vector<double>& eps,
                     double scale, const Text& activation, bool norm_first, const std::optional<Tensor>& offsets) {
  ENTRY_CHECK(x.dim() == 3 && packed.size() == 4 && biases.size() == 4 && gate.size() == 3 && norms.size() == 4 &&
                  eps.size() == 2,
              "encoder_layer: expected x of [B, T, C] and four packed weights, got ", x.sizes(), " and ",
              packed.size());
  const int64_t C = x.size(2), inner = biases[2].numel();
  check_positive("encoder_layer", {{"C", C}, {"the feed-forward's width", inner}, {"heads", gate[2].numel()}});
  const int64_t widths[] = {3 * C, C, inner, C};
  for (int i = 0; i < 4; ++i) check_vector("encoder_layer", "a bias", biases[i], widths[i]);
  for (const Tensor& norm : norms) check_vector("encoder_layer", "a norm's weight or bias", norm, C);
  ENTRY_CHECK(C % gate[2].numel() == 0, "encoder_layer: expected heads that divide ", C, " channels, got ",
              gate[2].numel());
  check_lengths("encoder_layer", key_lengths, x.size(0));
  const auto bounds = bounds_of("encoder_layer", offsets, x);
  ENTRY_CHECK(bounds.empty() || !key_lengths, "encoder_layer: expected key_lengths or offsets, got both");
  const Tensor in = contiguous_of(x), out = fresh_like(in);
  if (in.numel() == 0) return out;
  if (dtype_of(in) == kFloat) {
    run(layer_of<float>(packed, biases, norms, eps, activation, norm_first, C), in, rel_bias, key_lengths, gate, scale,
        bounds, out);
  } else {
    ENTRY_CHECK(dtype_of(in) == kBFloat16, "encoder_layer: expected float32 or bfloat16, got ", dtype_of(in));
    run(layer_of<bf16>(packed, biases, norms, eps, activation, norm_first, C), in, rel_bias, key_lengths, gate, scale,
        bounds, out);
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) { m.impl("encoder_layer", TORCH_BOX(&encoder_layer)); }

}  // namespace
}  // namespace wavlm_fast
