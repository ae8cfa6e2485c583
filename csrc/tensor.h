// Tensors as entries see them, through torch's stable interface: one file then runs under every torch from the one that
// TORCH_TARGET in setup.py names.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <algorithm>
#include <cstdint>
#include <optional>

namespace wavlm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

constexpr ScalarType kFloat = ScalarType::Float, kBFloat16 = ScalarType::BFloat16;

// Undefined where the stable interface has no number for it, and of a tensor that is not there.
ScalarType dtype_of(const Tensor& x);

// The values of a tensor whose dtype is known; null of one that is not there.
template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
const T* data(const std::optional<Tensor>& x) {
  return x ? data<T>(*x) : nullptr;
}

template <class T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Fresh and contiguous, on the device and, unless one is given, of the dtype of `like`.
Tensor fresh(const Tensor& like, Sizes sizes, ScalarType dtype);
Tensor fresh(const Tensor& like, Sizes sizes);
Tensor fresh_like(const Tensor& x);
Tensor zeros(const Tensor& like, Sizes sizes, ScalarType dtype);

// Fresh and contiguous, with the values of x.
Tensor copy_of(const Tensor& x, ScalarType dtype);

// x itself where it is so already, else a copy.
Tensor contiguous_of(const Tensor& x);
std::optional<Tensor> contiguous_of(const std::optional<Tensor>& x);
Tensor contiguous_of(const Tensor& x, ScalarType dtype);
std::optional<Tensor> contiguous_of(const std::optional<Tensor>& x, ScalarType dtype);

// Fresh, with `numbers` rounded to float32 first.
template <class Number>
Tensor rounded(const Tensor& like, Sizes sizes, const Number* numbers, ScalarType dtype) {
  const Tensor wide = fresh(like, sizes, kFloat);
  std::copy_n(numbers, wide.numel(), mutable_data<float>(wide));
  return contiguous_of(wide, dtype);
}

// Of memory on the CPU that outlives it; to be written into only where that memory may be.
Tensor view_of(const void* memory, Sizes sizes, Sizes strides, ScalarType dtype);
Tensor view_of(const void* memory, Sizes sizes, ScalarType dtype);

}  // namespace wavlm_fast
