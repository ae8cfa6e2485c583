// Two dot products per frame and head, and what becomes of them: first all of a block of frames, frames innermost, so
// that the sigmoids are computed on vectors of frames.
#include "position_gate.h"

#include "exp.h"
#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {
namespace {

// to[h * 2 + n][t] = bias[n] + x[t, h, :] . weight[n].
template <class T>
WAVLM_FAST_INLINE void project(const GateFrames<T>& frames, float* to) {
  const std::int64_t D = frames.D;
  const float *first = frames.weight, *second = frames.weight + D;
  for (std::int64_t t = 0; t < frames.count; ++t) {
    const T* x = frames.x + t * frames.frame_step;
    for (std::int64_t h = 0; h < frames.H; ++h, x += D) {
      Floats a[kUnroll] = {}, b[kUnroll] = {};
      sweep(D, [&](std::int64_t i, auto lanes, int u) {
        const Floats values = lanes.load(x + i);
        a[u] += values * lanes.load(first + i);
        b[u] += values * lanes.load(second + i);
      });
      float* at = to + 2 * h * kGateFrames + t;
      at[0] = sum(a) + frames.bias[0];
      at[kGateFrames] = sum(b) + frames.bias[1];
    }
  }
}

template <class T>
void forward(const GateFrames<T>& frames, float* work, float* out, std::int64_t head_step) {
  project(frames, work);
  for (std::int64_t h = 0; h < frames.H; ++h, work += 2 * kGateFrames, out += head_step) {
    sweep(frames.count, [&](std::int64_t t, auto lanes, int) {
      const Floats a = sigmoid(load(work + t)), b = sigmoid(load(work + kGateFrames + t));
      lanes.store(out + t, a * (b * frames.scale[h] - 1.0f) + 2.0f);
    });
  }
}

// work becomes the gradients of what `project` put there; dbias and dscale are added to.
template <class T>
WAVLM_FAST_INLINE void differentiate(const GateFrames<T>& frames, float* work, const float* grad,
                                     std::int64_t head_step, float* dbias, float* dscale) {
  Floats da_total[kUnroll] = {}, db_total[kUnroll] = {};
  for (std::int64_t h = 0; h < frames.H; ++h, work += 2 * kGateFrames, grad += head_step) {
    const float scale = frames.scale[h];
    Floats ab_total[kUnroll] = {};
    sweep(frames.count, [&](std::int64_t t, auto lanes, int u) {
      const Floats a = sigmoid(load(work + t)), b = sigmoid(load(work + kGateFrames + t));
      const Floats flowing = lanes.load(grad + t);
      const Floats da = lanes.keep(flowing * (b * scale - 1.0f) * a * (1.0f - a));
      const Floats db = lanes.keep(flowing * a * scale * b * (1.0f - b));
      da_total[u] += da;
      db_total[u] += db;
      ab_total[u] += lanes.keep(flowing * a * b);
      store(work + t, da);
      store(work + kGateFrames + t, db);
    });
    dscale[h] += sum(ab_total);
  }
  dbias[0] += sum(da_total);
  dbias[1] += sum(db_total);
}

template <class T>
void backward(const GateFrames<T>& frames, float* work, const float* grad, std::int64_t head_step, T* dx, float* sums) {
  const std::int64_t D = frames.D;
  project(frames, work);
  differentiate(frames, work, grad, head_step, sums + 2 * D, sums + 2 * D + 2);
  sweep(D, [&](std::int64_t i, auto lanes, int) {
    const Floats first = lanes.load(frames.weight + i), second = lanes.load(frames.weight + D + i);
    Floats dfirst = {}, dsecond = {};
    for (std::int64_t t = 0; t < frames.count; ++t) {
      const T* x = frames.x + t * frames.frame_step + i;
      T* to = dx + t * frames.H * D + i;
      for (std::int64_t h = 0; h < frames.H; ++h) {
        const float* at = work + 2 * h * kGateFrames + t;
        const Floats values = lanes.load(x + h * D);
        lanes.store(to + h * D, at[0] * first + at[kGateFrames] * second);
        dfirst += at[0] * values;
        dsecond += at[kGateFrames] * values;
      }
    }
    lanes.store(sums + i, lanes.load(sums + i) + dfirst);
    lanes.store(sums + D + i, lanes.load(sums + D + i) + dsecond);
  });
}

}  // namespace

const PositionGateKernels& position_gate_kernels() {
  static constexpr PositionGateKernels kernels = {forward<float>, forward<bf16>, backward<float>, backward<bf16>};
  return kernels;
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
