// What matmul.cpp asks of matmul_kernel.cpp, per level.
#pragma once

#include <cstddef>
#include <cstdint>

namespace wavlm_fast {

// out[i, :] = (add ? out[i, :] : 0) + sum over k < depth of a(i, k) * b[k, :].
// a(i, k) is at a + i * a_row + k * a_term, one of these two being 1; rows of b and of out are contiguous, and those of
// b may overlap.
struct Matmul {
  const float* a;
  const float* b;
  float* out;
  std::int64_t a_row, a_term, b_row, out_row;
  std::int64_t depth, columns;
  bool add;
};

// Rows first .. first + count - 1 of the groups of columns from group_begin to group_end.
using MatmulRun = void(const Matmul& call, std::int64_t first, std::int64_t count, std::int64_t group_begin,
                       std::int64_t group_end, float* scratch);

struct MatmulKernels {
  std::int64_t columns;      // of a group
  std::int64_t rows;         // `count` is best a multiple of it,
  std::int64_t most_rows;    // and at most this
  std::size_t scratch_size;  // floats, 64-byte aligned
  MatmulRun* run;
};

}  // namespace wavlm_fast
