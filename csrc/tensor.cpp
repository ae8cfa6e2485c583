#include "tensor.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
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

}  // namespace

Tensor fresh(const Tensor& like, Sizes sizes, ScalarType dtype) {
  return made(&aoti_torch_aten_new_empty, like, sizes, &dtype);
}

Tensor fresh(const Tensor& like, Sizes sizes) { return made(&aoti_torch_aten_new_empty, like, sizes, nullptr); }

Tensor fresh_like(const Tensor& x) { return fresh(x, x.sizes()); }

Tensor zeros(const Tensor& like, Sizes sizes, ScalarType dtype) {
  return made(&aoti_torch_aten_new_zeros, like, sizes, &dtype);
}

Tensor rounded(const Tensor& like, Sizes sizes, const float* numbers, ScalarType dtype) {
  const Tensor wide = fresh(like, sizes, kFloat);
  std::copy_n(numbers, wide.numel(), mutable_data<float>(wide));
  return contiguous_of(wide, dtype);
}

Tensor contiguous_of(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

std::optional<Tensor> contiguous_of(const std::optional<Tensor>& x) {
  if (x) return contiguous_of(*x);
  return {};
}

Tensor contiguous_of(const Tensor& x, ScalarType dtype) {
  return contiguous_of(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
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
