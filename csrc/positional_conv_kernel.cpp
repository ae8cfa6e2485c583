// A wide grouped convolution through spectra: a block of P frames costs two transforms per channel and, at each of P
// roots, one complex product of the channels that enter a group by those that leave it. The direct sum takes P * K such
// products, of real numbers.
//
// Lanes are channels: transforms along time need no shuffles. The gradient of the filters is the same product, summed
// over rows where the convolution sums over channels.
//
// Transforms add up numbers that the sum over taps keeps apart: what is not finite would reach a whole block, and large
// numbers would leave the range. A result that is not finite is computed again by its definition (positional_direct.h).
#include "positional_conv.h"

#include "activation.h"
#include "complex_product.h"
#include "fourier.h"
#include "positional_direct.h"
#include "tile.h"
#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {
namespace {

constexpr std::int64_t width_of(std::int64_t channels) { return rounded_up(channels, kLanes); }

// Spectra of a group's filters: at each root a matrix in panels, row by row the channels that enter. An odd number of
// cache lines lies between roots: at a power of two all would compete for the same few places of a cache.
constexpr std::int64_t root_step(std::int64_t channels) { return channels * 2 * width_of(channels) + kLanes; }

std::size_t filters_size(std::int64_t P, std::int64_t channels) { return P * root_step(channels); }

// Spectra of rows of frames, each vector of channels with its [P][re, im][kLanes] in one piece.
struct RowSpectra {
  float* at;
  std::int64_t vector_step, row_step;

  RowSpectra(float* memory, std::int64_t P, std::int64_t channels)
      : at(memory), vector_step((P + 1) * 2 * kLanes), row_step(width_of(channels) / kLanes * vector_step) {}

  WAVLM_FAST_INLINE float* vector(std::int64_t row, std::int64_t channel) const {
    return at + row * row_step + channel / kLanes * vector_step;
  }
};

std::size_t row_size(std::int64_t P, std::int64_t channels) { return RowSpectra(nullptr, P, channels).row_step; }

// What a call works in: a transform's work, 2P vectors of frames, and twice one root of all rows and their spectra.
struct Scratch {
  float *work, *frames, *root, *grad_root, *rows, *grad_rows;

  Scratch(float* memory, std::int64_t P, std::int64_t count, std::int64_t channels) {
    work = memory;
    frames = work + 2 * kLanes * P;
    root = frames + 2 * kLanes * P;
    grad_root = root + count * 2 * width_of(channels);
    rows = grad_root + count * 2 * width_of(channels);
    grad_rows = rows + count * row_size(P, channels);
  }
};

std::size_t scratch_size(std::int64_t P, std::int64_t rows, std::int64_t channels) {
  return 4 * kLanes * P + 2 * rows * (2 * width_of(channels) + row_size(P, channels));
}

// Spectra of the frames of rows first .. first + count - 1: of each row's own frames, or of 2P that begin `lead` frames
// before it. Frames outside of the utterance are zero. Channels are those of vectors `from` .. `end` - 1, in channels.
template <bool kAlone, class T>
void transform_rows(const PositionalConv<T>& call, const T* frames, std::int64_t lead, std::int64_t group,
                    std::int64_t first, std::int64_t count, Entering vectors, const RowSpectra& to) {
  const Transform transform{call.P, call.roots};
  static constexpr T zeros[kLanes] = {};
  for (std::int64_t r = 0; r < count; ++r) {
    const Row& row = call.rows[first + r];
    const T* at = frames + row.first * call.C + group * call.channels;
    const std::int64_t begin = kAlone ? 0 : -row.before, end = kAlone ? row.count : row.after;
    each_vector(call.channels, [&](std::int64_t c, auto lanes) {
      if (c < vectors.begin || c >= vectors.end) return;
      const auto frame = [&](std::int64_t n) {
        const std::int64_t t = n - lead;
        return lanes.load(t >= begin && t < end ? at + t * call.C + c : zeros);
      };
      if (kAlone && row.count <= call.P) {
        return transform.forward(to.vector(r, c), [&](std::int64_t n) { return Complex{frame(n), Floats{}}; });
      }
      transform.forward(to.vector(r, c), [&](std::int64_t n) { return Complex{frame(n), frame(n + call.P)}; });
    });
  }
}

// Calls body(begin, offset, im) for the vectors of channels, offset and im saying where in a matrix of panels the row
// of channel `in` has that vector.
template <class Body>
WAVLM_FAST_INLINE void each_vector_in_panels(std::int64_t channels, std::int64_t in, const Body& body) {
  each_panel(width_of(channels), [&](std::int64_t begin, std::int64_t columns) {
    for (std::int64_t c = 0; c < columns; c += kLanes) {
      body(begin + c, 2 * channels * begin + in * 2 * columns + c, columns);
    }
  });
}

template <class T>
void transform_filters(const PositionalConv<T>& call, std::int64_t group, Entering of, float* spectra, float* scratch) {
  const Transform transform{call.P, call.roots};
  const Scratch at(scratch, call.P, 0, call.channels);
  const std::int64_t step = root_step(call.channels);
  std::memset(at.frames, 0, call.P * kLanes * sizeof(float));
  for (std::int64_t in = of.begin; in < of.end; ++in) {
    const T* filters = call.filters.at + group * call.filters.group_step + in * call.filters.in_step;
    each_vector_in_panels(call.channels, in, [&](std::int64_t out, std::int64_t offset, std::int64_t im) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const bool absent = out + lane >= call.channels;
        const T* taps = filters + (absent ? 0 : out + lane) * call.filters.out_step;
        for (std::int64_t k = 0; k < call.K; ++k) {
          const float tap = widened(taps[call.filters.backwards ? call.K - 1 - k : k]);
          at.frames[k * kLanes + lane] = absent ? 0.0f : tap;
        }
      }
      transform.forward(
          at.work,
          [&](std::int64_t n) {
            return Complex{load(at.frames + n * kLanes), Floats{}};
          },
          [&](std::int64_t f, Complex value) {
            store(spectra + f * step + offset, value.re);
            store(spectra + f * step + offset + im, value.im);
          });
    });
  }
}

// Root f of the rows, channels begin .. begin + columns - 1, as [row][re, im][columns].
WAVLM_FAST_INLINE void gather(const RowSpectra& rows, std::int64_t f, std::int64_t count, std::int64_t begin,
                              std::int64_t columns, float* to) {
  for (std::int64_t r = 0; r < count; ++r, to += 2 * columns) {
    for (std::int64_t c = 0; c < columns; c += kLanes) {
      const Complex value = load_complex(rows.vector(r, begin + c) + f * 2 * kLanes);
      store(to + c, value.re);
      store(to + columns + c, value.im);
    }
  }
}

// Frames of a row from their sums, `at` being the first of their channels in [M, C].
template <Activation activation, class T, class Lanes>
WAVLM_FAST_INLINE void finish(const PositionalConv<T>& call, const float* sums, std::int64_t count, Floats bias,
                              std::int64_t at, Lanes lanes) {
  for (std::int64_t t = 0; t < count; ++t, at += call.C) {
    const Floats sum = load(sums + t * kLanes) + bias;
    if (call.pre) lanes.store(call.pre + at, sum);
    const Floats value = activate<activation>(sum);
    lanes.store(call.out + at, call.residual ? lanes.load(call.residual + at) + value : value);
  }
}

template <Activation activation, class T>
void invert_rows(const PositionalConv<T>& call, std::int64_t group, std::int64_t first, std::int64_t count,
                 const RowSpectra& rows, float* frames, float* memory) {
  const Transform transform{call.P, call.roots};
  const float scale = 1.0f / static_cast<float>(call.P);
  for (std::int64_t r = 0; r < count; ++r) {
    const Row& row = call.rows[first + r];
    each_vector(call.channels, [&](std::int64_t c, auto lanes) {
      float* work = rows.vector(r, c);
      const auto held = [&](std::int64_t f) { return load_complex(work + f * 2 * kLanes); };
      if (row.count <= call.P) {
        transform.inverse(work, held,
                          [&](std::int64_t n, Complex value) { store(frames + n * kLanes, value.re * scale); });
      } else {
        transform.inverse(work, held, [&](std::int64_t n, Complex value) {
          store(frames + n * kLanes, value.re * scale);
          store(frames + (n + call.P) * kLanes, value.im * scale);
        });
      }
      if (!all_finite(frames, row.count * kLanes)) sum_directly(call, group, row, c, frames, memory);
      const std::int64_t channel = group * call.channels + c;
      finish<activation>(call, frames, row.count, call.bias ? lanes.load(call.bias + channel) : Floats{},
                         row.first * call.C + channel, lanes);
    });
  }
}

template <class T>
void convolve(const PositionalConv<T>& call, std::int64_t group, std::int64_t first, std::int64_t count,
              const float* spectra, float* scratch) {
  const std::int64_t width = width_of(call.channels);
  const Scratch at(scratch, call.P, count, call.channels);
  const RowSpectra rows(at.rows, call.P, call.channels);
  transform_rows<false>(call, call.x, call.padding, group, first, count, {0, width}, rows);
  for (std::int64_t f = 0; f < call.P; ++f) {
    // The product takes the place of its operand.
    gather(rows, f, count, 0, width, at.root);
    complex_product<false>(
        {at.root, 2 * width, 1, width}, spectra + f * root_step(call.channels), call.channels, width, count,
        [&](std::int64_t begin, std::int64_t) {
          return Result{rows.vector(0, begin) + f * 2 * kLanes, rows.row_step, rows.vector_step, kLanes};
        });
  }
  with_activation(call.activation,
                  [&](auto of) { invert_rows<of.activation>(call, group, first, count, rows, at.frames, at.work); });
}

template <bool kAdd, class T>
void add_gradient(const PositionalConv<T>& call, std::int64_t group, Entering of, std::int64_t first,
                  std::int64_t count, float* spectra, float* scratch) {
  const std::int64_t width = width_of(call.channels);
  const Entering vectors = {of.begin / kLanes * kLanes, rounded_up(of.end, kLanes)};
  const std::int64_t own = vectors.end - vectors.begin;
  const Scratch at(scratch, call.P, count, call.channels);
  const RowSpectra rows(at.rows, call.P, call.channels), grads(at.grad_rows, call.P, call.channels);
  transform_rows<false>(call, call.x, call.padding, group, first, count, vectors, rows);
  transform_rows<true>(call, call.grad, 0, group, first, count, {0, width}, grads);
  for (std::int64_t f = 0; f < call.P; ++f) {
    gather(rows, f, count, vectors.begin, own, at.root);
    each_panel(width, [&](std::int64_t begin, std::int64_t columns) {
      gather(grads, f, count, begin, columns, at.grad_root + 2 * count * begin);
    });
    float* root = spectra + f * root_step(call.channels);
    complex_product<kAdd>({at.root + of.begin - vectors.begin, 1, 2 * own, own}, at.grad_root, count, width,
                          of.end - of.begin, [&](std::int64_t begin, std::int64_t columns) {
                            float* to = root + 2 * (call.channels * begin + of.begin * columns);
                            return Result{to, 2 * columns, kLanes, columns};
                          });
  }
}

template <class T>
void finish_gradient(const PositionalConv<T>& call, std::int64_t group, Entering of, const float* spectra,
                     float* scratch) {
  const Transform transform{call.P, call.roots};
  const Scratch at(scratch, call.P, 0, call.channels);
  const std::int64_t step = root_step(call.channels);
  const float scale = 1.0f / static_cast<float>(call.P);
  for (std::int64_t in = of.begin; in < of.end; ++in) {
    each_vector_in_panels(call.channels, in, [&](std::int64_t out, std::int64_t offset, std::int64_t im) {
      transform.inverse(
          at.work,
          [&](std::int64_t f) {
            return Complex{load(spectra + f * step + offset), load(spectra + f * step + offset + im)};
          },
          [&](std::int64_t n, Complex value) { store(at.frames + n * kLanes, value.re * scale); });
      if (!all_finite(at.frames, call.K * kLanes)) sum_gradient_directly(call, group, in, out, at.frames);
      for (std::int64_t lane = 0; lane < least(kLanes, call.channels - out); ++lane) {
        T* taps = call.out + ((group * call.channels + out + lane) * call.channels + in) * call.K;
        for (std::int64_t k = 0; k < call.K; ++k) put(at.frames[k * kLanes + lane], taps + k);
      }
    });
  }
}

template <class T>
constexpr PositionalConvOf<T> kernels_of = {transform_filters<T>, convolve<T>, add_gradient<false, T>,
                                            add_gradient<true, T>, finish_gradient<T>};

}  // namespace

const PositionalConvKernels& positional_conv_kernels() {
  static constexpr PositionalConvKernels kernels = {kComplexRows, filters_size,      row_size,
                                                    scratch_size, kernels_of<float>, kernels_of<bf16>};
  return kernels;
}

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
