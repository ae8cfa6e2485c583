// What derived.py compares at every call to see whether a weight has changed.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstring>

namespace wavlm_fast {
namespace {

using at::Tensor;

class Hash {
 public:
  void mix(uint64_t word) {
    state_ = (state_ ^ word) * 0x9e3779b97f4a7c15u;
    state_ ^= state_ >> 32;
  }
  int64_t value() const { return static_cast<int64_t>(state_); }

 private:
  uint64_t state_ = 0;
};

template <class Word>
void mix_every(Hash& hash, const void* data, int64_t count, int64_t step) {
  const auto* bytes = static_cast<const char*>(data);
  for (int64_t i = 0; i < count; i += step) {
    Word word;
    std::memcpy(&word, bytes + i * sizeof(Word), sizeof(Word));
    hash.mix(word);
  }
}

// Another number when the memory, the version, the dtype or the shape of x is another, or the bits of one of the values
// that are looked at: at least `samples` of a contiguous x, evenly spaced, or all.
int64_t fingerprint(const Tensor& x, int64_t samples) {
  TORCH_CHECK(x.is_cpu() && samples > 0, "fingerprint: expected a tensor on the CPU and samples > 0, got one on ",
              x.device(), " and ", samples);
  const void* data = x.const_data_ptr();
  Hash hash;
  hash.mix(reinterpret_cast<uintptr_t>(data));
  hash.mix(x._version());
  hash.mix(static_cast<uint64_t>(x.scalar_type()));
  for (const int64_t size : x.sizes()) hash.mix(size);
  if (!x.is_contiguous()) return hash.value();
  const int64_t count = x.numel(), step = count / samples | 1;  // odd, so as not to stay in one column
  switch (x.element_size()) {
    case 1:
      mix_every<uint8_t>(hash, data, count, step);
      break;
    case 2:
      mix_every<uint16_t>(hash, data, count, step);
      break;
    case 4:
      mix_every<uint32_t>(hash, data, count, step);
      break;
    default:  // 8, or two of them in a complex number
      mix_every<uint64_t>(hash, data, count * static_cast<int64_t>(x.element_size() / 8), step);
  }
  return hash.value();
}

// Not for one backend: a parameter must not pass through autograd's fallback on its way here.
TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CompositeImplicitAutograd, m) { m.impl("fingerprint", &fingerprint); }

}  // namespace
}  // namespace wavlm_fast
