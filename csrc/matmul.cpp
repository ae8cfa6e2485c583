// Products of matrices, an engine: the gradients of linear_act, strided_conv and tdnn are made of them.
#include "matmul.h"

#include <algorithm>

#include "check.h"
#include "dispatch.h"
#include "integers.h"
#include "library.h"
#include "parallel.h"

namespace wavlm_fast {

WAVLM_FAST_DISPATCH(MatmulKernels, matmul_kernels)

namespace {

// Tasks per thread, so that threads end together.
constexpr int64_t kTasksPerThread = 6;

// Tasks are block of rows x range of column groups. Every number is summed by one task, whatever their number.
void run(const Matmul& call, int64_t rows) {
  const auto& kernels = matmul_kernels();
  const int64_t even = divided_up(divided_up(rows, divided_up(rows, kernels.most_rows)), kernels.rows) * kernels.rows;
  const int64_t block = std::min(kernels.most_rows, even), row_tasks = divided_up(rows, block);
  const int64_t groups = divided_up(call.columns, kernels.columns);
  const int64_t wanted = divided_up(kTasksPerThread * num_threads(), row_tasks);
  const int64_t step = divided_up(groups, std::clamp<int64_t>(wanted, 1, groups));
  const int64_t tasks = row_tasks * divided_up(groups, step);
  for_each_task(tasks, kernels.scratch_size, [&](int64_t task, float* memory) {
    const int64_t first = task % row_tasks * block, group = task / row_tasks * step;
    kernels.run(call, first, std::min(block, rows - first), group, std::min(group + step, groups), memory);
  });
}

// out = a b, or out += a b. Rows of b and out are contiguous, rows or columns of a are.
// `out` is given back: torch's fallback for negated views counts on it.
Tensor matmul(const Tensor& a, const Tensor& b, const Tensor& out, bool add) {
  ENTRY_CHECK(a.dim() == 2 && b.dim() == 2 && out.dim() == 2 && a.size(1) == b.size(0) && out.size(0) == a.size(0) &&
                  out.size(1) == b.size(1),
              "matmul: expected [I, K], [K, J] and [I, J], got ", a.sizes(), ", ", b.sizes(), " and ", out.sizes());
  for (const Tensor* x : {&a, &b, &out}) {
    ENTRY_CHECK(dtype_of(*x) == kFloat, "matmul: expected float32, got ", dtype_of(*x));
  }
  const auto lines = [](const Tensor& x, int64_t dim) { return x.size(dim) == 1 || x.stride(dim) == 1; };
  ENTRY_CHECK((lines(a, 0) || lines(a, 1)) && lines(b, 1) && lines(out, 1),
              "matmul: expected contiguous rows, got strides ", a.strides(), ", ", b.strides(), " and ", out.strides());
  if (out.numel() == 0) return out;
  ENTRY_CHECK(out.size(0) == 1 || out.stride(0) >= out.size(1), "matmul: expected rows of out apart, got strides ",
              out.strides());
  Matmul call;
  call.a = data<float>(a), call.b = data<float>(b), call.out = mutable_data<float>(out);
  call.a_row = a.stride(0), call.a_term = lines(a, 1) ? 1 : a.stride(1);
  call.b_row = b.stride(0), call.out_row = out.stride(0);
  call.depth = a.size(1), call.columns = b.size(1), call.add = add;
  if (call.depth > 0) {
    run(call, a.size(0));
  } else if (!add) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(out.get()));
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) { m.impl("matmul", TORCH_BOX(&matmul)); }

}  // namespace
}  // namespace wavlm_fast
