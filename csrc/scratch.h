// Memory that is kept from call to call: fresh pages cost more than what is computed on them. Each thread has some of
// its own; whoever asks for it (`release` below) gets that of all threads back which is not in use at the moment, and
// the rest as soon as its call is done.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

namespace wavlm_fast {

// Whose memory: one for what a thread does as one of many, one for what the thread that called the op holds meanwhile.
enum class Scratch { task, call };

constexpr std::align_val_t kLine{64};
// No more than that is kept: what calls on utterances of usual lengths take.
constexpr std::size_t kMostOfTask = 16 << 20, kMostOfCall = 48 << 20;

struct FreeLine {
  void operator()(void* memory) const { ::operator delete(memory, kLine); }
};

using Line = std::unique_ptr<void, FreeLine>;

inline Line line_of(std::size_t bytes) { return Line(::operator new(bytes, kLine)); }

// What one thread keeps for one use. Whoever holds `busy` may touch the memory. There are no locks, which a process that
// forks could leave behind: a buffer whose holder is gone stays busy, and is not used again.
class Buffer {
 public:
  bool take() { return !busy_.test_and_set(); }

  // At least so many bytes, of a buffer that is taken.
  void* grown(std::size_t bytes);

  // Ends `take`; gives the memory back if that was asked for meanwhile.
  void leave();

  // Gives the memory back, now or when it is left.
  void release();

  std::size_t size() const { return size_.load(std::memory_order_relaxed); }

 private:
  void empty();

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::atomic<bool> unwanted_{false};
  std::atomic<std::size_t> size_{0};
  Line memory_;
};

// This thread's.
Buffer& buffer_of_thread(Scratch use);

// At least `bytes` on a cache line, of this thread alone, for as long as this object lives: what the thread keeps, or
// memory that goes with the object where that would be too much to keep, or is in use.
class Memory {
 public:
  Memory(Scratch use, std::size_t bytes);
  ~Memory() {
    if (kept_) kept_->leave();
  }
  Memory(Memory&& other) noexcept
      : kept_(std::exchange(other.kept_, nullptr)), own_(std::move(other.own_)), memory_(other.memory_) {}

  template <class T>
  T* as() const {
    return static_cast<T*>(memory_);
  }

 private:
  Buffer* kept_ = nullptr;
  Line own_;
  void* memory_;
};

}  // namespace wavlm_fast
