#include "add_layer_norm.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "dispatch.h"
#include "parts.h"
#include "scratch.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(AddLayerNormKernels, add_layer_norm_kernels)

namespace {

using at::Tensor;

// A thread takes at least this many elements: below, waking it up costs more than it saves.
constexpr int64_t kGrain = 16384;

void check(const char* op, const Tensor& x, const Tensor& other, const char* other_name, const Tensor& weight) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, op,
              ": expected float32 or bfloat16, got ", x.scalar_type());
  TORCH_CHECK(other.scalar_type() == x.scalar_type() && other.sizes() == x.sizes(), op, ": expected ", other_name,
              " of ", x.scalar_type(), " ", x.sizes(), ", got ", other.scalar_type(), " ", other.sizes());
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0, op, ": expected [..., C] with C > 0, got ", x.sizes());
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(-1), op, ": expected weight and bias of [", x.size(-1),
              "], got ", weight.sizes());
}

template <class T>
const T* data(const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); }

template <class T>
T* mutable_data(const Tensor& tensor) { return static_cast<T*>(tensor.mutable_data_ptr()); }

template <class T>
void run_forward(AddLayerNormForward<T>* kernel, const Tensor& x, const Tensor& residual, const Tensor& weight,
                 const Tensor& bias, float eps, const Tensor& sum, const Tensor& normed) {
  const int64_t C = x.size(-1), rows = x.numel() / C;
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / C), [&](int64_t begin, int64_t end) {
    const int64_t at = begin * C;
    float* row = static_cast<float*>(scratch<Scratch::task>(C * sizeof(float)));
    kernel(data<T>(x) + at, data<T>(residual) + at, data<float>(weight), data<float>(bias), eps, end - begin, C, row,
           sum.numel() ? mutable_data<T>(sum) + at : nullptr, mutable_data<T>(normed) + at);
  });
}

template <class T>
void run_backward(AddLayerNormBackward<T>* kernel, const Tensor& grad_sum, const Tensor& grad_normed,
                  const Tensor& sum, const Tensor& weight, float eps, const Tensor& dx, const Tensor& partials) {
  const int64_t C = sum.size(-1), rows = sum.numel() / C, parts = partials.size(0);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts, at = begin * C;
      float* dweight = mutable_data<float>(partials) + part * 2 * C;
      kernel(data<T>(grad_sum) + at, data<T>(grad_normed) + at, data<T>(sum) + at, data<float>(weight), eps,
             end - begin, C, mutable_data<T>(dx) + at, dweight, dweight + C);
    }
  });
}

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                          const Tensor& bias, double eps, bool keep_sum) {
  check("add_layer_norm", x, residual, "residual", weight);
  check("add_layer_norm", x, residual, "residual", bias);
  const Tensor x_ = x.contiguous(), residual_ = residual.contiguous();
  const Tensor weight_ = weight.to(at::kFloat).contiguous(), bias_ = bias.to(at::kFloat).contiguous();
  const Tensor sum = keep_sum ? at::empty_like(x_) : at::empty({0}, x_.options()), normed = at::empty_like(x_);
  const auto& kernels = add_layer_norm_kernels();
  if (x.scalar_type() == at::kFloat) {
    run_forward<float>(kernels.forward_float, x_, residual_, weight_, bias_, eps, sum, normed);
  } else {
    run_forward<bf16>(kernels.forward_bf16, x_, residual_, weight_, bias_, eps, sum, normed);
  }
  return {sum, normed};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward(const Tensor& grad_sum, const Tensor& grad_normed,
                                                           const Tensor& sum, const Tensor& weight, double eps) {
  check("add_layer_norm_backward", sum, grad_sum, "grad_sum", weight);
  check("add_layer_norm_backward", sum, grad_normed, "grad_normed", weight);
  const Tensor grad_sum_ = grad_sum.contiguous(), grad_normed_ = grad_normed.contiguous(), sum_ = sum.contiguous();
  const Tensor weight_ = weight.to(at::kFloat).contiguous();
  const Tensor dx = at::empty_like(sum_);
  const Tensor partials = at::zeros({parts_for(sum.numel()), 2, sum.size(-1)}, weight_.options());
  const auto& kernels = add_layer_norm_kernels();
  if (sum.scalar_type() == at::kFloat) {
    run_backward<float>(kernels.backward_float, grad_sum_, grad_normed_, sum_, weight_, eps, dx, partials);
  } else {
    run_backward<bf16>(kernels.backward_bf16, grad_sum_, grad_normed_, sum_, weight_, eps, dx, partials);
  }
  const Tensor totals = total_of(partials).to(weight.scalar_type());
  return {dx, totals.select(0, 0).clone(), totals.select(0, 1).clone()};
}

TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) {
  m.impl("add_layer_norm", &add_layer_norm);
  m.impl("add_layer_norm_backward", &add_layer_norm_backward);
}

}  // namespace
}  // namespace wavlm_fast
