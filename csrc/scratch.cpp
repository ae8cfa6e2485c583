#include "scratch.h"

#include "library.h"

namespace wavlm_fast {
namespace {

// A thread's buffers, in a list that only grows: who walks along it meets no hole. What a thread that ended leaves is
// the next one's.
struct Place {
  Buffer buffers[2];
  std::atomic<bool> owned{true};
  Place* next = nullptr;
};

std::atomic<Place*> places{nullptr};

Place* claimed() {
  for (Place* place = places; place; place = place->next) {
    if (!place->owned.exchange(true, std::memory_order_acquire)) return place;
  }
  Place* const place = new Place;
  place->next = places;
  while (!places.compare_exchange_weak(place->next, place)) {
  }
  return place;
}

struct Claim {
  Place* const place = claimed();

  ~Claim() {
    for (Buffer& buffer : place->buffers) buffer.release();
    place->owned.store(false, std::memory_order_release);
  }
};

template <class Body>
void for_each_buffer(const Body& body) {
  for (Place* place = places; place; place = place->next) {
    for (Buffer& buffer : place->buffers) body(buffer);
  }
}

// Bytes that all threads keep.
int64_t kept_scratch() {
  int64_t bytes = 0;
  for_each_buffer([&](const Buffer& buffer) { bytes += buffer.size(); });
  return bytes;
}

void release_scratch() {
  for_each_buffer([](Buffer& buffer) { buffer.release(); });
}

}  // namespace

void* Buffer::grown(std::size_t bytes) {
  if (size() < bytes) {
    empty();
    memory_ = line_of(bytes);
    size_.store(bytes, std::memory_order_relaxed);
  }
  return memory_.get();
}

void Buffer::leave() {
  do {
    if (unwanted_.exchange(false)) empty();
    busy_.clear();
  } while (unwanted_ && take());
}

void Buffer::release() {
  unwanted_ = true;  // before the attempt: whoever has the buffer looks for the wish after it has left
  if (take()) leave();
}

void Buffer::empty() {
  size_.store(0, std::memory_order_relaxed);
  memory_.reset();
}

Buffer& buffer_of_thread(Scratch use) {
  thread_local const Claim claim;
  return claim.place->buffers[static_cast<int>(use)];
}

Memory::Memory(Scratch use, std::size_t bytes) {
  if (bytes <= (use == Scratch::task ? kMostOfTask : kMostOfCall)) {
    Buffer& buffer = buffer_of_thread(use);
    if (buffer.take()) {
      try {
        memory_ = buffer.grown(bytes);
      } catch (...) {
        buffer.leave();
        throw;
      }
      kept_ = &buffer;
      return;
    }
  }
  own_ = line_of(bytes);
  memory_ = own_.get();
}

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("kept_scratch", TORCH_BOX(&kept_scratch));
  m.impl("release_scratch", TORCH_BOX(&release_scratch));
}

}  // namespace wavlm_fast
