// Memory that is kept from call to call: fresh pages cost more than what is computed on them.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace wavlm_fast {

// Whose memory: one for what a thread does as one of many, one for what the thread that called the op holds meanwhile.
enum class Scratch { task, call };

// At least `bytes` on a cache line, of this thread alone, valid until its next call for the same use.
template <Scratch use>
void* scratch(std::size_t bytes) {
  constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, kLine); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local std::size_t size = 0;
  if (size < bytes) {
    size = 0;
    memory.reset();
    memory.reset(::operator new(bytes, kLine));
    size = bytes;
  }
  return memory.get();
}

}  // namespace wavlm_fast
