// The convolutional front end, in pieces along time: every layer takes what the one before has just written while that
// is still in the last cache. The output of the first layer, the largest of the model, exists for one block of frames
// per thread only. The first layer's group norm is no obstacle: its statistics come from the waveform.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "check.h"
#include "integers.h"
#include "library.h"
#include "norm_act_entry.h"
#include "packed_conv_entry.h"
#include "parallel.h"
#include "resized_frames.h"
#include "scratch.h"
#include "waveform_conv_entry.h"

namespace wavlm_fast {
namespace {

// Frames of the last layer in a piece: of the second layer, 64 times as many numbers per frame. What is filtered together
// begins with a piece, whatever the number of threads.
constexpr int64_t kPiece = 64;

// Pieces that go through the layers together. Threads wait for each other after each layer, and the more there are, the
// less each has to do till then; with them grows the last cache.
int64_t pieces() {
  constexpr int64_t kThreads = 4, kMost = 4;
  return std::clamp<int64_t>(num_threads() / kThreads, 1, kMost);
}

// Tasks per thread, so that threads end together.
constexpr int64_t kTasksPerThread = 6;

// Layer norm and activation after a convolution, where the convolution cannot have them.
template <class T>
struct Norm {
  NormAct<T>* kernel;  // null: none
  std::optional<Tensor> weight, bias;
  float eps;
  int activation;

  void operator()(T* frames, int64_t count, int64_t C) const {
    if (kernel) kernel(frames, data<float>(weight), data<float>(bias), eps, count, C, activation, frames);
  }
};

template <class T>
struct Layer {
  PackedConv<T, T> conv;  // x and out are set piece by piece
  int64_t stride;
  bool filtered;
  Norm<T> norm;
  std::optional<Tensor> bias;  // what conv.bias points to

  // Input frames that `count` output frames need.
  int64_t needs(int64_t count) const { return (count - 1) * stride + conv.taps; }
};

// An utterance's frames of one layer.
template <class T>
struct Kept {
  T* frames = nullptr;        // those that the next layer still needs, and then new ones
  int64_t first = 0;          // which frame is at `frames`
  int64_t done = 0;           // how many there have been
  std::vector<int64_t> ends;  // and will have been after each of the next pieces

  int64_t end() const { return ends.back(); }

  T* at(int64_t frame, int64_t C) const { return frames + (frame - first) * C; }
};

template <class T>
struct Utterance {
  PackedConv<float, T> conv;  // the first layer
  int64_t frames;             // of the last layer
  std::vector<Kept<T>> kept;  // of every layer; nothing of the first
};

// How far every layer goes in the next pieces; whether they are the last.
template <class T>
bool plan(const std::vector<Layer<T>>& layers, Utterance<T>& utterance) {
  auto& kept = utterance.kept;
  for (auto& layer : kept) layer.ends.clear();
  int64_t done = kept.back().done;
  do {
    done = std::min(done + kPiece, utterance.frames);
    int64_t end = done;
    for (size_t l = layers.size(); l-- > 1; end = layers[l].needs(end)) kept[l].ends.push_back(end);
  } while (done < utterance.frames && static_cast<int64_t>(kept.back().ends.size()) < pieces());
  return done == utterance.frames;
}

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

// The second layer, on all threads.
template <class T>
void first_two(const std::vector<Layer<T>>& layers, std::vector<Utterance<T>>& group) {
  const auto& kernels = packed_conv();
  const Layer<T>& second = layers[1];
  int64_t total = 0;
  for (const auto& u : group) total += u.kept[1].end() - u.kept[1].done;
  const int64_t most = second.filtered ? kernels.most_filtered : kernels.most_frames;
  const int64_t tile = second.filtered ? 3 * kernels.rows : kernels.rows, C = second.conv.C;
  const int64_t even = divided_up(total, kTasksPerThread * num_threads());
  const int64_t block = std::min(most, divided_up(even, tile) * tile);
  struct Task {
    const Utterance<T>* utterance;
    int64_t first, count;
  };
  std::vector<Task> tasks;
  for (auto& u : group) {
    Kept<T>& kept = u.kept[1];
    for (const int64_t end : kept.ends) {
      for (; kept.done < end; kept.done += tasks.back().count) {
        tasks.push_back({&u, kept.done, std::min(block, end - kept.done)});
      }
    }
  }
  // Floats: of the first layer's frames in whole cache lines, and of what the kernels work in.
  const size_t frames_size = divided_up(second.needs(std::min(block, total)) * C * sizeof(T), 64) * 64 / sizeof(float);
  const size_t size = std::max(kernels.scratch_size(group[0].conv.C, false), kernels.scratch_size(C, second.filtered));
  const auto forward = second.filtered ? variants<T, T>().filtered : variants<T, T>().direct;
  const int64_t count = tasks.size(), groups = divided_up(second.conv.channels, kernels.columns);
  for_each_task(count, frames_size + size, [&](int64_t i, float* memory) {
    const Task& task = tasks[i];
    T* frames = reinterpret_cast<T*>(memory);
    float* rest = memory + frames_size;
    first_frames(task.utterance->conv, layers[0].norm, task.first * second.stride, second.needs(task.count), frames,
                 rest);
    auto call = second.conv;
    call.x = frames;
    call.out = task.utterance->kept[1].at(task.first, call.channels);
    forward(call, 0, task.count, 0, groups, rest);
    second.norm(call.out, task.count, call.channels);
  });
}

template <class T>
void normalise(const Norm<T>& norm, const std::vector<ConvPiece<T, T>>& pieces) {
  if (!norm.kernel) return;
  constexpr int64_t kBlock = 16;
  std::vector<std::pair<T*, int64_t>> blocks;
  const int64_t C = pieces[0].call.channels;
  for (const auto& [call, count] : pieces) {
    for (int64_t t = 0; t < count; t += kBlock) blocks.emplace_back(call.out + t * C, std::min(kBlock, count - t));
  }
  parallel_for(0, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) norm(blocks[i].first, blocks[i].second, C);
  });
}

// Continues a layer; afterwards the layer before keeps what the next piece needs of it.
template <class T>
void advance(const std::vector<Layer<T>>& layers, size_t l, std::vector<Utterance<T>>& group) {
  const Layer<T>& layer = layers[l];
  const int64_t C = layer.conv.C;
  std::vector<ConvPiece<T, T>> pieces;
  for (auto& u : group) {
    Kept<T>& kept = u.kept[l];
    for (const int64_t end : kept.ends) {
      auto call = layer.conv;
      call.x = u.kept[l - 1].at(kept.done * layer.stride, C);
      call.out = kept.at(kept.done, call.channels);
      pieces.push_back({call, end - kept.done});
      kept.done = end;
    }
  }
  convolve(pieces, layer.filtered);
  normalise(layer.norm, pieces);
  for (auto& u : group) {
    Kept<T>&kept = u.kept[l], &before = u.kept[l - 1];
    const int64_t needed = kept.done * layer.stride;
    std::memmove(before.frames, before.at(needed, C), (before.done - needed) * C * sizeof(T));
    before.first = needed;
  }
}

// Places for the frames of every layer but the first, whose are never kept, and the last, whose are the output; in
// memory that lives as long as what is returned.
template <class T>
Memory allot(const std::vector<Layer<T>>& layers, std::vector<Utterance<T>>& group) {
  std::vector<std::pair<T**, int64_t>> places;
  int64_t total = 0;
  for (auto& u : group) {
    plan(layers, u);
    for (size_t l = 1; l + 1 < layers.size(); ++l) {
      places.emplace_back(&u.kept[l].frames, total);
      total += divided_up(u.kept[l].end() * layers[l].conv.channels, 64) * 64;
    }
  }
  Memory memory(Scratch::call, total * sizeof(T));
  for (const auto& [frames, at] : places) *frames = memory.as<T>() + at;
  return memory;
}

// One utterance piece by piece, or several that are no longer than a piece.
template <class T>
void encode(const std::vector<Layer<T>>& layers, std::vector<Utterance<T>>& group) {
  const Memory kept = allot(layers, group);
  for (bool last = false; !last;) {
    for (auto& u : group) last = plan(layers, u);
    first_two(layers, group);
    for (size_t l = 2; l < layers.size(); ++l) advance(layers, l, group);
  }
}

struct Arguments {
  const Tensor& waveform;
  const Tensor& weight;
  const std::vector<Tensor>& packed;
  const std::vector<std::optional<Tensor>>&biases, &norm_weights, &norm_biases;
  const std::vector<int64_t>&taps, &strides, &channels;
  const std::vector<bool>& filtered;
  const std::string& norm;
  double eps;
  const std::string& activation;
  const std::optional<Tensor>&offsets, &out_offsets;
  std::optional<int64_t> out_frames;
};

template <class T>
std::vector<Layer<T>> layers_of(const Arguments& a) {
  std::vector<Layer<T>> layers(a.packed.size());
  const int activation = activation_number(a.activation);
  constexpr bool kPairs = sizeof(T) == sizeof(bf16);
  for (size_t l = 0; l < layers.size(); ++l) {
    check_positive("feature_encoder", {{"taps", a.taps[l]}, {"strides", a.strides[l]}, {"channels", a.channels[l]}});
    check_vector("feature_encoder", "biases", a.biases[l], a.channels[l]);
    check_vector("feature_encoder", "norm_weights", a.norm_weights[l], a.channels[l]);
    check_vector("feature_encoder", "norm_biases", a.norm_biases[l], a.channels[l]);
    Layer<T>& layer = layers[l];
    layer.stride = a.strides[l];
    layer.filtered = a.filtered[l];
    layer.norm = {a.norm == "layer" ? norm_act_kernel<T>() : nullptr, contiguous_of(a.norm_weights[l], kFloat),
                  contiguous_of(a.norm_biases[l], kFloat), static_cast<float>(a.eps), activation};
    layer.conv.taps = a.taps[l], layer.conv.channels = a.channels[l];
    if (l == 0) continue;  // what is special about it, FirstConv knows
    const int64_t C = a.channels[l - 1];
    // None of these numbers can be greater than what the weight has, and their product cannot overflow.
    ENTRY_CHECK(a.packed[l].is_contiguous() && dtype_of(a.packed[l]) == (kPairs ? kBFloat16 : kFloat) &&
                    (!kPairs || multiplies_pairs(C)) && a.channels[l] <= a.packed[l].numel() &&
                    a.taps[l] <= a.packed[l].numel() &&
                    a.packed[l].numel() == packed_size(a.channels[l], a.taps[l], C, layer.filtered),
                "feature_encoder: expected weights packed by pack_conv, in one dtype");
    ENTRY_CHECK(!layer.filtered || (a.taps[l] == 3 && a.strides[l] == 2),
                "feature_encoder: expected three taps at a stride of two to filter, got ", a.taps[l], " at ",
                a.strides[l]);
    ENTRY_CHECK(a.taps[l] >= a.strides[l], "feature_encoder: expected at least as many taps as the stride, got ",
                a.taps[l], " and ", a.strides[l]);
    layer.bias = contiguous_of(a.biases[l], kFloat);
    layer.conv.packed = data<void>(a.packed[l]);
    layer.conv.bias = data<float>(layer.bias);
    layer.conv.C = C, layer.conv.row_step = layer.stride * C, layer.conv.tap_step = C;
    layer.conv.activation = layer.norm.kernel ? activation_number("none") : activation;
  }
  return layers;
}

template <class T>
Tensor run(const Arguments& a) {
  auto layers = layers_of<T>(a);
  FirstConv first(a.weight, a.packed[0], a.biases[0], a.strides[0], a.norm == "group", a.norm_weights[0],
                  a.norm_biases[0], a.eps, a.norm == "layer" ? "none" : a.activation);
  ENTRY_CHECK(a.channels[0] == first.channels() && a.taps[0] == a.weight.size(2),
              "feature_encoder: expected a first weight of [", a.channels[0], ", 1, ", a.taps[0], "], got ",
              a.weight.sizes());
  const auto frames_of = [&](int64_t frames) {
    for (const auto& layer : layers) {
      if (frames < layer.conv.taps) return int64_t{0};
      frames = (frames - layer.conv.taps) / layer.stride + 1;
    }
    return frames;
  };
  const Tensor x = contiguous_of(a.waveform);
  const auto utterances =
      resized_frames("feature_encoder", x.size(0), x.size(1), a.offsets, a.out_offsets, a.out_frames, frames_of);
  const auto dtype = sizeof(T) == sizeof(bf16) ? kBFloat16 : kFloat;
  const Tensor out = fresh(x, {x.size(0), utterances.row_frames(), a.channels.back()}, dtype);
  first.listen(data<float>(x), utterances);
  T* to = mutable_data<T>(out);
  std::vector<Utterance<T>> group;
  int64_t together = 0;
  for (int64_t b = 0; b < utterances.count(); ++b) {
    const int64_t frames = utterances.out_frames(b);
    if (!group.empty() && together + frames > kPiece * pieces()) {
      encode(layers, group);
      group.clear();
      together = 0;
    }
    group.push_back({first.on<T>(b), frames, std::vector<Kept<T>>(layers.size())});
    group.back().kept.back().frames = to + utterances.out(b) * a.channels.back();
    together += frames;
  }
  if (!group.empty()) encode(layers, group);
  return out;
}

// [B, S] float32 -> [B, T, C] in the dtype of the packed weights after the first; or packed samples beside their
// offsets. Everything is per layer; the first weight comes as it is, [C, 1, K] float32, too.
Tensor feature_encoder(const Tensor& waveform, const Tensor& weight, const std::vector<Tensor>& packed,
                       const std::vector<std::optional<Tensor>>& biases,
                       const std::vector<std::optional<Tensor>>& norm_weights,
                       const std::vector<std::optional<Tensor>>& norm_biases, const std::vector<int64_t>& taps,
                       const std::vector<int64_t>& strides, const std::vector<int64_t>& channels,
                       const std::vector<bool>& filtered, const Text& norm, double eps, const Text& activation,
                       const std::optional<Tensor>& offsets, const std::optional<Tensor>& out_offsets,
                       std::optional<int64_t> out_frames) {
  const size_t L = packed.size();
  ENTRY_CHECK(L >= 2 && biases.size() == L && norm_weights.size() == L && norm_biases.size() == L && taps.size() == L &&
                  strides.size() == L && channels.size() == L && filtered.size() == L,
              "feature_encoder: expected everything once per layer, and two layers or more, got ", L, " weights");
  ENTRY_CHECK(waveform.dim() == 2 && dtype_of(waveform) == kFloat,
              "feature_encoder: expected a float32 waveform of [B, S], got ", dtype_of(waveform), " ",
              waveform.sizes());
  ENTRY_CHECK(norm == "group" || norm == "layer" || norm == "none",
              "feature_encoder: expected a norm of group, layer or none, got ", norm);
  const Arguments arguments = {waveform, weight,   packed, biases, norm_weights, norm_biases, taps,        strides,
                               channels, filtered, norm,   eps,    activation,   offsets,     out_offsets, out_frames};
  return dtype_of(packed[1]) == kBFloat16 ? run<bf16>(arguments) : run<float>(arguments);
}

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) { m.impl("feature_encoder", TORCH_BOX(&feature_encoder)); }

}  // namespace
}  // namespace wavlm_fast
