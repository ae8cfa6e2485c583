// Sums over rows whose order does not depend on the number of threads: rows are cut into parts, each part is summed by
// one thread, and the parts are added up in their order.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace wavlm_fast {

// How many parts for so many elements: enough for the threads of any machine, few enough to be added up in no time.
inline int64_t parts_for(int64_t elements) {
  constexpr int64_t kGrain = 16384, kMost = 64;
  return std::clamp<int64_t>(elements / kGrain, 1, kMost);
}

// [parts, ...] float32, contiguous -> [...].
inline at::Tensor total_of(const at::Tensor& parts) {
  const at::Tensor total = at::zeros(parts.sizes().slice(1), parts.options());
  const int64_t count = parts.size(0), size = total.numel();
  const float* from = parts.const_data_ptr<float>();
  float* to = total.mutable_data_ptr<float>();
  for (int64_t part = 0; part < count; ++part, from += size) {
    for (int64_t i = 0; i < size; ++i) to[i] += from[i];
  }
  return total;
}

}  // namespace wavlm_fast
