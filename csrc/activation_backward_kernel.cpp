#include "activation_backward.h"

#include "activation.h"
#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {
namespace {

template <class T>
void backward(const T* grad, const T* pre, std::int64_t size, int activation, T* out) {
  with_activation(activation, [&](auto of) {
    sweep(size, [&](std::int64_t i, auto lanes, int) {
      lanes.store(out + i, through<of.activation>(lanes.load(grad + i), lanes.load(pre + i)));
    });
  });
}

}  // namespace

const ActivationBackwardKernels& activation_backward_kernels() {
  static constexpr ActivationBackwardKernels kernels = {backward<float>, backward<bf16>};
  return kernels;
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
