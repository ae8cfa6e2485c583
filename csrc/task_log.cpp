#include "task_log.h"

#include <algorithm>
#include <ctime>
#include <memory>

#include "check.h"
#include "integers.h"
#include "library.h"

namespace wavlm_fast {
namespace {

thread_local std::unique_ptr<TaskLog> log_of_thread;

// Of this thread, so that whoever else runs on its core does not count.
double seconds() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return time.tv_sec + 1e-9 * time.tv_nsec;
}

void begin_task_log(int64_t threads) {
  check_positive("begin_task_log", {{"threads", threads}});
  log_of_thread = std::make_unique<TaskLog>(threads);
}

std::vector<double> end_task_log() {
  ENTRY_CHECK(log_of_thread, "end_task_log: expected begin_task_log before it on this thread, got no log");
  return std::unique_ptr<TaskLog>(std::move(log_of_thread))->found();
}

}  // namespace

TaskLog* task_log() { return log_of_thread.get(); }

TaskLog::TaskLog(int64_t threads) : threads_(threads), mark_(seconds()) {}

template <class Run>
void TaskLog::region(bool taken, int64_t count, const Run& run) {
  struct Inside {
    bool& flag;
    explicit Inside(bool& flag) : flag(flag) { flag = true; }
    ~Inside() { flag = false; }
  } inside(inside_);
  double before = seconds();
  numbers_.insert(numbers_.end(), {before - mark_, taken ? 1.0 : 0.0, static_cast<double>(count)});
  for (int64_t task = 0; task < count; ++task) {
    run(task);
    const double now = seconds();
    numbers_.push_back(now - before);
    before = now;
  }
  mark_ = seconds();
}

void TaskLog::loop(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (begin >= end) return;
  const int64_t n = end - begin, threads = std::min(threads_, divided_up(n, std::max<int64_t>(1, grain)));
  if (inside_ || threads == 1) return body(begin, end);
  const int64_t range = divided_up(n, threads);
  region(false, divided_up(n, range),
         [&](int64_t i) { body(begin + i * range, std::min(end, begin + (i + 1) * range)); });
}

void TaskLog::tasks(int64_t count, const std::function<void(int64_t)>& body) {
  if (!inside_ && threads_ > 1 && count > 1) return region(true, count, body);
  for (int64_t task = 0; task < count; ++task) body(task);
}

std::vector<double> TaskLog::found() const {
  std::vector<double> numbers = numbers_;
  numbers.push_back(seconds() - mark_);
  return numbers;
}

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("begin_task_log", TORCH_BOX(&begin_task_log));
  m.impl("end_task_log", TORCH_BOX(&end_task_log));
}

}  // namespace wavlm_fast
