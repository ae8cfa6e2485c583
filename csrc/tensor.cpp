#include "tensor.h"

#include <torch/csrc/stable/ops.h>

#include <stdexcept>
#include <vector>

#include "check.h"

namespace wavlm_fast {
namespace {

// Through the dispatcher, so that torch can fill fresh memory when it is told to.
Tensor made(decltype(aoti_torch_aten_new_empty)* make, const Tensor& like, Sizes sizes, const ScalarType* dtype) {
  int32_t number = 0;
  if (dtype) number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  AtenTensorHandle handle = nullptr;
  const auto code = make(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()), dtype ? &number : nullptr,
                         nullptr, nullptr, 0, nullptr, &handle);
  ENTRY_CHECK(code == TORCH_SUCCESS, "cannot allocate a tensor of ", sizes);
  return Tensor(handle);
}

Tensor with_values(const Tensor& copy, const Tensor& x) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.get(), x.get(), 0));
  return copy;
}

}  // namespace

ScalarType dtype_of(const Tensor& x) {
  int32_t number;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &number));
  if (number == aoti_torch_dtype_float32()) return kFloat;
  if (number == aoti_torch_dtype_bfloat16()) return kBFloat16;
  try {
    return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(number));
  } catch (const std::runtime_error&) {
    return ScalarType::Undefined;
  }
}

Tensor fresh(const Tensor& like, Sizes sizes, ScalarType dtype) {
  return made(&aoti_torch_aten_new_empty, like, sizes, &dtype);
}

Tensor fresh(const Tensor& like, Sizes sizes) { return made(&aoti_torch_aten_new_empty, like, sizes, nullptr); }

Tensor fresh_like(const Tensor& x) { return fresh(x, x.sizes()); }

Tensor zeros(const Tensor& like, Sizes sizes, ScalarType dtype) {
  return made(&aoti_torch_aten_new_zeros, like, sizes, &dtype);
}

Tensor copy_of(const Tensor& x, ScalarType dtype) { return with_values(fresh(x, x.sizes(), dtype), x); }

Tensor contiguous_of(const Tensor& x) { return x.is_contiguous() ? x : with_values(fresh_like(x), x); }

Tensor contiguous_of(const Tensor& x, ScalarType dtype) {
  return dtype_of(x) == dtype && x.is_contiguous() ? x : copy_of(x, dtype);
}

std::optional<Tensor> contiguous_of(const std::optional<Tensor>& x) {
  if (x) return contiguous_of(*x);
  return {};
}

std::optional<Tensor> contiguous_of(const std::optional<Tensor>& x, ScalarType dtype) {
  if (x) return contiguous_of(*x, dtype);
  return {};
}

Tensor view_of(const void* memory, Sizes sizes, Sizes strides, ScalarType dtype) {
  return torch::stable::from_blob(const_cast<void*>(memory), sizes, strides, {torch::headeronly::DeviceType::CPU, -1},
                                  dtype);
}

Tensor view_of(const void* memory, Sizes sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  return view_of(memory, sizes, strides, dtype);
}

}  // namespace wavlm_fast
