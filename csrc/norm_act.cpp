// Layer norm and activation, an engine: strided_conv ends in it, and encoder_layer and feature_encoder use it through
// norm_act_entry.h.
#include "norm_act.h"

#include <algorithm>

#include "check.h"
#include "dispatch.h"
#include "library.h"
#include "norm_act_entry.h"
#include "packed_conv_entry.h"
#include "parallel.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(NormActKernels, norm_act_kernels)

template <>
NormAct<float>* norm_act_kernel() {
  return norm_act_kernels().of_float;
}
template <>
NormAct<bf16>* norm_act_kernel() {
  return norm_act_kernels().of_bf16;
}

namespace {

// A thread takes at least this many elements: below, waking it up costs more than it saves.
constexpr int64_t kGrain = 16384;

template <class T>
void run(NormAct<T>* kernel, const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
         double eps, int activation, const Tensor& out) {
  const int64_t C = x.size(-1), rows = x.numel() / C;
  const T* from = data<T>(x);
  const float *gain = data<float>(weight), *offset = data<float>(bias);
  T* to = mutable_data<T>(out);
  parallel_for(0, rows, std::max<int64_t>(1, kGrain / C), [&](int64_t begin, int64_t end) {
    kernel(from + begin * C, gain, offset, eps, end - begin, C, activation, to + begin * C);
  });
}

// activation(layer norm of x over its last dimension), float32 or bfloat16.
Tensor norm_act(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                const Text& activation) {
  ENTRY_CHECK(dtype_of(x) == kFloat || dtype_of(x) == kBFloat16, "norm_act: expected float32 or bfloat16, got ",
              dtype_of(x));
  ENTRY_CHECK(x.dim() >= 1 && x.size(-1) > 0, "norm_act: expected [..., C] with C > 0, got ", x.sizes());
  check_vector("norm_act", "weight", weight, x.size(-1));
  check_vector("norm_act", "bias", bias, x.size(-1));
  const Tensor x_ = contiguous_of(x), out = fresh_like(x_);
  const auto weight_ = contiguous_of(weight, kFloat), bias_ = contiguous_of(bias, kFloat);
  const int number = activation_number(activation);
  if (dtype_of(x) == kFloat) {
    run<float>(norm_act_kernels().of_float, x_, weight_, bias_, eps, number, out);
  } else {
    run<bf16>(norm_act_kernels().of_bf16, x_, weight_, bias_, eps, number, out);
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) { m.impl("norm_act", TORCH_BOX(&norm_act)); }

}  // namespace
}  // namespace wavlm_fast
