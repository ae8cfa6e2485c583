// Memory that a thread works in, kept from call to call: fresh pages cost more than what is computed on them.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace wavlm_fast {

// At least `bytes` on a cache line, of this thread alone, valid until its next call.
inline void* scratch(std::size_t bytes) {
  constexpr std::size_t kLine = 64;
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{kLine}); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local std::size_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;
    memory.reset(::operator new(bytes, std::align_val_t{kLine}));
    size = bytes;
  }
  return memory.get();
}

}  // namespace wavlm_fast
