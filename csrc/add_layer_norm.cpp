#include "add_layer_norm.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "library.h"
#include "parallel.h"
#include "parts.h"
#include "scratch.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(AddLayerNormKernels, add_layer_norm_kernels)

namespace {

// A thread takes at least this many elements: below, waking it up costs more than it saves.
constexpr int64_t kGrain = 16384;

void check(const char* op, const Tensor& x, const Tensor& other, const char* other_name, const Tensor& weight) {
  ENTRY_CHECK(dtype_of(x) == kFloat || dtype_of(x) == kBFloat16, op, ": expected float32 or bfloat16, got ",
              dtype_of(x));
  ENTRY_CHECK(dtype_of(other) == dtype_of(x) && other.sizes().equals(x.sizes()), op, ": expected ", other_name, " of ",
              dtype_of(x), " ", x.sizes(), ", got ", dtype_of(other), " ", other.sizes());
  ENTRY_CHECK(x.dim() >= 1 && x.size(-1) > 0, op, ": expected [..., C] with C > 0, got ", x.sizes());
  ENTRY_CHECK(weight.dim() == 1 && weight.size(0) == x.size(-1), op, ": expected weight and bias of [", x.size(-1),
              "], got ", weight.sizes());
}

template <class T>
void run_forward(AddLayerNormForward<T>* kernel, const Tensor& x, const Tensor& residual, const Tensor& weight,
                 const Tensor& bias, float eps, const Tensor& sum, const Tensor& normed) {
  const int64_t C = x.size(-1), rows = x.numel() / C;
  const T *from = data<T>(x), *other = data<T>(residual);
  const float *gain = data<float>(weight), *offset = data<float>(bias);
  T *to_sum = sum.numel() ? mutable_data<T>(sum) : nullptr, *to = mutable_data<T>(normed);
  parallel_for(0, rows, std::max<int64_t>(1, kGrain / C), [&](int64_t begin, int64_t end) {
    const int64_t at = begin * C;
    const Memory row(Scratch::task, C * sizeof(float));
    kernel(from + at, other + at, gain, offset, eps, end - begin, C, row.as<float>(), to_sum ? to_sum + at : nullptr,
           to + at);
  });
}

template <class T>
void run_backward(AddLayerNormBackward<T>* kernel, const Tensor& grad_sum, const Tensor& grad_normed, const Tensor& sum,
                  const Tensor& weight, float eps, const Tensor& dx, std::vector<float>& partials) {
  const int64_t C = sum.size(-1), rows = sum.numel() / C, parts = partials.size() / (2 * C);
  const T *of_sum = grad_sum.numel() ? data<T>(grad_sum) : nullptr, *of_normed = data<T>(grad_normed),
          *from = data<T>(sum);
  const float* gain = data<float>(weight);
  T* to = mutable_data<T>(dx);
  parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts, at = begin * C;
      float* dweight = partials.data() + part * 2 * C;
      kernel(of_sum ? of_sum + at : nullptr, of_normed + at, from + at, gain, eps, end - begin, C, to + at, dweight,
             dweight + C);
    }
  });
}

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                          const Tensor& bias, double eps, bool keep_sum) {
  check("add_layer_norm", x, residual, "residual", weight);
  check("add_layer_norm", x, residual, "residual", bias);
  const Tensor x_ = contiguous_of(x), residual_ = contiguous_of(residual);
  const Tensor weight_ = contiguous_of(weight, kFloat), bias_ = contiguous_of(bias, kFloat);
  const Tensor sum = keep_sum ? fresh_like(x_) : fresh(x_, {0}), normed = fresh_like(x_);
  const auto& kernels = add_layer_norm_kernels();
  if (dtype_of(x) == kFloat) {
    run_forward<float>(kernels.forward_float, x_, residual_, weight_, bias_, eps, sum, normed);
  } else {
    run_forward<bf16>(kernels.forward_bf16, x_, residual_, weight_, bias_, eps, sum, normed);
  }
  return {sum, normed};
}

// An empty vector for grad_sum is none.
std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward(const Tensor& grad_sum, const Tensor& grad_normed,
                                                           const Tensor& sum, const Tensor& weight, double eps,
                                                           const std::vector<bool>& wanted) {
  if (grad_sum.dim() != 1 || grad_sum.numel()) check("add_layer_norm_backward", sum, grad_sum, "grad_sum", weight);
  check("add_layer_norm_backward", sum, grad_normed, "grad_normed", weight);
  ENTRY_CHECK(wanted.size() == 3, "add_layer_norm_backward: expected 3 truth values, got ", wanted.size());
  const Tensor grad_sum_ = contiguous_of(grad_sum), grad_normed_ = contiguous_of(grad_normed),
               sum_ = contiguous_of(sum);
  const Tensor weight_ = contiguous_of(weight, kFloat);
  const Tensor dx = fresh_like(sum_);
  const int64_t C = sum.size(-1);
  std::vector<float> partials(parts_for(sum.numel()) * 2 * C);
  const auto& kernels = add_layer_norm_kernels();
  if (dtype_of(sum) == kFloat) {
    run_backward<float>(kernels.backward_float, grad_sum_, grad_normed_, sum_, weight_, eps, dx, partials);
  } else {
    run_backward<bf16>(kernels.backward_bf16, grad_sum_, grad_normed_, sum_, weight_, eps, dx, partials);
  }
  std::vector<float> totals;
  if (wanted[1] || wanted[2]) totals = total_of<float>(partials, 2 * C);
  const auto vector = [&](int64_t first, bool of) {
    return of ? rounded(weight, {C}, totals.data() + first, dtype_of(weight)) : fresh(sum, {0});
  };
  return {wanted[0] ? dx : fresh(sum, {0}), vector(0, wanted[1]), vector(C, wanted[2])};
}

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) {
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&add_layer_norm_backward));
}

}  // namespace
}  // namespace wavlm_fast
