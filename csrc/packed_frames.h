// Packed frames, as wavlm_fast/ops/_packed.py has them.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

namespace wavlm_fast {

// The values of the offsets of packed frames `x` [1, N, ...], checked: utterance b is bounds[b] to bounds[b + 1]. None
// of a dense batch.
inline std::vector<int64_t> bounds_of(const char* op, const std::optional<at::Tensor>& offsets, const at::Tensor& x) {
  if (!offsets) return {};
  TORCH_CHECK(x.dim() > 1 && x.size(0) == 1, op, ": expected packed frames, [1, N, ...], beside offsets, got ",
              x.sizes());
  TORCH_CHECK(offsets->scalar_type() == at::kInt && offsets->dim() == 1 && offsets->size(0) > 1 && offsets->is_cpu(),
              op, ": expected offsets of [B + 1] int32 on the CPU, got ", offsets->scalar_type(), " ",
              offsets->sizes(), " on ", offsets->device());
  const int64_t frames = x.size(1), utterances = offsets->size(0) - 1;
  // Before they are copied: a view may have more numbers than there is memory.
  TORCH_CHECK(utterances <= frames, op, ": expected offsets of no more utterances than the ", frames,
              " frames, got ", utterances);
  const at::Tensor values = offsets->contiguous();
  const auto* from = values.const_data_ptr<int32_t>();
  const std::vector<int64_t> bounds(from, from + utterances + 1);
  const bool rise = std::adjacent_find(bounds.begin(), bounds.end(), std::greater_equal<>()) == bounds.end();
  TORCH_CHECK(rise && bounds.front() == 0 && bounds.back() == frames, op, ": expected offsets that rise from 0 to the ",
              frames, " frames, got ", at::IntArrayRef(bounds));
  return bounds;
}

}  // namespace wavlm_fast
