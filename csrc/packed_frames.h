// Packed frames, as wavlm_fast/ops/_packed.py has them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "check.h"

namespace wavlm_fast {

// The values of offsets [B + 1], which go by `name`, checked: they rise from 0 to `frames`.
inline std::vector<int64_t> values_of(const char* op, const char* name, const Tensor& offsets, int64_t frames) {
  ENTRY_CHECK(dtype_of(offsets) == ScalarType::Int && offsets.dim() == 1 && offsets.size(0) > 1 && offsets.is_cpu(), op,
              ": expected ", name, " of [B + 1] int32 on the CPU, got ", dtype_of(offsets), " ", offsets.sizes(),
              offsets.is_cpu() ? " on cpu" : " elsewhere");
  // Before they are copied: a view may have more numbers than there is memory.
  ENTRY_CHECK(offsets.size(0) - 1 <= frames, op, ": expected ", name, " of no more utterances than the ", frames,
              " frames, got ", offsets.size(0) - 1);
  const Tensor whole = contiguous_of(offsets);
  const auto* from = data<int32_t>(whole);
  const std::vector<int64_t> values(from, from + whole.size(0));
  const bool rise = std::adjacent_find(values.begin(), values.end(), std::greater_equal<>()) == values.end();
  ENTRY_CHECK(rise && values.front() == 0 && values.back() == frames, op, ": expected ", name,
              " that rise from 0 to the ", frames, " frames, got ", Sizes(values));
  return values;
}

// Those of the offsets of packed frames `x` [1, N, ...]: utterance b is bounds[b] to bounds[b + 1]. None of a dense
// batch.
inline std::vector<int64_t> bounds_of(const char* op, const std::optional<Tensor>& offsets, const Tensor& x) {
  if (!offsets) return {};
  ENTRY_CHECK(x.dim() > 1 && x.size(0) == 1, op, ": expected packed frames, [1, N, ...], beside offsets, got ",
              x.sizes());
  return values_of(op, "offsets", *offsets, x.size(1));
}

}  // namespace wavlm_fast
