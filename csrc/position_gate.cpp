#include "position_gate.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "entries.h"
#include "parts.h"
#include "scratch.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(PositionGateKernels, position_gate_kernels)

namespace {

using at::Tensor;

void check(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& scale) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, op,
              ": expected float32 or bfloat16, got ", x.scalar_type());
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) == 8 && bias.sizes() == at::IntArrayRef({8}) && scale.dim() == 1, op,
              ": expected weight of [8, D], bias of [8] and const of [H], got ", weight.sizes(), ", ", bias.sizes(),
              " and ", scale.sizes());
  check_positive(op, {{"D", weight.size(1)}, {"H", scale.size(0)}});
  TORCH_CHECK(x.dim() == 3 && x.size(2) % scale.size(0) == 0 && x.size(2) / scale.size(0) == weight.size(1), op, ": expected x of [B, T, ",
              scale.size(0) * weight.size(1), "], got ", x.sizes());
}

// What every frame meets, in float32.
struct Parameters {
  std::vector<float> weight, bias;  // [2, D], [2]
  Tensor scale;                     // [H]

  // The sum over four commutes with the projection: two vectors are left of eight.
  Parameters(const Tensor& weight_of_8, const Tensor& bias_of_8, const Tensor& const_of_heads)
      : weight(2 * weight_of_8.size(1)), bias(2), scale(const_of_heads.to(at::kFloat).contiguous()) {
    const Tensor rows = weight_of_8.to(at::kFloat).contiguous(), shifts = bias_of_8.to(at::kFloat).contiguous();
    const int64_t D = rows.size(1);
    for (int64_t n = 0; n < 8; ++n) {
      const float* row = rows.const_data_ptr<float>() + n * D;
      for (int64_t d = 0; d < D; ++d) weight[n / 4 * D + d] += row[d];
      bias[n / 4] += shifts.const_data_ptr<float>()[n];
    }
  }
};

Tensor with_channels_contiguous(const Tensor& x) { return x.stride(2) == 1 ? x : x.contiguous(); }

// Frames `first` to `last` of all utterances in a row, in blocks that a kernel takes: body(frames, b, t).
template <class T, class Body>
void for_blocks(const Tensor& x, const Parameters& parameters, int64_t first, int64_t last, const Body& body) {
  const int64_t T_ = x.size(1), H = parameters.scale.size(0);
  for (int64_t at = first; at < last;) {
    const int64_t b = at / T_, t = at % T_, count = std::min({kGateFrames, last - at, T_ - t});
    const T* frames = static_cast<const T*>(x.const_data_ptr()) + b * x.stride(0) + t * x.stride(1);
    body(GateFrames<T>{frames, x.stride(1), count, H, H == 0 ? 0 : x.size(2) / H, parameters.weight.data(),
                       parameters.bias.data(), parameters.scale.const_data_ptr<float>()},
         b, t);
    at += count;
  }
}

float* work_for(int64_t H) { return static_cast<float*>(scratch<Scratch::task>(gate_scratch(H) * sizeof(float))); }

template <class T>
void run_forward(PositionGateForward<T>* kernel, const Tensor& x, const Parameters& parameters, const Tensor& out) {
  const int64_t T_ = x.size(1), H = parameters.scale.size(0);
  at::parallel_for(0, x.size(0) * T_, kGateFrames, [&](int64_t first, int64_t last) {
    float* work = work_for(H);
    for_blocks<T>(x, parameters, first, last, [&](const GateFrames<T>& frames, int64_t b, int64_t t) {
      kernel(frames, work, out.mutable_data_ptr<float>() + b * H * T_ + t, T_);
    });
  });
}

template <class T>
void run_backward(PositionGateBackward<T>* kernel, const Tensor& grad, const Tensor& x, const Parameters& parameters,
                  const Tensor& dx, const Tensor& partials) {
  const int64_t T_ = x.size(1), H = parameters.scale.size(0), rows = x.size(0) * T_, parts = partials.size(0);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    float* work = work_for(H);
    for (int64_t part = begin; part < end; ++part) {
      float* sums = partials.mutable_data_ptr<float>() + part * partials.size(1);
      const int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
      for_blocks<T>(x, parameters, first, last, [&](const GateFrames<T>& frames, int64_t b, int64_t t) {
        kernel(frames, work, grad.const_data_ptr<float>() + b * H * T_ + t, T_,
               static_cast<T*>(dx.mutable_data_ptr()) + (b * T_ + t) * x.size(2), sums);
      });
    }
  });
}

}  // namespace

Tensor position_gate(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& scale) {
  check("position_gate", x, weight, bias, scale);
  const Tensor x_ = with_channels_contiguous(x);
  const Parameters parameters(weight, bias, scale);
  const Tensor out = at::empty({x.size(0), scale.size(0), x.size(1)}, x.options().dtype(at::kFloat));
  const auto& kernels = position_gate_kernels();
  if (x.scalar_type() == at::kFloat) {
    run_forward<float>(kernels.forward_float, x_, parameters, out);
  } else {
    run_forward<bf16>(kernels.forward_bf16, x_, parameters, out);
  }
  return out;
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> position_gate_backward(const Tensor& grad, const Tensor& x,
                                                                  const Tensor& weight, const Tensor& bias,
                                                                  const Tensor& scale) {
  check("position_gate_backward", x, weight, bias, scale);
  const int64_t H = scale.size(0), D = weight.size(1);
  TORCH_CHECK(grad.sizes() == at::IntArrayRef({x.size(0), H, x.size(1)}),
              "position_gate_backward: expected grad of [", x.size(0), ", ", H, ", ", x.size(1), "], got ", grad.sizes());
  const Tensor grad_ = grad.to(at::kFloat).contiguous(), x_ = with_channels_contiguous(x);
  const Parameters parameters(weight, bias, scale);
  const Tensor dx = at::empty(x.sizes(), x.options());
  const Tensor partials = at::zeros({parts_for(x.numel()), 2 * D + 2 + H}, grad_.options());
  const auto& kernels = position_gate_kernels();
  if (x.scalar_type() == at::kFloat) {
    run_backward<float>(kernels.backward_float, grad_, x_, parameters, dx, partials);
  } else {
    run_backward<bf16>(kernels.backward_bf16, grad_, x_, parameters, dx, partials);
  }
  const Tensor total = total_of(partials);
  const Tensor dweight = total.narrow(0, 0, 2 * D).view({2, 1, D}).expand({2, 4, D}).reshape({8, D});
  const Tensor dbias = total.narrow(0, 2 * D, 2).view({2, 1}).expand({2, 4}).reshape({8});
  const Tensor dscale = total.narrow(0, 2 * D + 2, H).clone();
  return {dx, dweight.to(weight.scalar_type()), dbias.to(bias.scalar_type()), dscale.to(scale.scalar_type())};
}

TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) {
  m.impl("position_gate", &position_gate);
  m.impl("position_gate_backward", &position_gate_backward);
}

}  // namespace
}  // namespace wavlm_fast
