// How many threads a loop of the kernels runs on: that is inside torch, which may have been built without threads, or
// give the whole loop to one of them.
#include <chrono>
#include <mutex>
#include <set>
#include <thread>

#include "library.h"
#include "parallel.h"

namespace wavlm_fast {
namespace {

// A thread that is done early may take another's task: each waits until all have begun, but not for ever.
constexpr std::chrono::milliseconds kPatience{200};

int64_t threads() {
  using Clock = std::chrono::steady_clock;
  const int64_t most = num_threads();
  std::atomic<int64_t> begun{0};
  std::mutex guard;
  std::set<std::thread::id> seen;
  parallel_for(0, most, 1, [&](int64_t begin, int64_t end) {
    begun += end - begin;
    for (const auto late = Clock::now() + kPatience; begun < most && Clock::now() < late;) std::this_thread::yield();
    const std::lock_guard lock(guard);
    seen.insert(std::this_thread::get_id());
  });
  return static_cast<int64_t>(seen.size());
}

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CompositeExplicitAutograd, m) { m.impl("threads", TORCH_BOX(&threads)); }

}  // namespace
}  // namespace wavlm_fast
