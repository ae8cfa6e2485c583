// What an activation does to a gradient, an engine: of linear_act, strided_conv, tdnn and positional_conv.
#include "activation_backward.h"

#include "check.h"
#include "dispatch.h"
#include "library.h"
#include "packed_conv_entry.h"
#include "parallel.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(ActivationBackwardKernels, activation_backward_kernels)

namespace {

// A thread takes at least this many elements: below, waking it up costs more than it saves.
constexpr int64_t kGrain = 8192;

template <class T>
void run(ActivationBackward<T>* kernel, const Tensor& grad_, const Tensor& pre_, int activation, const Tensor& out_) {
  const T *grad = data<T>(grad_), *pre = data<T>(pre_);
  T* out = mutable_data<T>(out_);
  parallel_for(0, pre_.numel(), kGrain, [&](int64_t begin, int64_t end) {
    kernel(grad + begin, pre + begin, end - begin, activation, out + begin);
  });
}

// The gradient of activation(pre) with respect to pre, float32 or bfloat16.
Tensor activation_backward(const Tensor& grad, const Tensor& pre, const Text& activation) {
  ENTRY_CHECK(dtype_of(pre) == kFloat || dtype_of(pre) == kBFloat16,
              "activation_backward: expected float32 or bfloat16, got ", dtype_of(pre));
  ENTRY_CHECK(dtype_of(grad) == dtype_of(pre) && grad.sizes().equals(pre.sizes()),
              "activation_backward: expected grad of ", dtype_of(pre), " ", pre.sizes(), ", got ", dtype_of(grad), " ",
              grad.sizes());
  const Tensor grad_ = contiguous_of(grad), pre_ = contiguous_of(pre), out = fresh_like(pre_);
  const int number = activation_number(activation);
  if (dtype_of(pre) == kFloat) {
    run<float>(activation_backward_kernels().of_float, grad_, pre_, number, out);
  } else {
    run<bf16>(activation_backward_kernels().of_bf16, grad_, pre_, number, out);
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) { m.impl("activation_backward", TORCH_BOX(&activation_backward)); }

}  // namespace
}  // namespace wavlm_fast
