// Residual add and layer norm of one row at a time: the row is read from memory once and stays in the first cache. The
// forward adds up the next row where it norms one: it waits for memory while it computes.
#include "add_layer_norm.h"
#include "statistics.h"
#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {
namespace {

template <class T>
void forward(const T* x, const T* residual, const float* weight, const float* bias, float eps, std::int64_t rows,
             std::int64_t C, float* row, T* sum_out, T* normed) {
  float total = 0.0f;
  for (std::int64_t r = 0; r <= rows; ++r) {
    const Statistics of_row = r > 0 ? statistics(row, C, eps, total) : Statistics{};
    Floats totals[kUnroll] = {};
    // The norm is of the sum as it was rounded, which is what the next layer sees.
    const auto add = [&](std::int64_t i, auto lanes, int u) {
      const Floats added = rounded<T>(lanes.load(x + i) + lanes.load(residual + i));
      totals[u] += added;
      lanes.store(row + i, added);
      if (sum_out) lanes.store(sum_out + i, added);
    };
    const auto norm = [&](std::int64_t i, auto lanes, int) {
      const Floats hat = of_row.normed(lanes.load(row + i));
      lanes.store(normed + i, hat * lanes.load(weight + i) + lanes.load(bias + i));
    };
    if (r == 0) {
      sweep(C, add);
    } else if (r == rows) {
      sweep(C, norm);
    } else {
      sweep(C, [&](std::int64_t i, auto lanes, int u) { norm(i, lanes, u), add(i, lanes, u); });
    }
    total = sum(totals);
    x += C, residual += C, normed += r > 0 ? C : 0, sum_out += sum_out ? C : 0;
  }
}

// With hat = (sum - mean) * rstd and g = grad_normed * weight:
// dx = grad_sum + rstd * (g - mean(g) - hat * mean(g * hat)), dweight = sum of grad_normed * hat, dbias of grad_normed.
template <class T>
void backward(const T* grad_sum, const T* grad_normed, const T* sum_in, const float* weight, float eps,
              std::int64_t rows, std::int64_t C, T* dx, float* dweight, float* dbias) {
  for (std::int64_t row = 0; row < rows; ++row) {
    const Statistics of_row = statistics(sum_in, C, eps);
    Floats g_total[kUnroll] = {}, g_hat_total[kUnroll] = {};
    sweep(C, [&](std::int64_t i, auto lanes, int u) {
      const Floats hat = of_row.normed(lanes.load(sum_in + i));
      const Floats grad = lanes.load(grad_normed + i);
      const Floats g = grad * lanes.load(weight + i);
      g_total[u] += g;
      g_hat_total[u] += g * hat;
      lanes.store(dweight + i, lanes.load(dweight + i) + grad * hat);
      lanes.store(dbias + i, lanes.load(dbias + i) + grad);
    });
    const float g_mean = sum(g_total) / C, g_hat_mean = sum(g_hat_total) / C;
    const auto before_scale = [&](std::int64_t i, auto lanes) {
      const Floats hat = of_row.normed(lanes.load(sum_in + i));
      const Floats g = lanes.load(grad_normed + i) * lanes.load(weight + i);
      return g - g_mean - hat * g_hat_mean;
    };
    if (grad_sum) {  // one multiply-add, rounded once
      sweep(C, [&](std::int64_t i, auto lanes, int) {
        lanes.store(dx + i, lanes.load(grad_sum + i) + before_scale(i, lanes) * of_row.rstd);
      });
    } else {
      sweep(C, [&](std::int64_t i, auto lanes, int) { lanes.store(dx + i, before_scale(i, lanes) * of_row.rstd); });
    }
    if (grad_sum) grad_sum += C;
    grad_normed += C, sum_in += C, dx += C;
  }
}

}  // namespace

const AddLayerNormKernels& add_layer_norm_kernels() {
  static constexpr AddLayerNormKernels kernels = {forward<float>, forward<bf16>, backward<float>, backward<bf16>};
  return kernels;
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
