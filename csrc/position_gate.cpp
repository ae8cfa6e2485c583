#include "position_gate.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "library.h"
#include "parallel.h"
#include "parts.h"
#include "position_gate_entry.h"
#include "scratch.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(PositionGateKernels, position_gate_kernels)

namespace {

void check(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& scale) {
  ENTRY_CHECK(dtype_of(x) == kFloat || dtype_of(x) == kBFloat16, op, ": expected float32 or bfloat16, got ",
              dtype_of(x));
  ENTRY_CHECK(weight.dim() == 2 && weight.size(0) == 8 && bias.sizes().equals({8}) && scale.dim() == 1, op,
              ": expected weight of [8, D], bias of [8] and const of [H], got ", weight.sizes(), ", ", bias.sizes(),
              " and ", scale.sizes());
  check_positive(op, {{"D", weight.size(1)}, {"H", scale.size(0)}});
  ENTRY_CHECK(x.dim() == 3 && x.size(2) % scale.size(0) == 0 && x.size(2) / scale.size(0) == weight.size(1), op,
              ": expected x of [B, T, ", scale.size(0) * weight.size(1), "], got ", x.sizes());
}

// What every frame meets, in float32.
struct Parameters {
  std::vector<float> weight, bias;  // [2, D], [2]
  Tensor scale;                     // [H]

  // The sum over four commutes with the projection: two vectors are left of eight.
  Parameters(const Tensor& weight_of_8, const Tensor& bias_of_8, const Tensor& const_of_heads)
      : weight(2 * weight_of_8.size(1)), bias(2), scale(contiguous_of(const_of_heads, kFloat)) {
    const Tensor rows = contiguous_of(weight_of_8, kFloat), shifts = contiguous_of(bias_of_8, kFloat);
    const int64_t D = rows.size(1);
    const float *row = data<float>(rows), *shift = data<float>(shifts);
    for (int64_t n = 0; n < 8; ++n, row += D) {
      for (int64_t d = 0; d < D; ++d) weight[n / 4 * D + d] += row[d];
      bias[n / 4] += shift[n];
    }
  }
};

Tensor with_channels_contiguous(const Tensor& x) { return x.stride(2) == 1 ? x : contiguous_of(x); }

// Frames `first` to `last` of all utterances in a row, in blocks that a kernel takes: body(frames, b, t).
template <class T, class Body>
void for_blocks(const Tensor& x, const Parameters& parameters, int64_t first, int64_t last, const Body& body) {
  const int64_t T_ = x.size(1), H = parameters.scale.size(0), D = x.size(2) / H;
  const int64_t row_step = x.stride(0), frame_step = x.stride(1);
  const T* from = data<T>(x);
  const float* scale = data<float>(parameters.scale);
  for (int64_t at = first; at < last;) {
    const int64_t b = at / T_, t = at % T_, count = std::min({kGateFrames, last - at, T_ - t});
    const T* frames = from + b * row_step + t * frame_step;
    body(GateFrames<T>{frames, frame_step, count, H, D, parameters.weight.data(), parameters.bias.data(), scale}, b, t);
    at += count;
  }
}

template <class T>
void run_forward(PositionGateForward<T>* kernel, const Tensor& x, const Parameters& parameters, const Tensor& out) {
  const int64_t T_ = x.size(1), H = parameters.scale.size(0);
  float* to = mutable_data<float>(out);
  parallel_for(0, x.size(0) * T_, kGateFrames, [&](int64_t first, int64_t last) {
    const Memory work(Scratch::task, gate_scratch(H) * sizeof(float));
    for_blocks<T>(x, parameters, first, last, [&](const GateFrames<T>& frames, int64_t b, int64_t t) {
      kernel(frames, work.as<float>(), to + b * H * T_ + t, T_);
    });
  });
}

template <class T>
void run_backward(PositionGateBackward<T>* kernel, const Tensor& grad, const Tensor& x, const Parameters& parameters,
                  const Tensor& dx, std::vector<float>& partials, int64_t size) {
  const int64_t T_ = x.size(1), C = x.size(2), H = parameters.scale.size(0), rows = x.size(0) * T_;
  const int64_t parts = partials.size() / size;
  const float* from = data<float>(grad);
  T* to = mutable_data<T>(dx);
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const Memory work(Scratch::task, gate_scratch(H) * sizeof(float));
    for (int64_t part = begin; part < end; ++part) {
      float* sums = partials.data() + part * size;
      const int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
      for_blocks<T>(x, parameters, first, last, [&](const GateFrames<T>& frames, int64_t b, int64_t t) {
        kernel(frames, work.as<float>(), from + b * H * T_ + t, T_, to + (b * T_ + t) * C, sums);
      });
    }
  });
}

}  // namespace

Tensor position_gate(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& scale) {
  check("position_gate", x, weight, bias, scale);
  const Tensor x_ = with_channels_contiguous(x);
  const Parameters parameters(weight, bias, scale);
  const Tensor out = fresh(x, {x.size(0), scale.size(0), x.size(1)}, kFloat);
  const auto& kernels = position_gate_kernels();
  if (dtype_of(x) == kFloat) {
    run_forward<float>(kernels.forward_float, x_, parameters, out);
  } else {
    run_forward<bf16>(kernels.forward_bf16, x_, parameters, out);
  }
  return out;
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> position_gate_backward(const Tensor& grad, const Tensor& x,
                                                                  const Tensor& weight, const Tensor& bias,
                                                                  const Tensor& scale,
                                                                  const std::vector<bool>& wanted) {
  check("position_gate_backward", x, weight, bias, scale);
  const int64_t H = scale.size(0), D = weight.size(1);
  ENTRY_CHECK(grad.sizes().equals({x.size(0), H, x.size(1)}), "position_gate_backward: expected grad of [", x.size(0),
              ", ", H, ", ", x.size(1), "], got ", grad.sizes());
  ENTRY_CHECK(wanted.size() == 4, "position_gate_backward: expected 4 truth values, got ", wanted.size());
  const Tensor grad_ = contiguous_of(grad, kFloat), x_ = with_channels_contiguous(x);
  const Parameters parameters(weight, bias, scale);
  const Tensor dx = fresh_like(x);
  const int64_t size = 2 * D + 2 + H;  // of a part's sums
  std::vector<float> partials(parts_for(x.numel()) * size);
  const auto& kernels = position_gate_kernels();
  if (dtype_of(x) == kFloat) {
    run_backward<float>(kernels.backward_float, grad_, x_, parameters, dx, partials, size);
  } else {
    run_backward<bf16>(kernels.backward_bf16, grad_, x_, parameters, dx, partials, size);
  }
  const std::vector<float> total = total_of<float>(partials, size);
  // The four that are added up have one gradient.
  std::vector<float> dweight, dbias;
  for (int64_t n = 0; n < 8; ++n) {
    const float* row = total.data() + n / 4 * D;
    dweight.insert(dweight.end(), row, row + D);
    dbias.push_back(total[2 * D + n / 4]);
  }
  const auto of = [&](int64_t i, Sizes sizes, const float* sums, const Tensor& parameter) {
    return wanted[i] ? rounded(x, sizes, sums, dtype_of(parameter)) : fresh(x, {0});
  };
  return {wanted[0] ? dx : fresh(x, {0}), of(1, {8, D}, dweight.data(), weight), of(2, {8}, dbias.data(), bias),
          of(3, {H}, total.data() + 2 * D + 2, scale)};
}

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) {
  m.impl("position_gate", TORCH_BOX(&position_gate));
  m.impl("position_gate_backward", TORCH_BOX(&position_gate_backward));
}

}  // namespace
}  // namespace wavlm_fast
