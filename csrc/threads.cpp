// How many threads a loop of the kernels runs on. at::parallel_for is a template: in a file that was compiled without
// OpenMP it is a plain loop, and nothing else would say so.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace wavlm_fast {
namespace {

int64_t threads() {
  const int64_t most = at::get_num_threads();
  std::vector<char> seen(most, 0);
  at::parallel_for(0, most, 1, [&](int64_t, int64_t) { seen[at::get_thread_num()] = 1; });
  return std::count(seen.begin(), seen.end(), 1);
}

TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CompositeExplicitAutograd, m) { m.impl("threads", &threads); }

}  // namespace
}  // namespace wavlm_fast
