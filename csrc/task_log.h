// What a call is cut into for a number of threads that this machine need not have. While a thread keeps a log its loops
// run on it alone, task by task, and each task's time is taken: what so many threads would take follows from that
// (benchmarks/ops/tasks.py).
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace wavlm_fast {

class TaskLog {
 public:
  explicit TaskLog(int64_t threads);

  int64_t threads() const { return threads_; }

  // A loop in ranges of at least `grain`, one for each thread, as torch cuts it.
  void loop(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

  // Tasks that threads take as they finish.
  void tasks(int64_t count, const std::function<void(int64_t)>& body);

  // One loop after the other: seconds since the one before, on one thread; 1 if threads take its tasks as they finish,
  // 0 if each has one; how many tasks; the seconds of each. Behind all the seconds since the last one.
  std::vector<double> found() const;

 private:
  template <class Run>
  void region(bool taken, int64_t count, const Run& run);

  const int64_t threads_;
  bool inside_ = false;  // of a task: a loop in it is a part of it
  double mark_;          // when the last loop ended
  std::vector<double> numbers_;
};

// This thread's; null where it keeps none.
TaskLog* task_log();

}  // namespace wavlm_fast
