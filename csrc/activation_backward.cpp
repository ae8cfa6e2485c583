#include "activation_backward.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "dispatch.h"
#include "packed_conv_entry.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(ActivationBackwardKernels, activation_backward_kernels)

namespace {

using at::Tensor;

// A thread takes at least this many elements: below, waking it up costs more than it saves.
constexpr int64_t kGrain = 8192;

template <class T>
void run(ActivationBackward<T>* kernel, const Tensor& grad, const Tensor& pre, int activation, const Tensor& out) {
  at::parallel_for(0, pre.numel(), kGrain, [&](int64_t begin, int64_t end) {
    kernel(static_cast<const T*>(grad.const_data_ptr()) + begin, static_cast<const T*>(pre.const_data_ptr()) + begin,
           end - begin, activation, static_cast<T*>(out.mutable_data_ptr()) + begin);
  });
}

// The gradient of activation(pre) with respect to pre, float32 or bfloat16.
Tensor activation_backward(const Tensor& grad, const Tensor& pre, const std::string& activation) {
  TORCH_CHECK(pre.scalar_type() == at::kFloat || pre.scalar_type() == at::kBFloat16,
              "activation_backward: expected float32 or bfloat16, got ", pre.scalar_type());
  TORCH_CHECK(grad.scalar_type() == pre.scalar_type() && grad.sizes() == pre.sizes(),
              "activation_backward: expected grad of ", pre.scalar_type(), " ", pre.sizes(), ", got ",
              grad.scalar_type(), " ", grad.sizes());
  const Tensor grad_ = grad.contiguous(), pre_ = pre.contiguous(), out = at::empty_like(pre_);
  const int number = activation_number(activation);
  if (pre.scalar_type() == at::kFloat) {
    run<float>(activation_backward_kernels().of_float, grad_, pre_, number, out);
  } else {
    run<bf16>(activation_backward_kernels().of_bf16, grad_, pre_, number, out);
  }
  return out;
}

TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) { m.impl("activation_backward", &activation_backward); }

}  // namespace
}  // namespace wavlm_fast
