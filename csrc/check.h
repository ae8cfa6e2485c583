// What entries ask of their arguments before raw pointers and sizes go to a kernel: nothing above them may have asked.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "tensor.h"

namespace wavlm_fast {

template <class Part>
void write(std::ostream& to, const Part& part) {
  to << part;
}

inline void write(std::ostream& to, Sizes sizes) {
  to << "[";
  for (size_t i = 0; i < sizes.size(); ++i) to << (i ? ", " : "") << sizes[i];
  to << "]";
}

// What Python sees as a RuntimeError of these words.
template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void refuse(const Parts&... parts) {
  std::ostringstream sentence;
  (write(sentence, parts), ...);
  throw std::runtime_error(sentence.str());
}

}  // namespace wavlm_fast

#define ENTRY_CHECK(condition, ...) ((condition) ? void() : ::wavlm_fast::refuse(__VA_ARGS__))

namespace wavlm_fast {

inline void check_vector(const char* op, const char* name, const Tensor& vector, int64_t size) {
  ENTRY_CHECK(vector.sizes().equals({size}), op, ": expected ", name, " of [", size, "], got ", vector.sizes());
}

inline void check_vector(const char* op, const char* name, const std::optional<Tensor>& vector, int64_t size) {
  if (vector) check_vector(op, name, *vector, size);
}

// Numbers by name that are divided by, or counted to.
inline void check_positive(const char* op, std::initializer_list<std::pair<const char*, int64_t>> numbers) {
  for (const auto& [name, number] : numbers) {
    ENTRY_CHECK(number > 0, op, ": expected ", name, " of 1 or more, got ", number);
  }
}

inline bool is_integral(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long:
    case ScalarType::UInt16:
    case ScalarType::UInt32:
    case ScalarType::UInt64:
      return true;
    default:
      return false;
  }
}

inline void check_lengths(const char* op, const std::optional<Tensor>& lengths, int64_t B) {
  if (!lengths) return;
  check_vector(op, "lengths", *lengths, B);
  ENTRY_CHECK(is_integral(dtype_of(*lengths)), op, ": expected integers for lengths, got ", dtype_of(*lengths));
}

}  // namespace wavlm_fast
