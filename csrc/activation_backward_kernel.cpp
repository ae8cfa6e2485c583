#include "activation_backward.h"

#include "activation.h"
#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {
namespace {

template <Activation activation, class T>
void run(const T* grad, const T* pre, std::int64_t size, T* out) {
  sweep(size, [&](std::int64_t i, auto lanes, int) {
    lanes.store(out + i, through<activation>(lanes.load(grad + i), lanes.load(pre + i)));
  });
}

template <class T>
void backward(const T* grad, const T* pre, std::int64_t size, int activation, T* out) {
  switch (static_cast<Activation>(activation)) {
    case Activation::none:
      return run<Activation::none>(grad, pre, size, out);
    case Activation::relu:
      return run<Activation::relu>(grad, pre, size, out);
    case Activation::gelu:
      return run<Activation::gelu>(grad, pre, size, out);
    case Activation::gelu_tanh:
      return run<Activation::gelu_tanh>(grad, pre, size, out);
  }
}

}  // namespace

const ActivationBackwardKernels& activation_backward_kernels() {
  static constexpr ActivationBackwardKernels kernels = {backward<float>, backward<bf16>};
  return kernels;
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
