#include "positional_conv.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "integers.h"
#include "library.h"
#include "packed_conv_entry.h"
#include "packed_frames.h"
#include "parallel.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(PositionalConvKernels, positional_conv_kernels)

namespace {

// Tasks per thread, so that threads end together.
constexpr int64_t kTasksPerThread = 4;
// Spectra of the rows of one pass over the filters. More rows read the filters less often, and less of them stays in the
// second cache: from 1 to 4 MB it is all the same.
constexpr int64_t kPassBytes = 2 << 20;
// Channels of a part of a group, at least.
constexpr int64_t kLeastEntering = 8;
// Of the spectra of a group, which a thread works in.
constexpr int64_t kMostBytes = 1 << 26;

// Coefficients of a transform: frames of a block, and at least taps of a filter.
int64_t coefficients(int64_t K) {
  int64_t P = 16;
  while (P < K) P *= 2;
  return P;
}

void check(const Tensor& weight) {
  ENTRY_CHECK(dtype_of(weight) == kFloat || dtype_of(weight) == kBFloat16,
              "positional_conv: expected float32 or bfloat16, got ", dtype_of(weight));
  ENTRY_CHECK(weight.dim() == 3 && weight.numel() > 0 && weight.size(0) % weight.size(1) == 0,
              "positional_conv: expected a weight of [C, C / groups, K], got ", weight.sizes());
  const int64_t channels = weight.size(1), K = weight.size(2), lanes = std::max<int64_t>(channels, 16);
  ENTRY_CHECK(K <= kMostBytes && channels <= kMostBytes &&
                  coefficients(K) <= kMostBytes / static_cast<int64_t>(2 * sizeof(float)) / channels / lanes,
              "positional_conv: expected a weight whose spectra take up to ", kMostBytes >> 20, " MB a group, got ",
              weight.sizes());
}

void check(const Tensor& x, const Tensor& weight) {
  check(weight);
  ENTRY_CHECK(x.dim() == 3 && x.numel() > 0 && x.size(2) == weight.size(0) && dtype_of(x) == dtype_of(weight),
              "positional_conv: expected x of ", dtype_of(weight), " [B, T, ", weight.size(0), "], got ", dtype_of(x),
              " ", x.sizes());
}

void check_alike(const Tensor& x, const Tensor& other, const char* name) {
  ENTRY_CHECK(dtype_of(other) == dtype_of(x) && other.sizes().equals(x.sizes()), "positional_conv: expected ", name,
              " of ", dtype_of(x), " ", x.sizes(), ", got ", dtype_of(other), " ", other.sizes());
}

template <class T>
const PositionalConvOf<T>& kernels_for() {
  if constexpr (std::is_same_v<T, float>) return positional_conv_kernels().of_float;
  if constexpr (std::is_same_v<T, bf16>) return positional_conv_kernels().of_bf16;
}

// Calls body with a null pointer of the kernels' type for the dtype.
template <class Body>
auto with_type(ScalarType dtype, const Body& body) {
  return dtype == kFloat ? body(static_cast<float*>(nullptr)) : body(static_cast<bf16*>(nullptr));
}

// As fourier.h reads them: of each node of each pass the powers 1 .. radix - 1 of the radix-th root of its number c.
std::vector<float> roots_of_passes(int64_t P) {
  constexpr double kCircle = 6.283185307179586;
  std::vector<float> roots;
  std::vector<double> angles = {0.25};  // of the numbers c, in circles
  while (static_cast<int64_t>(angles.size()) < P) {
    const int radix = angles.size() == 1 && __builtin_ctzll(P) % 2 ? 8 : 4;
    std::vector<double> below;
    for (const double angle : angles) {
      for (int s = 1; s < radix; ++s) {
        roots.push_back(static_cast<float>(std::cos(kCircle * angle * s / radix)));
        roots.push_back(static_cast<float>(std::sin(kCircle * angle * s / radix)));
      }
      for (int j = 0; j < radix; ++j) below.push_back((angle + j) / radix);
    }
    angles = std::move(below);
  }
  return roots;
}

// Everything but the frames.
template <class T>
PositionalConv<T> call_on(const Tensor& weight, const std::vector<float>& roots) {
  PositionalConv<T> call{};
  call.C = weight.size(0), call.channels = weight.size(1), call.K = weight.size(2);
  call.P = coefficients(call.K), call.padding = call.K / 2;
  call.filters = {data<T>(weight), call.channels * call.channels * call.K, call.channels * call.K, call.K, false};
  call.roots = roots.data();
  return call;
}

template <class T>
PositionalConv<T> call_on(const Tensor& x, const Tensor& weight, const std::vector<float>& roots,
                          const std::vector<int64_t>& bounds, const std::vector<Row>& rows) {
  PositionalConv<T> call = call_on<T>(weight, roots);
  call.x = data<T>(x);
  call.rows = rows.data();
  call.bounds = bounds.empty() ? nullptr : bounds.data();
  call.B = bounds.empty() ? x.size(0) : bounds.size() - 1, call.T_ = x.size(1);
  return call;
}

// Rows of a convolution with K taps. A transform's product comes back negated over the end of its 2P frames: what a
// single row of a whole utterance finds there are the zeros before it.
std::vector<Row> rows_of(const Tensor& x, const std::vector<int64_t>& bounds, int64_t K) {
  const int64_t P = coefficients(K), whole = 2 * P - K / 2;
  std::vector<Row> rows;
  const auto add = [&](int64_t first, int64_t frames) {
    const int64_t size = frames <= whole ? frames : P;
    for (int64_t t = 0; t < frames; t += size) rows.push_back({first + t, t, frames - t, std::min(size, frames - t)});
  };
  for (size_t b = 1; b < bounds.size(); ++b) add(bounds[b - 1], bounds[b] - bounds[b - 1]);
  for (int64_t b = 0; bounds.empty() && b < x.size(0); ++b) add(b * x.size(1), x.size(1));
  return rows;
}

int64_t groups(const Tensor& weight) { return weight.size(0) / weight.size(1); }

int64_t filters_size(const Tensor& weight) {
  return positional_conv_kernels().filters_size(coefficients(weight.size(2)), weight.size(1));
}

// The rows of a call, cut into passes over the filters; at least so many where there are rows enough.
struct Passes {
  int64_t rows, per_pass, count;

  template <class T>
  Passes(const PositionalConv<T>& call, int64_t all, int64_t bytes, int64_t least) : rows(all) {
    const auto& kernels = positional_conv_kernels();
    const int64_t row_bytes = kernels.row_size(call.P, call.channels) * sizeof(float);
    const int64_t most = std::max(kernels.rows, bytes / row_bytes / kernels.rows * kernels.rows);
    const int64_t even = divided_up(rows, std::max(least, divided_up(rows, most)));
    per_pass = std::min(rows, divided_up(even, kernels.rows) * kernels.rows);
    if (divided_up(rows, per_pass) < least) per_pass = even;  // better a part of a tile than threads without work
    count = divided_up(rows, per_pass);
  }

  int64_t first(int64_t pass) const { return pass * per_pass; }
  int64_t size(int64_t pass) const { return std::min(per_pass, rows - first(pass)); }
};

// In how many parts of channels that enter the work on a group's filters is cut, so that all threads have some. Each
// number is made by one task either way.
template <class T>
int64_t parts_of_group(const PositionalConv<T>& call, int64_t tasks) {
  const int64_t most = std::max<int64_t>(1, call.channels / kLeastEntering);
  return std::clamp<int64_t>(divided_up(tasks, call.C / call.channels), 1, most);
}

template <class T>
Entering entering(const PositionalConv<T>& call, int64_t part, int64_t parts) {
  return {call.channels * part / parts, call.channels * (part + 1) / parts};
}

template <class T>
void transform_filters(const PositionalConv<T>& call, float* spectra) {
  const auto& kernels = positional_conv_kernels();
  const int64_t size = kernels.filters_size(call.P, call.channels);
  const int64_t parts = parts_of_group(call, kTasksPerThread * num_threads());
  const int64_t work = kernels.scratch_size(call.P, 0, call.channels);
  for_each_task(call.C / call.channels * parts, work, [&](int64_t task, float* memory) {
    const int64_t group = task / parts;
    kernels_for<T>().transform_filters(call, group, entering(call, task % parts, parts), spectra + group * size,
                                       memory);
  });
}

// `spectra` of all groups' filters, or null: each task then makes those that it needs.
template <class T>
void convolve(const PositionalConv<T>& call, int64_t rows, const float* spectra) {
  const auto& kernels = positional_conv_kernels();
  const int64_t groups = call.C / call.channels, threads = num_threads();
  const Passes passes(call, rows, kPassBytes, divided_up(threads, groups));
  const int64_t parts = std::min(divided_up((spectra ? kTasksPerThread : 1) * threads, groups), passes.count);
  const int64_t filters = kernels.filters_size(call.P, call.channels);
  const int64_t work = kernels.scratch_size(call.P, passes.per_pass, call.channels);
  for_each_task(groups * parts, spectra ? work : work + filters, [&](int64_t task, float* memory) {
    const int64_t group = task / parts, part = task % parts;
    const float* own = spectra ? spectra + group * filters : memory + work;
    if (!spectra) kernels_for<T>().transform_filters(call, group, {0, call.channels}, memory + work, memory);
    for (int64_t pass = passes.count * part / parts; pass < passes.count * (part + 1) / parts; ++pass) {
      kernels_for<T>().convolve(call, group, passes.first(pass), passes.size(pass), own, memory);
    }
  });
}

// The gradient of the filters; a part of a group is summed by one thread in the order of its rows.
template <class T>
void gradient(const PositionalConv<T>& call, int64_t rows) {
  const auto& kernels = positional_conv_kernels();
  const Passes passes(call, rows, kPassBytes / 2, 1);
  const int64_t filters = kernels.filters_size(call.P, call.channels);
  const int64_t work = kernels.scratch_size(call.P, passes.per_pass, call.channels);
  // Each part transforms the gradient's rows: no more parts than threads need.
  const int64_t groups = call.C / call.channels, threads = num_threads();
  const int64_t parts = threads < groups ? 1 : parts_of_group(call, kTasksPerThread * threads);
  for_each_task(groups * parts, work + filters, [&](int64_t task, float* memory) {
    const int64_t group = task / parts;
    const Entering of = entering(call, task % parts, parts);
    float* spectra = memory + work;
    for (int64_t pass = 0; pass < passes.count; ++pass) {
      const auto kernel = pass > 0 ? kernels_for<T>().add_gradient : kernels_for<T>().begin_gradient;
      kernel(call, group, of, passes.first(pass), passes.size(pass), spectra, memory);
    }
    kernels_for<T>().finish_gradient(call, group, of, spectra, memory);
  });
}

// Spectra of the filters of a weight [C, C / groups, K], in the order that the kernel of this process reads.
Tensor positional_spectra(const Tensor& weight) {
  check(weight);
  const Tensor weight_ = contiguous_of(weight);
  const int64_t size = filters_size(weight);
  const Tensor spectra = fresh(weight, {groups(weight) * size}, kFloat);
  float* to = mutable_data<float>(spectra);
  const std::vector<float> roots = roots_of_passes(coefficients(weight.size(2)));
  with_type(dtype_of(weight), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const PositionalConv<T> call = call_on<T>(weight_, roots);
    transform_filters(call, to);
  });
  return spectra;
}

// (out, what enters the activation or an empty tensor). `spectra` is what positional_spectra made of the weight.
std::tuple<Tensor, Tensor> positional_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& spectra,
                                           const std::optional<Tensor>& bias, const Text& activation, bool residual,
                                           bool save, const std::optional<Tensor>& offsets) {
  check(x, weight);
  check_vector("positional_conv", "bias", bias, x.size(2));
  ENTRY_CHECK(!spectra || (spectra->is_contiguous() && dtype_of(*spectra) == kFloat &&
                           spectra->numel() == groups(weight) * filters_size(weight)),
              "positional_conv: expected the spectra that positional_spectra makes of the weight");
  const std::vector<int64_t> bounds = bounds_of("positional_conv", offsets, x);
  const Tensor x_ = contiguous_of(x), weight_ = spectra ? weight : contiguous_of(weight), out = fresh_like(x_);
  const auto bias_ = contiguous_of(bias, kFloat);
  const Tensor pre = save ? fresh_like(x_) : fresh(x, {0});
  const std::vector<float> roots = roots_of_passes(coefficients(weight.size(2)));
  const std::vector<Row> rows = rows_of(x, bounds, weight.size(2));
  with_type(dtype_of(x), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    PositionalConv<T> call = call_on<T>(x_, weight_, roots, bounds, rows);
    call.bias = data<float>(bias_);
    call.residual = residual ? call.x : nullptr;
    call.pre = save ? mutable_data<T>(pre) : nullptr;
    call.out = mutable_data<T>(out);
    call.activation = activation_number(activation);
    convolve(call, rows.size(), data<float>(spectra));
  });
  return {out, pre};
}

// (dx, dweight) from the gradient of the convolution, those of them that are wanted; `residual` is added to dx.
std::tuple<Tensor, Tensor> positional_conv_backward(const Tensor& grad, const std::optional<Tensor>& residual,
                                                    const Tensor& x, const Tensor& weight,
                                                    const std::vector<bool>& wanted,
                                                    const std::optional<Tensor>& offsets) {
  check(x, weight);
  ENTRY_CHECK(wanted.size() == 2, "positional_conv_backward: expected two of wanted, got ", wanted.size());
  check_alike(x, grad, "grad");
  if (residual) check_alike(x, *residual, "residual");
  const std::vector<int64_t> bounds = bounds_of("positional_conv_backward", offsets, x);
  const Tensor grad_ = contiguous_of(grad), x_ = contiguous_of(x), weight_ = contiguous_of(weight);
  const auto residual_ = contiguous_of(residual);
  const Tensor dx = wanted[0] ? fresh_like(x_) : fresh(x, {0});
  const Tensor dweight = wanted[1] ? fresh_like(weight_) : fresh(weight, {0});
  const std::vector<float> roots = roots_of_passes(coefficients(weight.size(2)));
  const std::vector<Row> rows = rows_of(x, bounds, weight.size(2));
  with_type(dtype_of(x), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (wanted[1]) {
      PositionalConv<T> call = call_on<T>(x_, weight_, roots, bounds, rows);
      call.grad = data<T>(grad_);
      call.out = mutable_data<T>(dweight);
      gradient(call, rows.size());
    }
    if (wanted[0]) {
      // A frame meets the taps in the opposite order and from the opposite side, and channels change roles.
      PositionalConv<T> call = call_on<T>(grad_, weight_, roots, bounds, rows);
      std::swap(call.filters.out_step, call.filters.in_step);
      call.filters.backwards = true;
      call.padding = call.K - 1 - call.padding;
      call.residual = data<T>(residual_);
      call.out = mutable_data<T>(dx);
      // More threads than groups share the spectra; each of a few makes them where it will read them.
      if (num_threads() <= groups(weight)) return convolve(call, rows.size(), nullptr);
      const Memory spectra(Scratch::call, groups(weight) * filters_size(weight) * sizeof(float));
      transform_filters(call, spectra.as<float>());
      convolve(call, rows.size(), spectra.as<float>());
    }
  });
  return {dx, dweight};
}

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) {
  m.impl("positional_spectra", TORCH_BOX(&positional_spectra));
  m.impl("positional_conv", TORCH_BOX(&positional_conv));
  m.impl("positional_conv_backward", TORCH_BOX(&positional_conv_backward));
}

}  // namespace
}  // namespace wavlm_fast
