#include "packed_conv.h"

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <string>

#include "dispatch.h"
#include "packed_conv_entry.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(PackedConvKernels, packed_conv_kernels)

namespace {

using at::Tensor;

// Tasks per thread, so that threads end together.
constexpr int64_t kTasksPerThread = 6;
constexpr int64_t kAlignment = 64;

struct Tasks {
  int64_t frames, per_utterance, groups, group_step, total;
};

// Tasks are utterance x block of frames x range of column groups, many enough for all threads.
Tasks split(int64_t B, int64_t T, int64_t channels, const PackedConvKernels& kernels) {
  Tasks tasks;
  const int64_t blocks = (T + kernels.most_frames - 1) / kernels.most_frames;
  const int64_t frames = (T + blocks - 1) / blocks;
  tasks.frames = std::min(kernels.most_frames, (frames + kernels.rows - 1) / kernels.rows * kernels.rows);
  tasks.per_utterance = (T + tasks.frames - 1) / tasks.frames;
  tasks.groups = (channels + kernels.columns - 1) / kernels.columns;
  const int64_t wanted = kTasksPerThread * at::get_num_threads(), row_tasks = B * tasks.per_utterance;
  const int64_t ranges = std::clamp<int64_t>((wanted + row_tasks - 1) / row_tasks, 1, tasks.groups);
  tasks.group_step = (tasks.groups + ranges - 1) / ranges;
  tasks.total = row_tasks * ((tasks.groups + tasks.group_step - 1) / tasks.group_step);
  return tasks;
}

}  // namespace

int activation_number(const std::string& name) {
  const char* names[] = {"none", "relu", "gelu", "gelu_tanh"};
  for (int i = 0; i < 4; ++i) {
    if (name == names[i]) return i;
  }
  TORCH_CHECK(false, "unknown activation ", name);
}

// [channels, taps, C] -> the order that the kernel of this process reads, one-dimensional.
Tensor pack_conv(const Tensor& weight) {
  TORCH_CHECK(weight.dim() == 3 && weight.scalar_type() == at::kFloat,
              "pack_conv: expected a float32 weight of [channels, taps, C], got ", weight.scalar_type(), " ",
              weight.sizes());
  const auto& kernels = packed_conv_kernels();
  const int64_t channels = weight.size(0), terms = weight.size(1) * weight.size(2);
  const int64_t padded = (channels + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
  const Tensor rows = at::constant_pad_nd(weight.reshape({channels, terms}), {0, 0, 0, padded - channels});
  const Tensor packed = at::empty({padded * terms}, weight.options());
  for (int64_t column = 0; column < padded; column += kernels.columns) {
    const int64_t width = std::min(kernels.columns, padded - column);
    packed.narrow(0, column * terms, width * terms).view({terms, width}).copy_(rows.narrow(0, column, width).t());
  }
  return packed;
}

void convolve(const PackedConv& first_call, int64_t B, int64_t utterance_step) {
  const auto& kernels = packed_conv_kernels();
  const Tasks tasks = split(B, first_call.T, first_call.channels, kernels);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks.total, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    const int64_t size = kernels.scratch_size * sizeof(float);
    const Tensor memory = at::empty({size + kAlignment}, at::kByte);
    const auto at = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
    float* scratch = reinterpret_cast<float*>((at + kAlignment - 1) / kAlignment * kAlignment);
    const int64_t row_tasks = B * tasks.per_utterance;
    for (int64_t task = next++; task < tasks.total; task = next++) {
      // Blocks of frames change fastest: threads then share a range of weights in the last cache.
      const int64_t b = task % row_tasks / tasks.per_utterance, frame = task % tasks.per_utterance * tasks.frames;
      const int64_t group = task / row_tasks * tasks.group_step;
      PackedConv call = first_call;
      call.x += b * utterance_step;
      call.out += b * call.T * call.channels;
      kernels.forward(call, frame, std::min(tasks.frames, call.T - frame), group,
                      std::min(group + tasks.group_step, tasks.groups), scratch);
    }
  });
}

namespace {

// [B, T, C] -> [B, T', channels] with a weight from pack_conv.
Tensor packed_conv(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t channels,
                   int64_t taps, int64_t stride, int64_t dilation, const std::string& activation) {
  TORCH_CHECK(x.dim() == 3 && x.scalar_type() == at::kFloat && packed.scalar_type() == at::kFloat,
              "packed_conv: expected float32 x of [B, T, C], got ", x.scalar_type(), " ", x.sizes());
  const auto& kernels = packed_conv_kernels();
  const int64_t C = x.size(2), span = (taps - 1) * dilation + 1;
  const int64_t padded = (channels + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
  TORCH_CHECK(packed.is_contiguous() && packed.numel() == padded * taps * C && x.size(1) >= span,
              "packed_conv: expected a weight packed for ", taps, " taps of ", C, " channels, and at least ", span,
              " frames, got ", packed.numel(), " numbers and ", x.size(1), " frames");
  TORCH_CHECK(!bias || (bias->numel() == channels && bias->scalar_type() == at::kFloat),
              "packed_conv: expected a float32 bias of [", channels, "]");
  const Tensor x_ = x.contiguous(), bias_ = bias ? bias->contiguous() : Tensor();
  const int64_t T = (x.size(1) - span) / stride + 1;
  const Tensor out = at::empty({x.size(0), T, channels}, x.options());
  if (out.numel() == 0) return out;
  PackedConv call{};
  call.x = x_.const_data_ptr<float>();
  call.packed = packed.const_data_ptr<float>();
  call.bias = bias ? bias_.const_data_ptr<float>() : nullptr;
  call.out = out.mutable_data_ptr<float>();
  call.T = T, call.C = C, call.taps = taps, call.channels = channels;
  call.row_step = stride * C, call.tap_step = dilation * C;
  call.activation = activation_number(activation);
  convolve(call, x.size(0), x.size(1) * C);
  return out;
}

TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) {
  m.impl("pack_conv", &pack_conv);
  m.impl("packed_conv", &packed_conv);
}

}  // namespace
}  // namespace wavlm_fast
