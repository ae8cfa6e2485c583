#include "norm_act.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>

#include "check.h"
#include "dispatch.h"
#include "norm_act_entry.h"
#include "packed_conv_entry.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(NormActKernels, norm_act_kernels)

template <>
NormAct<float>* norm_act_kernel() { return norm_act_kernels().of_float; }
template <>
NormAct<bf16>* norm_act_kernel() { return norm_act_kernels().of_bf16; }

namespace {

using at::Tensor;

// A thread takes at least this many elements: below, waking it up costs more than it saves.
constexpr int64_t kGrain = 16384;

template <class T>
void run(NormAct<T>* kernel, const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, int activation,
         const Tensor& out) {
  const int64_t C = x.size(-1), rows = x.numel() / C;
  const float* gain = weight.defined() ? weight.const_data_ptr<float>() : nullptr;
  const float* offset = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / C), [&](int64_t begin, int64_t end) {
    kernel(static_cast<const T*>(x.const_data_ptr()) + begin * C, gain, offset, eps, end - begin, C, activation,
           static_cast<T*>(out.mutable_data_ptr()) + begin * C);
  });
}

// activation(layer norm of x over its last dimension), float32 or bfloat16.
Tensor norm_act(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                const std::string& activation) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
              "norm_act: expected float32 or bfloat16, got ", x.scalar_type());
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0, "norm_act: expected [..., C] with C > 0, got ", x.sizes());
  check_vector("norm_act", "weight", weight, x.size(-1));
  check_vector("norm_act", "bias", bias, x.size(-1));
  const Tensor x_ = x.contiguous(), out = at::empty_like(x_);
  const Tensor weight_ = weight ? weight->to(at::kFloat).contiguous() : Tensor();
  const Tensor bias_ = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  const int number = activation_number(activation);
  if (x.scalar_type() == at::kFloat) {
    run<float>(norm_act_kernels().of_float, x_, weight_, bias_, eps, number, out);
  } else {
    run<bf16>(norm_act_kernels().of_bf16, x_, weight_, bias_, eps, number, out);
  }
  return out;
}

TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) { m.impl("norm_act", &norm_act); }

}  // namespace
}  // namespace wavlm_fast
