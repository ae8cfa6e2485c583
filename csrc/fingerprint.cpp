// What derived.py compares at every call to see whether a weight has changed.
#include <array>
#include <cstring>
#include <vector>

#include "check.h"
#include "integers.h"
#include "library.h"
#include "parallel.h"

namespace wavlm_fast {
namespace {

// Each step is one to one: of two inputs that differ in a single word no number is the same.
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
Word word_at(const char* bytes) {
  Word word;
  std::memcpy(&word, bytes, sizeof(Word));
  return word;
}

template <class Word>
void mix_every(Hash& hash, const char* bytes, int64_t count, int64_t step) {
  for (int64_t i = 0; i < count; i += step) hash.mix(word_at<Word>(bytes + i * sizeof(Word)));
}

// Evenly spaced in the order of the indices, wherever they lie.
void mix_strided(Hash& hash, const Tensor& x, const char* bytes, int64_t step) {
  const int64_t size = x.element_size(), count = x.numel();
  const Sizes sizes = x.sizes(), strides = x.strides();
  for (int64_t i = 0; i < count; i += step) {
    int64_t at = 0, rest = i;
    for (size_t d = sizes.size(); d-- > 0;) {
      at += rest % sizes[d] * strides[d];
      rest /= sizes[d];
    }
    uint64_t words[2] = {0, 0};
    std::memcpy(words, bytes + at * size, std::min<int64_t>(size, sizeof words));
    hash.mix(words[0]);
    if (size > 8) hash.mix(words[1]);
  }
}

// All bytes, as fast as memory gives them: lanes do not wait for one another.
uint64_t hash_of_piece(const char* bytes, int64_t count) {
  constexpr int64_t kLanes = 8, kStep = kLanes * sizeof(uint64_t);
  std::array<Hash, kLanes> lanes;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane].mix(word_at<uint64_t>(bytes + i + lane * 8));
  }
  Hash hash;
  for (const Hash& lane : lanes) hash.mix(lane.value());
  mix_every<uint8_t>(hash, bytes + i, count - i, 1);
  return hash.value();
}

void mix_all(Hash& hash, const char* bytes, int64_t count) {
  constexpr int64_t kPiece = 1 << 16;  // not by the number of threads, which may be another at the next call
  std::vector<uint64_t> pieces(divided_up(count, kPiece));
  parallel_for(0, pieces.size(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pieces[i] = hash_of_piece(bytes + i * kPiece, std::min(kPiece, count - i * kPiece));
    }
  });
  for (const uint64_t piece : pieces) hash.mix(piece);
}

// What an op of torch says of x.
template <class Answer>
Answer answer(const char* op, const Tensor& x) {
  StableIValue stack = torch::stable::detail::from(x);
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", &stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Answer>(stack);
}

// Another number when the memory, the version, the dtype, the shape or the strides of x are others, or the bits of one
// of the values that are looked at: some `samples`, evenly spaced, or all. An inference tensor counts no versions:
// all of its values are looked at.
int64_t fingerprint(const Tensor& x, int64_t samples) {
  int32_t layout, dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(x.get(), &layout));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  const bool dense = layout == aoti_torch_layout_strided();
  ENTRY_CHECK(x.is_cpu() && dense && samples > 0,
              "fingerprint: expected a dense tensor on the CPU and samples > 0, got one on ",
              x.is_cpu() ? "the CPU" : "another device", dense ? ", dense" : ", not dense", " and ", samples);
  const char* bytes = data<char>(x);
  Hash hash;
  hash.mix(reinterpret_cast<uintptr_t>(bytes));
  hash.mix(dtype);
  for (const int64_t size : x.sizes()) hash.mix(size);
  for (const int64_t stride : x.strides()) hash.mix(stride);
  if (answer<bool>("aten::is_inference", x)) {
    const Tensor whole = contiguous_of(x);
    mix_all(hash, data<char>(whole), whole.numel() * whole.element_size());
    return hash.value();
  }
  hash.mix(answer<int64_t>("aten::_version", x));
  const int64_t count = x.numel(), step = count / samples | 1;  // odd, so as not to stay in one column
  if (!x.is_contiguous()) {
    mix_strided(hash, x, bytes, step);
    return hash.value();
  }
  switch (x.element_size()) {
    case 1:
      mix_every<uint8_t>(hash, bytes, count, step);
      break;
    case 2:
      mix_every<uint16_t>(hash, bytes, count, step);
      break;
    case 4:
      mix_every<uint32_t>(hash, bytes, count, step);
      break;
    default:  // 8, or two of them in a complex number
      mix_every<uint64_t>(hash, bytes, count * static_cast<int64_t>(x.element_size() / 8), step);
  }
  return hash.value();
}

// Not for one backend: a parameter must not pass through autograd's fallback on its way here.
STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CompositeImplicitAutograd, m) {
  m.impl("fingerprint", TORCH_BOX(&fingerprint));
}

}  // namespace
}  // namespace wavlm_fast
