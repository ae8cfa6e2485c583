// Loops on torch's threads, whatever compiled this: the loop itself is inside torch.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#include "scratch.h"
#include "task_log.h"

namespace wavlm_fast {

inline int64_t num_threads() {
  const TaskLog* const log = task_log();
  return log ? log->threads() : static_cast<int64_t>(torch::stable::get_num_threads());
}

// body(begin, end) for ranges of at least `grain` that together are begin .. end.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (TaskLog* const log = task_log()) return log->loop(begin, end, grain, body);
  // Torch's C interface would give back that something was thrown, but not what.
  std::exception_ptr thrown;
  std::atomic_flag has_thrown = ATOMIC_FLAG_INIT;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    try {
      body(first, last);
    } catch (...) {
      if (!has_thrown.test_and_set()) thrown = std::current_exception();
    }
  });
  if (thrown) std::rethrow_exception(thrown);
}

// body(task, memory) for all tasks, which threads take as they finish. Each thread has that much memory of its own.
template <class Body>
void for_each_task(int64_t tasks, std::size_t floats, const Body& body) {
  if (TaskLog* const log = task_log()) {
    const Memory memory(Scratch::task, floats * sizeof(float));
    return log->tasks(tasks, [&](int64_t task) { body(task, memory.as<float>()); });
  }
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min(tasks, num_threads()), 1, [&](int64_t, int64_t) {
    const Memory memory(Scratch::task, floats * sizeof(float));
    for (int64_t task = next++; task < tasks; task = next++) body(task, memory.as<float>());
  });
}

}  // namespace wavlm_fast
