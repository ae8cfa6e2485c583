// What entries ask of their arguments before raw pointers and sizes go to a kernel: nothing above them may have asked.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>
#include <utility>

namespace wavlm_fast {

inline void check_vector(const char* op, const char* name, const at::Tensor& vector, int64_t size) {
  TORCH_CHECK(vector.sizes() == at::IntArrayRef({size}), op, ": expected ", name, " of [", size, "], got ",
              vector.sizes());
}

inline void check_vector(const char* op, const char* name, const std::optional<at::Tensor>& vector, int64_t size) {
  if (vector) check_vector(op, name, *vector, size);
}

// Numbers by name that are divided by, or counted to.
inline void check_positive(const char* op, std::initializer_list<std::pair<const char*, int64_t>> numbers) {
  for (const auto& [name, number] : numbers) {
    TORCH_CHECK(number > 0, op, ": expected ", name, " of 1 or more, got ", number);
  }
}

inline void check_lengths(const char* op, const std::optional<at::Tensor>& lengths, int64_t B) {
  if (!lengths) return;
  check_vector(op, "lengths", *lengths, B);
  TORCH_CHECK(at::isIntegralType(lengths->scalar_type(), false), op, ": expected integers for lengths, got ",
              lengths->scalar_type());
}

}  // namespace wavlm_fast
