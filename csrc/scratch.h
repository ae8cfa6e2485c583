// Memory that is kept from call to call: fresh pages cost more than what is computed on them.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace wavlm_fast {

// Whose memory: one for what a thread does as one of many, one for what the thread that called the op holds meanwhile.
enum class Scratch { task, call };

constexpr std::align_val_t kLine{64};

struct FreeLine {
  void operator()(void* memory) const { ::operator delete(memory, kLine); }
};

// At least `bytes` on a cache line, of this thread alone, valid until its next call for the same use.
template <Scratch use>
void* scratch(std::size_t bytes) {
  thread_local std::unique_ptr<void, FreeLine> memory;
  thread_local std::size_t size = 0;
  if (size < bytes) {
    size = 0;
    memory.reset();
    memory.reset(::operator new(bytes, kLine));
    size = bytes;
  }
  return memory.get();
}

// Such memory, or where that would be more than `most_kept` bytes some that goes with this object.
template <Scratch use>
class Memory {
 public:
  Memory(std::size_t bytes, std::size_t most_kept)
      : own_(bytes > most_kept ? ::operator new(bytes, kLine) : nullptr),
        memory_(own_ ? own_.get() : scratch<use>(bytes)) {}

  void* get() const { return memory_; }

 private:
  std::unique_ptr<void, FreeLine> own_;
  void* memory_;
};

}  // namespace wavlm_fast
