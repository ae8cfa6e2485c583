// Layer norm and activation of one row at a time.
#include "norm_act.h"

#include "activation.h"
#include "statistics.h"
#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {
namespace {

template <Activation activation, class T>
void run(const T* x, const float* weight, const float* bias, float eps, std::int64_t rows, std::int64_t C, T* out) {
  for (std::int64_t row = 0; row < rows; ++row, x += C, out += C) {
    const Statistics of_row = statistics(x, C, eps);
    sweep(C, [&](std::int64_t i, auto lanes, int) {
      Floats normed = of_row.normed(lanes.load(x + i));
      if (weight) normed *= lanes.load(weight + i);
      if (bias) normed += lanes.load(bias + i);
      lanes.store(out + i, activate<activation>(normed));
    });
  }
}

template <class T>
void norm_act(const T* x, const float* weight, const float* bias, float eps, std::int64_t rows, std::int64_t C,
              int activation, T* out) {
  with_activation(activation, [&](auto of) { run<of.activation>(x, weight, bias, eps, rows, C, out); });
}

}  // namespace

const NormActKernels& norm_act_kernels() {
  static constexpr NormActKernels kernels = {norm_act<float>, norm_act<bf16>};
  return kernels;
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
