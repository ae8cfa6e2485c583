// The convolutional front end, in pieces along time: every layer takes what the one before has just written while that
// is still in the last cache. The output of the first layer, the largest of the model, exists for one block of frames
// per thread only. The first layer's group norm is no obstacle: its statistics come from the waveform.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "check.h"
#include "integers.h"
#include "norm_act_entry.h"
#include "packed_conv_entry.h"
#include "scratch.h"
#include "waveform_conv_entry.h"

namespace wavlm_fast {
namespace {

using at::Tensor;

// Frames of the last layer in a piece: of the second layer, 64 times as many numbers per frame.
constexpr int64_t kPiece = 64;
// Tasks per thread, so that threads end together.
constexpr int64_t kTasksPerThread = 6;

// Layer norm and activation after a convolution, where the convolution cannot have them.
template <class T>
struct Norm {
  NormAct<T>* kernel;  // null: none
  Tensor weight, bias;
  float eps;
  int activation;

  void operator()(T* frames, int64_t count, int64_t C) const {
    if (!kernel) return;
    const auto data = [](const Tensor& v) { return v.defined() ? v.const_data_ptr<float>() : nullptr; };
    kernel(frames, data(weight), data(bias), eps, count, C, activation, frames);
  }
};

template <class T>
struct Layer {
  PackedConv<T, T> conv;  // x and out are set piece by piece
  int64_t stride;
  bool filtered;
  Norm<T> norm;
  Tensor bias;         // what conv.bias points to
  int64_t done = 0;    // output frames of this utterance so far
  T* frames = nullptr;     // those that the next layer still needs, and then new ones
  int64_t first = 0;       // which frame is at `frames`

  T* next() const { return frames + (done - first) * conv.channels; }

  // Input frames that `count` output frames need.
  int64_t needs(int64_t count) const { return (count - 1) * stride + conv.taps; }
};

// Frames of the first layer for one block of the second, on this thread.
template <class T>
void first_frames(const PackedConv<float, T>& conv, const Norm<T>& norm, int64_t first, int64_t count, T* out,
                  float* memory) {
  const auto& kernels = packed_conv();
  auto call = conv;
  call.x += first * conv.row_step;
  call.out = out;
  for (int64_t t = 0; t < count; t += kernels.most_frames) {
    const int64_t groups = divided_up(conv.channels, kernels.columns);
    variants<float, T>().direct(call, t, std::min(kernels.most_frames, count - t), 0, groups, memory);
  }
  norm(out, count, conv.channels);
}

// Frames `begin` to `end` of the second layer, on all threads.
template <class T>
void first_two(const PackedConv<float, T>& conv, const Norm<T>& norm, const Layer<T>& second, int64_t begin,
               int64_t end, T* out) {
  const auto& kernels = packed_conv();
  const int64_t most = second.filtered ? kernels.most_filtered : kernels.most_frames;
  const int64_t tile = second.filtered ? 3 * kernels.rows : kernels.rows, total = end - begin;
  const int64_t even = divided_up(total, kTasksPerThread * at::get_num_threads());
  const int64_t block = std::min(most, divided_up(even, tile) * tile), tasks = divided_up(total, block);
  const size_t frames_size = divided_up(second.needs(std::min(block, total)) * conv.channels * sizeof(T), 64) * 64;
  const size_t size = sizeof(float) * std::max(kernels.scratch_size(conv.C, false),
                                               kernels.scratch_size(conv.channels, second.filtered));
  const auto forward = second.filtered ? variants<T, T>().filtered : variants<T, T>().direct;
  const int64_t groups = divided_up(second.conv.channels, kernels.columns);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    char* memory = static_cast<char*>(scratch<Scratch::task>(frames_size + size));
    T* frames = reinterpret_cast<T*>(memory);
    float* rest = reinterpret_cast<float*>(memory + frames_size);
    for (int64_t task = next++; task < tasks; task = next++) {
      const int64_t first = begin + task * block, count = std::min(block, end - first);
      first_frames(conv, norm, first * second.stride, second.needs(count), frames, rest);
      auto call = second.conv;
      call.x = frames;
      call.out = out + (first - begin) * call.channels;
      forward(call, 0, count, 0, groups, rest);
      second.norm(call.out, count, call.channels);
    }
  });
}

template <class T>
void normalise(const Norm<T>& norm, T* frames, int64_t count, int64_t C) {
  if (!norm.kernel) return;
  at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) { norm(frames + begin * C, end - begin, C); });
}

// Continues a layer up to frame `end`; afterwards the layer before keeps what the next piece needs of it.
template <class T>
void advance(Layer<T>& layer, Layer<T>& before, int64_t end) {
  const int64_t C = layer.conv.C, count = end - layer.done;
  auto call = layer.conv;
  call.x = before.frames + (layer.done * layer.stride - before.first) * C;
  call.out = layer.next();
  convolve(call, layer.filtered, count, 1, 0, 0);
  normalise(layer.norm, call.out, count, call.channels);
  layer.done = end;
  const int64_t kept = end * layer.stride, offset = kept - before.first;
  std::memmove(before.frames, before.frames + offset * C, (before.done - kept) * C * sizeof(T));
  before.first = kept;
}

// Places for the frames of every layer but the first, whose are never kept, and the last, whose are the output.
template <class T>
void allot(std::vector<Layer<T>>& layers, int64_t frames) {
  std::vector<int64_t> sizes(layers.size());
  int64_t count = std::min(kPiece, frames), total = 0;
  for (size_t l = layers.size() - 1; l-- > 1;) {
    count = layers[l + 1].needs(count);
    sizes[l] = divided_up(count * layers[l].conv.channels, 64) * 64;
    total += sizes[l];
  }
  T* at = static_cast<T*>(scratch<Scratch::call>(total * sizeof(T)));
  for (size_t l = 1; l + 1 < layers.size(); at += sizes[l], ++l) layers[l].frames = at;
}

template <class T>
void encode(const PackedConv<float, T>& conv, std::vector<Layer<T>>& layers, int64_t frames, T* out) {
  for (auto& layer : layers) layer.done = layer.first = 0;
  layers.back().frames = out;
  std::vector<int64_t> ends(layers.size());
  for (int64_t end = std::min(kPiece, frames);; end = std::min(end + kPiece, frames)) {
    ends.back() = end;
    for (size_t l = layers.size() - 1; l-- > 1;) ends[l] = layers[l + 1].needs(ends[l + 1]);
    first_two(conv, layers[0].norm, layers[1], layers[1].done, ends[1], layers[1].next());
    layers[1].done = ends[1];
    for (size_t l = 2; l < layers.size(); ++l) advance(layers[l], layers[l - 1], ends[l]);
    if (end == frames) return;
  }
}

struct Arguments {
  const Tensor& waveform;
  const Tensor& weight;
  const std::vector<Tensor>& packed;
  const c10::List<std::optional<Tensor>>& biases;
  const c10::List<std::optional<Tensor>>& norm_weights;
  const c10::List<std::optional<Tensor>>& norm_biases;
  at::IntArrayRef taps, strides, channels;
  const c10::List<bool>& filtered;
  std::string norm;
  double eps;
  std::string activation;
};

Tensor vector_of(const std::optional<Tensor>& vector) {
  return vector ? vector->to(at::kFloat).contiguous() : Tensor();
}

template <class T>
std::vector<Layer<T>> layers_of(const Arguments& a) {
  std::vector<Layer<T>> layers(a.packed.size());
  const int activation = activation_number(a.activation);
  constexpr bool kPairs = sizeof(T) == sizeof(bf16);
  for (size_t l = 0; l < layers.size(); ++l) {
    check_positive("feature_encoder", {{"taps", a.taps[l]}, {"strides", a.strides[l]}, {"channels", a.channels[l]}});
    check_vector("feature_encoder", "biases", a.biases.get(l), a.channels[l]);
    check_vector("feature_encoder", "norm_weights", a.norm_weights.get(l), a.channels[l]);
    check_vector("feature_encoder", "norm_biases", a.norm_biases.get(l), a.channels[l]);
    Layer<T>& layer = layers[l];
    layer.stride = a.strides[l];
    layer.filtered = a.filtered.get(l);
    layer.norm = {a.norm == "layer" ? norm_act_kernel<T>() : nullptr, vector_of(a.norm_weights.get(l)),
                  vector_of(a.norm_biases.get(l)), static_cast<float>(a.eps), activation};
    layer.conv.taps = a.taps[l], layer.conv.channels = a.channels[l];
    if (l == 0) continue;  // what is special about it, FirstConv knows
    const int64_t C = a.channels[l - 1];
    // None of these numbers can be greater than what the weight has, and their product cannot overflow.
    TORCH_CHECK(a.packed[l].is_contiguous() && a.packed[l].scalar_type() == (kPairs ? at::kBFloat16 : at::kFloat) &&
                    (!kPairs || multiplies_pairs(C)) && a.channels[l] <= a.packed[l].numel() &&
                    a.taps[l] <= a.packed[l].numel() &&
                    a.packed[l].numel() == packed_size(a.channels[l], a.taps[l], C, layer.filtered),
                "feature_encoder: expected weights packed by pack_conv, in one dtype");
    TORCH_CHECK(!layer.filtered || (a.taps[l] == 3 && a.strides[l] == 2),
                "feature_encoder: expected three taps at a stride of two to filter, got ", a.taps[l], " at ",
                a.strides[l]);
    TORCH_CHECK(a.taps[l] >= a.strides[l], "feature_encoder: expected at least as many taps as the stride, got ",
                a.taps[l], " and ", a.strides[l]);
    layer.bias = vector_of(a.biases.get(l));
    layer.conv.packed = a.packed[l].const_data_ptr();
    layer.conv.bias = layer.bias.defined() ? layer.bias.template const_data_ptr<float>() : nullptr;
    layer.conv.C = C, layer.conv.row_step = layer.stride * C, layer.conv.tap_step = C;
    layer.conv.activation = layer.norm.kernel ? activation_number("none") : activation;
  }
  return layers;
}

template <class T>
Tensor run(const Arguments& a) {
  auto layers = layers_of<T>(a);
  FirstConv first(a.weight, a.packed[0], a.biases.get(0), a.strides[0], a.norm == "group", a.norm_weights.get(0),
                  a.norm_biases.get(0), a.eps, a.norm == "layer" ? "none" : a.activation);
  TORCH_CHECK(a.channels[0] == first.channels() && a.taps[0] == a.weight.size(2),
              "feature_encoder: expected a first weight of [", a.channels[0], ", 1, ", a.taps[0], "], got ",
              a.weight.sizes());
  const Tensor x = a.waveform.contiguous();
  const int64_t B = x.size(0), S = x.size(1);
  int64_t frames = S;
  for (const auto& layer : layers) {
    TORCH_CHECK(frames >= layer.conv.taps, "feature_encoder: the waveform is too short, it has ", S, " samples");
    frames = (frames - layer.conv.taps) / layer.stride + 1;
  }
  const auto dtype = sizeof(T) == sizeof(bf16) ? at::kBFloat16 : at::kFloat;
  const Tensor out = at::empty({B, frames, a.channels.back()}, x.options().dtype(dtype));
  allot(layers, frames);
  for (int64_t b = 0; b < B; ++b) {
    const auto conv = first.on<T>(x.const_data_ptr<float>() + b * S, S);
    encode(conv, layers, frames, static_cast<T*>(out.mutable_data_ptr()) + b * out.stride(0));
  }
  return out;
}

// [B, S] float32 -> [B, T, C] in the dtype of the packed weights after the first. Everything is per layer; the first
// weight comes as it is, [C, 1, K] float32, too.
Tensor feature_encoder(const Tensor& waveform, const Tensor& weight, std::vector<Tensor> packed,
                       const c10::List<std::optional<Tensor>>& biases,
                       const c10::List<std::optional<Tensor>>& norm_weights,
                       const c10::List<std::optional<Tensor>>& norm_biases, at::IntArrayRef taps,
                       at::IntArrayRef strides, at::IntArrayRef channels, const c10::List<bool>& filtered,
                       std::string norm, double eps, std::string activation) {
  const size_t L = packed.size();
  TORCH_CHECK(L >= 2 && biases.size() == L && norm_weights.size() == L && norm_biases.size() == L &&
                  taps.size() == L && strides.size() == L && channels.size() == L && filtered.size() == L,
              "feature_encoder: expected everything once per layer, and two layers or more, got ", L, " weights");
  TORCH_CHECK(waveform.dim() == 2 && waveform.scalar_type() == at::kFloat,
              "feature_encoder: expected a float32 waveform of [B, S], got ", waveform.scalar_type(), " ",
              waveform.sizes());
  TORCH_CHECK(norm == "group" || norm == "layer" || norm == "none",
              "feature_encoder: expected a norm of group, layer or none, got ", norm);
  const Arguments arguments = {waveform, weight,  packed,   biases, norm_weights, norm_biases, taps,
                               strides,  channels, filtered, norm, eps, activation};
  return packed[1].scalar_type() == at::kBFloat16 ? run<bf16>(arguments) : run<float>(arguments);
}

TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) { m.impl("feature_encoder", &feature_encoder); }

}  // namespace
}  // namespace wavlm_fast
