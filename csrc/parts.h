// Sums over rows whose order does not depend on the number of threads: rows are cut into parts, each part is summed by
// one thread, and the parts are added up in their order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace wavlm_fast {

// How many parts for so many elements: enough for the threads of any machine, few enough to be added up in no time.
inline int64_t parts_for(int64_t elements) {
  constexpr int64_t kGrain = 16384, kMost = 64;
  return std::clamp<int64_t>(elements / kGrain, 1, kMost);
}

// [parts, size] -> [size], in the type that it is summed in.
template <class Sum, class T>
std::vector<Sum> total_of(const std::vector<T>& parts, int64_t size) {
  std::vector<Sum> total(size);
  for (auto from = parts.begin(); from < parts.end(); from += size) {
    for (int64_t i = 0; i < size; ++i) total[i] += from[i];
  }
  return total;
}

}  // namespace wavlm_fast
